"""Train a small student on stored logits in a plain loop, and go on after a stop.

    python docs/examples/plain_loop.py demo/logits --steps 20 --checkpoint demo/student.pt

Run it again with the same checkpoint: it goes on with the next batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from explore_logits import (
    LogitIterableDataset,
    collate_logits,
    distillation_loss,
    load_extraction_config,
)

BATCH_SIZE = 4


def make_student(vocab: int) -> LlamaForCausalLM:
    """Make an untrained student for the teacher's vocabulary."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=vocab,
        hidden_size=56,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(shape)


def iter_batches(dataset: Any) -> Iterator[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Yield batches of one epoch after another, each with the state that comes after it.

    With workers, take `StatefulDataLoader` of torchdata and the state of the loader.
    """
    loader: Any = DataLoader(dataset, batch_size=BATCH_SIZE, collate_fn=collate_logits)
    while True:
        for batch in loader:
            yield dataset.state_dict(), batch
        dataset.set_epoch(dataset.epoch + 1)


def main() -> None:
    """Train for some steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="a folder of extract_logits.py, or a dataset on the Hub")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoint", type=Path)
    args = parser.parse_args()

    dataset: Any = LogitIterableDataset(args.output, seed=0, max_seq_len=512)
    student = make_student(load_extraction_config(args.output)["vocab_size"])
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    if args.checkpoint and args.checkpoint.is_file():
        saved = torch.load(args.checkpoint)
        student.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
        dataset.load_state_dict(saved["place"])

    for step, (place, batch) in zip(range(args.steps), iter_batches(dataset), strict=False):
        logits = student(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
        loss = distillation_loss(logits, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} epoch {place['epoch']} loss {loss.item():.4f}")
        if args.checkpoint and step == args.steps - 1:
            states = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**states, "place": place}, args.checkpoint)


if __name__ == "__main__":
    main()

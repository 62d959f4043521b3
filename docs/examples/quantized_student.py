"""Train a teacher's own 4-bit copy on its stored logits: quantization-aware distillation.

    pip install torchao
    python docs/examples/quantized_student.py demo/logits

Every fifth conversation is held out. Prints the divergence of the 4-bit model from its teacher on
those, rounded as it is and after the training. The teacher itself is not run.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
from torchao.quantization.qat import QATConfig
from transformers import AutoModelForCausalLM

from explore_logits import (
    LogitIterableDataset,
    collate_logits,
    distillation_loss,
    load_extraction_config,
)

KINDS = {2: torch.int2, 3: torch.int3, 4: torch.int4, 8: torch.int8}


def load_model(settings: dict[str, Any]) -> Any:
    """Return the teacher's weights in full precision."""
    return AutoModelForCausalLM.from_pretrained(
        settings["model"], revision=settings.get("model_revision"), dtype=torch.float32
    )


def is_body(module: torch.nn.Module, name: str) -> bool:
    """Return whether a module is quantized: not the head, which shares the embedding's weights."""
    return isinstance(module, torch.nn.Linear) and "lm_head" not in name


def divergence(model: Any, rows: Sequence[Any], reduction: str = "mean") -> Any:
    """Return the KL divergence of the model from the stored teacher, in nats."""
    batch = collate_logits(rows)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return distillation_loss(logits, batch, reduction=reduction)


@torch.no_grad()
def evaluate(model: Any, rows: Sequence[Any]) -> float:
    """Return the divergence on some conversations, in nats a token."""
    total = sum(float(divergence(model, rows[i : i + 8], "sum")) for i in range(0, len(rows), 8))
    return total / sum(row["teacher_positions"].size for row in rows)


def main() -> None:
    """Compare rounding with training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="a folder of extract_logits.py, or a dataset on the Hub")
    parser.add_argument("--bits", type=int, choices=KINDS, default=4, help="of a weight")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--save", type=Path, help="folder for the weights to quantize")
    args = parser.parse_args()

    dataset: Any = LogitIterableDataset(args.output, seed=None, max_seq_len=512)
    rows = list(dataset)
    held_out, trained_on = rows[::5], [row for i, row in enumerate(rows) if i % 5]
    student = load_model(load_extraction_config(args.output))
    few_bits = IntxWeightOnlyConfig(KINDS[args.bits], PerGroup(32))  # one scale for 32 weights
    rounded = copy.deepcopy(student)
    quantize_(rounded, few_bits, filter_fn=is_body)
    print(f"{len(trained_on)} conversations to train on, {len(held_out)} held out")
    print(f"KL before: {evaluate(rounded, held_out):.4f}", flush=True)

    quantize_(student, QATConfig(few_bits, step="prepare"), filter_fn=is_body)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, weight_decay=0.0)
    warm_up = 0.1 if args.steps > 10 else 0.5  # a share that is more than one step
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps, pct_start=warm_up
    )
    order = random.Random(0)
    for _ in range(args.steps):
        batch = order.sample(trained_on, min(args.batch_size, len(trained_on)))
        divergence(student, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    quantize_(student, QATConfig(few_bits, step="convert"))  # weights of so many bits
    print(f"KL after {args.steps} steps: {evaluate(student, held_out):.4f}")
    if args.save:
        args.save.mkdir(parents=True, exist_ok=True)
        torch.save(student.state_dict(), args.save / "student.pt")


if __name__ == "__main__":
    main()

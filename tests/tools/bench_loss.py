"""Measure memory and time of a step from hidden states and head to a loss and its gradients.

    python tests/tools/bench_loss.py [--tokens 2048] [--hidden 256]
                                     [--ways cross-entropy logits hidden]

Ways: PyTorch's cross-entropy on the logits; `distillation_loss` on the logits;
`distillation_loss_from_hidden`, which never holds them. Each runs in a process of its own, on one
core, in float32. Prints a table: the peak above hidden states, head and teacher, how much of it the
gradients of hidden states and head are, and processor seconds. Reads /proc, so Linux alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from bench import peak_bytes, print_head, print_row, run_apart, timed
from sparse_batches import make_batch, teacher_row
from torch import Tensor

from explore_logits import distillation_loss, distillation_loss_from_hidden

VOCAB = 151_936
WAYS = {
    "cross-entropy": "cross-entropy on the logits",
    "logits": "distillation_loss on the logits",
    "hidden": "distillation_loss_from_hidden",
}


def step(way: str, hidden: Tensor, head: Tensor, batch: dict[str, Tensor]) -> None:
    """Compute a loss and the gradients of hidden states and head, which are then dropped."""
    if way == "hidden":
        loss = distillation_loss_from_hidden(hidden, head, batch)
    else:
        logits = hidden @ head.T
        if way == "logits":
            loss = distillation_loss(logits, batch)
        else:
            loss = torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:])
        del logits  # as after a call that got them as an argument
    loss.backward()
    hidden.grad = head.grad = None


def measure(way: str, tokens: int, size: int) -> dict[str, float]:
    """Return processor seconds and the gigabytes by which the peak exceeds what was there."""
    torch.set_num_threads(1)
    head = (torch.randn(VOCAB, size) / size**0.5).requires_grad_()
    for count in (8, tokens):  # the first loads code
        hidden = torch.randn(count, size).requires_grad_()
        batch = make_batch(teacher_row("natural", 1_000).repeat(count, 1))
        before = peak_bytes(name="VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        seconds, _ = timed(lambda: step(way, hidden, head, batch))  # noqa: B023
    return {"gigabytes": (peak_bytes() - before) / 1e9, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--here", choices=WAYS, help="measure one way in this process")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.here, args.tokens, args.hidden)))
        return
    print_head("tokens", "hidden", "what is run", "peak, GB", "gradients in it", "seconds")
    gradients = 4e-9 * args.hidden * (args.tokens + VOCAB)
    for way in args.ways:
        found = run_apart(__file__, *sys.argv[1:], "--here", way)
        print_row(f"{args.tokens:,}", args.hidden, WAYS[way], f"{found['gigabytes']:.2f}",
                  f"{gradients:.2f}", f"{found['seconds']:.1f}")  # fmt: skip


if __name__ == "__main__":
    main()

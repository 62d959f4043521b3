"""Measure memory and time of a step from hidden states and head to a loss and its gradients.

    python tests/tools/bench_loss.py [--tokens 2048] [--vocab 151936] [--hidden 256]
                                     [--tail unbiased] [--ways cross-entropy logits hidden]

Ways: PyTorch's cross-entropy on the logits; `distillation_loss` on the logits;
`distillation_loss_from_hidden`, which never holds them. Each runs in a process of its own, on one
core, in float32. Prints a table: the peak above hidden states, head and teacher, how much of it the
gradients of hidden states and head are, and processor seconds. Reads /proc, so Linux alone.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from sparse_batches import make_batch, teacher_row  # noqa: E402 - run as a script, from anywhere

from explore_logits import (  # noqa: E402
    TAILS,
    distillation_loss,
    distillation_loss_from_hidden,
)

WAYS = {
    "cross-entropy": "cross-entropy on the logits",
    "logits": "distillation_loss on the logits",
    "hidden": "distillation_loss_from_hidden",
}


def resident_bytes(name: str) -> int:
    """Return VmRSS, what this process holds, or VmHWM, the most that it has held."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(rf"{name}:\s+(\d+)", status)[0])


def step(way: str, hidden: Tensor, head: Tensor, batch: dict[str, Tensor], tail: str) -> None:
    """Compute a loss and the gradients of hidden states and head, which are then dropped."""
    if way == "hidden":
        loss = distillation_loss_from_hidden(hidden, head, batch, tail=tail)
    else:
        logits = hidden @ head.T
        if way == "logits":
            loss = distillation_loss(logits, batch, tail=tail)
        else:
            loss = torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:])
        del logits  # as after a call that got them as an argument
    loss.backward()
    hidden.grad = head.grad = None


def measure(way: str, tokens: int, vocab: int, size: int, tail: str) -> dict[str, float]:
    """Return processor seconds and the gigabytes by which the peak exceeds what was there."""
    torch.set_num_threads(1)
    head = (torch.randn(vocab, size) / size**0.5).requires_grad_()
    for count in (8, tokens):  # the first loads code
        hidden = torch.randn(count, size).requires_grad_()
        batch = make_batch(teacher_row("natural", 1_000).repeat(count, 1))
        before = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        started_s = time.process_time()
        step(way, hidden, head, batch, tail)
        seconds = time.process_time() - started_s
    return {"gigabytes": (resident_bytes("VmHWM") - before) / 1e9, "seconds": seconds}


def main() -> None:
    """Measure every way in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--tail", choices=TAILS, default="unbiased")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--here", choices=WAYS, help="measure one way in this process")
    args = parser.parse_args()
    if args.here:
        found = measure(args.here, args.tokens, args.vocab, args.hidden, args.tail)
        print(json.dumps(found))
        return
    print("| tokens | hidden | what is run | peak, GB | gradients in it | seconds |")
    print("|---|---|---|---|---|---|")
    gradients = 4e-9 * args.hidden * (args.tokens + args.vocab)
    for way in args.ways:
        command = [sys.executable, __file__, *sys.argv[1:], "--here", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        figures = f"{found['gigabytes']:.2f} | {gradients:.2f} | {found['seconds']:.1f}"
        print(f"| {args.tokens:,} | {args.hidden} | {WAYS[way]} | {figures} |", flush=True)


if __name__ == "__main__":
    main()

"""Time the distillation loss with its gradient, and measure the memory that it needs.

    python tests/bench_loss.py [--tokens 1024] [--vocab 50000]

Ends in one JSON line: processor milliseconds per 1,000 tokens of the loss and its gradient under
each `tail`, and of the dense teacher's; the peak of memory beside logits and teacher, in units of
the student's float32 logits (N, V). The gradient that every loss returns is one such unit.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from sparse_batches import dense_loss, make_batch, teacher_row  # noqa: E402

from explore_logits import TAILS, distillation_loss  # noqa: E402 - run as a script, from anywhere


def peak_bytes() -> int:
    """Return the most memory that this process has had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(loss_of: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[float, float]:
    """Return processor seconds, and by how many times the logits' size the peak has grown."""
    loss_of(logits[:8].detach().requires_grad_()).backward()  # loads code
    before, started_s = peak_bytes(), time.process_time()
    loss_of(logits).backward()
    seconds = time.process_time() - started_s
    logits.grad = None
    return seconds, (peak_bytes() - before) / (4 * logits.numel())


def main() -> None:
    """Run the benchmark and print its JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=50_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    batches = {
        count: make_batch(teacher_row("natural", 1_000).repeat(count, 1))
        for count in (8, args.tokens)
    }
    logits = torch.randn(args.tokens, args.vocab).requires_grad_()
    figures: dict[str, float] = {}
    peak = 0.0  # of all so far: the losses come from the smallest to the largest
    for tail in ("ignore", "unbiased", "renormalized", "ghost"):
        seconds, grown = measure(
            lambda z, tail=tail: distillation_loss(  # type: ignore[misc]
                z, batches[z.shape[0]], tail=tail, chunk_tokens=128
            ),
            logits,
        )
        peak += grown
        figures[f"{tail}_ms"] = round(1e6 * seconds / args.tokens, 1)
        figures[f"{tail}_memory"] = round(peak, 2)
    assert set(TAILS) == {name[:-3] for name in figures if name.endswith("_ms")}
    teacher = torch.randn(args.tokens, args.vocab)
    seconds, grown = measure(
        lambda z: dense_loss(z, teacher[: z.shape[0]], "forward_kl").mean(), logits
    )
    figures["dense_ms"] = round(1e6 * seconds / args.tokens, 1)
    figures["dense_memory"] = round(peak + grown - 1, 2)  # the teacher is not counted
    print(json.dumps({"benchmark": "loss", **vars(args), **figures, "machine": platform.machine()}))


if __name__ == "__main__":
    main()

"""Make batches for `distillation_loss` from dense teachers, and the dense losses to compare with.

The tails are drawn by `extract_logits.extract_tokens`, many for each teacher row: the random
numbers depend on the row's index, so the same logits under other indices give other tails. Logits
are not quantized here, so that what is measured is the estimator alone.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import explore_logits as ex  # noqa: E402 - run as a script, from anywhere
from extract_logits import extract_tokens  # noqa: E402

ROWS, VOCAB = ("peaked", "natural", "flat"), 1_000


@dataclass(frozen=True, eq=False)
class ExactEntries(ex.Entries):
    """Entries whose logits were never quantized."""

    exact: np.ndarray = None  # type: ignore[assignment]

    @property
    def logits(self) -> np.ndarray:  # type: ignore[override]
        return self.exact


def teacher_row(kind: str, vocab: int, *, seed: int = 0) -> Tensor:
    """Return (V,) float32 logits: nearly sure, as a language model's mostly are, or torn."""
    rng = np.random.default_rng(seed)
    rank = np.arange(vocab)
    steep = {"peaked": 9 + 1.1 * np.log1p(rank), "natural": 1.35 * np.log1p(rank), "flat": 0 * rank}
    logits = -steep[kind] + rng.standard_normal(vocab) * {"flat": 1.0}.get(kind, 0.6)
    if kind == "peaked":
        logits[0] = 0.0
    return torch.from_numpy(logits[rng.permutation(vocab)].astype(np.float32))


def student_row(teacher: Tensor) -> Tensor:
    """Return (V,) float32 logits of a student that has half understood its teacher."""
    return 0.8 * teacher + torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))


def exact_block(
    logits: Tensor, *, top_p: float = 0.98, top_p_max: int = 100, sampled_n: int = 24, seed: int = 0
) -> ex.TokenBlock:
    """Extract (N, V) logits, row i under index i."""
    count = logits.shape[0]
    place = torch.arange(count), torch.ones(count, dtype=torch.int64)
    sizes: dict[str, Any] = {"top_p": top_p, "top_p_max": top_p_max, "sampled_n": sampled_n}
    found = extract_tokens(logits, *place, seed=seed, **sizes)
    counts = found.top_counts.numpy().astype(np.int64)
    there = np.arange(found.top_ids.shape[1]) < counts[:, None]
    nothing, zeros = np.zeros(0, np.uint16), np.zeros(count, np.float32)
    logsumexp = found.logsumexp.numpy()

    def entries(counts: np.ndarray, ids: np.ndarray, logits: np.ndarray) -> ExactEntries:
        plain = (ex.to_starts(counts), ids.astype(np.int32), nothing, zeros, zeros, logsumexp)
        return ExactEntries(*plain, exact=logits.astype(np.float64))

    top = entries(counts, found.top_ids.numpy()[there], found.top_logits.numpy()[there])
    drawn = (found.sampled_ids.numpy().reshape(-1), found.sampled_logits.numpy().reshape(-1))
    tail = entries(np.full(count, sampled_n), *drawn)
    return ex.TokenBlock(np.arange(count), np.array([0, count]), top, tail)


def make_row(block: ex.TokenBlock) -> dict[str, Any]:
    """Return a conversation to train on whose tokens are those of a block."""
    count = block.tail.counts.size
    return {
        "index": 0,
        "input_ids": np.zeros(count + 1, np.int32),
        "labels": np.zeros(count + 1, np.int64),
        "teacher_positions": np.arange(1, count + 1),
        **ex.sparse_teacher(block),
    }


def make_batch(logits: Tensor, **settings: Any) -> dict[str, Tensor]:
    """Return a batch of one conversation whose token i was predicted by `logits[i]`."""
    batch: dict[str, Tensor] = ex.collate_logits([make_row(exact_block(logits, **settings))])
    return batch


def dense_loss(
    student: Tensor, teacher: Tensor, divergence: str, temperature: float = 1.0
) -> Tensor:
    """Return the divergence (N,) between dense distributions, in the dtype of `student`."""
    log_q = (student / temperature).log_softmax(-1)
    log_p = (teacher.to(student.dtype) / temperature).log_softmax(-1)
    if divergence == "forward_kl":
        value = (log_p.exp() * (log_p - log_q)).sum(-1)
    elif divergence == "reverse_kl":
        value = (log_q.exp() * (log_q - log_p)).sum(-1)
    else:
        log_m = torch.logaddexp(log_p, log_q) - np.log(2)
        value = (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1) / 2
    return value * temperature**2


@dataclass(frozen=True)
class Estimates:
    """A divergence of one student row from one teacher row, estimated from many tails."""

    true: float
    values: np.ndarray  # (draws,)
    true_slope: float  # the gradient along one random direction
    slopes: np.ndarray  # (draws,)
    gradient_bias: float  # length of (mean gradient - true gradient) / length of the true one
    gradient_deviation: float  # root mean square of the length of one gradient's distance to it

    @property
    def bias(self) -> float:
        return float(self.values.mean() - self.true)

    @property
    def deviation(self) -> float:
        return float(self.values.std())

    def sigmas(self) -> tuple[float, float]:
        """Return how many standard errors the means of value and slope are off."""
        pairs = ((self.values, self.true), (self.slopes, self.true_slope))
        root = np.sqrt(self.values.size)
        errors = [(v.mean() - true) / max(v.std() / root, 1e-9) for v, true in pairs]
        return float(errors[0]), float(errors[1])


def estimate(
    kind: str, divergence: str, tail: str, *, draws: int = 2_000,
    batch: dict[str, Tensor] | None = None,
) -> Estimates:  # fmt: skip
    """Estimate a divergence, and its gradient, from `draws` tails of the same teacher row."""
    teacher = teacher_row(kind, VOCAB)
    student = student_row(teacher)
    batch = batch or make_batch(teacher.repeat(draws, 1))
    one = student.double().requires_grad_()
    true = dense_loss(one[None], teacher.double()[None], divergence)[0]
    (true_gradient,) = torch.autograd.grad(true, one)
    # float64 logits keep float64, so that what is seen is the estimator and not rounding
    many = student.double().repeat(draws, 1).requires_grad_()
    values = ex.distillation_loss(many, batch, divergence=divergence, tail=tail, reduction="none")
    (gradients,) = torch.autograd.grad(values.sum(), many)
    way = torch.randn(VOCAB, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    off = gradients.mean(0) - true_gradient
    return Estimates(
        true=float(true.detach()),
        values=values.detach().numpy(),
        true_slope=float(true_gradient @ way),
        slopes=(gradients @ way).numpy(),
        gradient_bias=float(off.norm() / true_gradient.norm()),
        gradient_deviation=relative_distance(gradients, true_gradient),
    )


def relative_distance(gradients: Tensor, true: Tensor) -> float:
    """Return the root mean square of the rows' distance from the truth, over its length."""
    return float(((gradients - true).square().sum(-1).mean()).sqrt() / true.norm())


def main() -> None:
    """Print bias and deviation of every estimator as Markdown; a minute."""
    print("| row | divergence | tail | true | bias | deviation | gradient: bias | deviation |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in ROWS:
        batch = make_batch(teacher_row(kind, VOCAB).repeat(2_000, 1))
        for divergence, tail in itertools.product(ex.DIVERGENCES, ex.TAILS):
            made = estimate(kind, divergence, tail, batch=batch)
            error = 1.96 * made.deviation / made.values.size**0.5
            print(
                f"| {kind} | {divergence} | {tail} | {made.true:.4f} | "
                f"{made.bias:+.5f} ± {error:.5f} | {made.deviation:.5f} | "
                f"{made.gradient_bias:.1%} | {made.gradient_deviation:.1%} |"
            )


if __name__ == "__main__":
    main()

"""Make batches for `distillation_loss` from dense teachers, and the dense losses to compare with.

The tails are drawn by `extract_logits.extract_tokens`, many for each teacher row: the random
numbers depend on the row's index, so the same logits under other indices give other tails. Logits
are not quantized here, so that what is measured is the estimator alone.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # as a script, from anywhere

import explore_logits as ex  # noqa: E402
from extract_logits import extract_tokens  # noqa: E402

ROWS, VOCAB, DRAWS = ("peaked", "natural", "flat"), 1_000, 2_000


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal numbers that are the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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
    return 0.8 * teacher + randn(*teacher.shape, seed=1)


def exact_entries(
    counts: np.ndarray, ids: np.ndarray, logits: np.ndarray, logsumexp: np.ndarray
) -> ex.Entries:
    """Return entries of tokens whose logits were never quantized."""
    nothing, zeros = np.zeros(0, np.uint16), np.zeros(counts.size, np.float32)
    places = (ex.to_starts(counts), ids.astype(np.int32))
    entries = ex.Entries(*places, nothing, zeros, zeros, logsumexp)
    vars(entries)["logits"] = logits.astype(np.float64)  # a cached property: it is not computed
    return entries


def exact_block(logits: Tensor, **settings: Any) -> ex.TokenBlock:
    """Extract (N, V) logits, row i under index i; as by default but for what is given."""
    count = len(logits)
    kept: dict[str, Any] = {"top_p": 0.98, "top_p_max": 100, "sampled_n": 24, **settings}
    place = torch.arange(count), torch.ones(count, dtype=torch.int64)
    found = extract_tokens(logits, *place, seed=0, **kept)
    counts = found.top_counts.numpy().astype(np.int64)
    there = np.arange(found.top_ids.shape[1]) < counts[:, None]
    top = (counts, found.top_ids.numpy()[there], found.top_logits.numpy()[there])
    drawn = (found.sampled_ids.numpy().reshape(-1), found.sampled_logits.numpy().reshape(-1))
    tail = (np.full(count, kept["sampled_n"]), *drawn)
    parts = (exact_entries(*part, found.logsumexp.numpy()) for part in (top, tail))
    return ex.TokenBlock(np.arange(count), np.array([0, count]), *parts)


def make_row(block: ex.TokenBlock) -> dict[str, Any]:
    """Return a conversation to train on whose tokens are those of a block."""
    count = block.tail.counts.size
    text = {"input_ids": np.zeros(count + 1, np.int32), "labels": np.zeros(count + 1, np.int64)}
    told = {"teacher_positions": np.arange(1, count + 1), **ex.sparse_teacher(block)}
    return {"index": 0, **text, **told}


def make_batch(logits: Tensor, **settings: Any) -> dict[str, Tensor]:
    """Return a batch of one conversation whose token i was predicted by `logits[i]`."""
    return ex.collate_logits([make_row(exact_block(logits, **settings))])


def dense_loss(student: Tensor, teacher: Tensor, divergence: str, temperature: float = 1) -> Tensor:
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


class Estimates(NamedTuple):
    """A divergence of one student row from one teacher row, estimated from many tails."""

    true: float
    bias: float
    deviation: float
    sigmas: list[float]  # standard errors by which the means of value and gradient are off
    gradient_bias: float  # length of (mean gradient - true gradient) / length of the true one
    gradient_deviation: float  # root mean square of the length of one gradient's distance to it


def estimate(
    kind: str, divergence: str, tail: str, draws: int = DRAWS, batch: Any = None
) -> Estimates:
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
    way = randn(VOCAB, seed=7, dtype=torch.float64)  # along which gradients are compared
    off = gradients.mean(0) - true_gradient
    pairs = (values.detach(), true.detach()), (gradients @ way, true_gradient @ way)
    biases = [float(found.numpy().mean() - float(right)) for found, right in pairs]
    deviations = [float(found.numpy().std()) for found, _ in pairs]
    errors = [max(deviation / len(values) ** 0.5, 1e-9) for deviation in deviations]
    spread = (gradients - true_gradient).square().sum(-1).mean().sqrt()
    lengths = (float(length / true_gradient.norm()) for length in (off.norm(), spread))
    sigmas = list(np.divide(biases, errors))
    return Estimates(float(true.detach()), biases[0], deviations[0], sigmas, *lengths)


def main() -> None:
    """Print bias and deviation of every estimator as Markdown; a minute."""
    print("| row | divergence | tail | true | bias | deviation | gradient: bias | deviation |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in ROWS:
        batch = make_batch(teacher_row(kind, VOCAB).repeat(DRAWS, 1))
        for divergence, tail in itertools.product(ex.DIVERGENCES, ex.TAILS):
            made = estimate(kind, divergence, tail, batch=batch)
            error = 1.96 * made.deviation / DRAWS**0.5
            print(
                f"| {kind} | {divergence} | {tail} | {made.true:.4f} | "
                f"{made.bias:+.5f} ± {error:.5f} | {made.deviation:.5f} | "
                f"{made.gradient_bias:.1%} | {made.gradient_deviation:.1%} |"
            )


if __name__ == "__main__":
    main()

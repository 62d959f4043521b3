"""Statistical tests of a tail sampler against successive sampling without replacement.

The law: each draw takes a token from outside the nucleus and not drawn before, with probability
proportional to the teacher's. A sampler under test is a function

    draw(log_probs (V,) float64, nucleus (V,) bool, M, n_trials, seed) -> (n_trials, M) ids

in the order drawn, and `check_tail_law(draw)` raises `LawViolation` naming the row, the test and
the p-value.

The first draw is tested by χ² on cells that expect ≥ 100 trials. All draws are placed in the
distribution function of what is left, which gives independent uniform numbers exactly when the law
is right (Rosenblatt 1952): Kolmogorov and pairwise χ².

A right sampler fails with probability ≤ 1e-6 per seed. `FALSE_ALARM` is 1e-7, shared equally among
the rows and `MAX_TESTS` tests of each (Bonferroni); the Kolmogorov p-values are exact, and the
factor of ten is room for the χ² approximation so far out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.special import log_softmax

Draw = Callable[[np.ndarray, np.ndarray, int, int, int], np.ndarray]
FALSE_ALARM = 1e-7
MAX_TESTS = 7
MIN_EXPECTED = 100


class LawViolation(AssertionError):
    """The sampler does not draw by its law."""


class Case(NamedTuple):
    """A row to draw from: log-probabilities that float32 holds exactly, the `nucleus` likeliest."""

    name: str
    log_probs: np.ndarray  # (V,) float64
    nucleus_n: int
    sampled_n: int
    trials: int


def as_cases(rows: list[tuple[str, np.ndarray, int, int, int]], seed: int) -> list[Case]:
    """Normalize rows to what float32 holds; shuffle ids, so that likely tokens stand anywhere."""
    rng = np.random.default_rng(seed)
    cases = []
    for name, logits, *sizes in rows:
        held = log_softmax(rng.permutation(logits)).astype(np.float32).astype(np.float64)
        cases.append(Case(name, held, *sizes))
    return cases


def make_cases(trials: int) -> list[Case]:
    """Return rows of up to 64 tokens: vanishing, crowded, peaked and flat, the cheap ones first."""
    rng = np.random.default_rng(7)
    tiny = np.concatenate([[0.0], -700 - np.linspace(0, 4, 30)])
    steps = np.concatenate([[0.0, -1.0, -2.0], -700 - np.linspace(0, 3, 20), [-760, -761, -800]])
    deep = np.concatenate([[0.0], -3000 - np.linspace(0, 2.5, 12)])
    rows = [
        # name, logits, nucleus, M, trials
        ("tiny", np.log([0.4, 0.25, 0.15, 0.12, 0.08]), 1, 3, 2 * trials),
        ("exp(-3000)", deep, 1, 5, trials),
        ("exp(-700)", tiny, 1, 6, trials),
        ("exp(-700) after ordinary ones", steps, 1, 10, trials),
        ("V = M + nucleus", rng.normal(0, 1, 10), 2, 8, trials),
        ("one draw", rng.normal(0, 2, 30), 2, 1, trials),
        ("peaked", np.concatenate([[9.0], rng.normal(0, 2, 47)]), 1, 12, trials),
        ("flat", np.zeros(64), 4, 24, trials // 2),
    ]
    return as_cases(rows, 7)


def make_large_cases(trials: int) -> list[Case]:
    """Return rows of 1,000 to 2,048 tokens: what a method that works by blocks can get wrong."""
    rng = np.random.default_rng(8)
    vanishing = np.concatenate([[0.0], -700 + rng.normal(0, 2, 2000)])
    ordinary = np.concatenate([[0.0], rng.uniform(-3, -1, 10), -760 + rng.normal(0, 2, 2000)])
    uneven = np.where(np.arange(1000) // 64 % 3 == 1, 0.0, -4.0) + rng.normal(0, 1, 1000)
    rows = [
        ("natural, large", -1.1 * np.log(np.arange(1, 2001)), 20, 24, trials),
        ("flat, large", rng.normal(0, 0.3, 2048), 1, 24, trials // 2),
        ("geometric, large", -0.5 * np.arange(1500.0), 1, 16, trials // 2),
        ("exp(-700), large", vanishing, 1, 24, trials // 2),
        ("exp(-760) after ordinary ones, large", ordinary, 1, 24, trials // 2),
    ]
    blocks = log_softmax(uneven).astype(np.float32).astype(np.float64)
    return [*as_cases(rows, 8), Case("uneven blocks", blocks, 3, 24, trials)]


def first_p(log_p: np.ndarray, ranks: np.ndarray) -> float:
    """Return the p-value of χ² of the first draw; neighbours are merged to cells of 100 trials."""
    wanted = np.exp(log_p) * len(ranks)
    up_to, starts, held = wanted.cumsum(), [0], 0.0
    for n, so_far in enumerate(up_to[:-1], 1):
        if min(so_far - held, up_to[-1] - so_far) >= MIN_EXPECTED:
            starts.append(n)
            held = so_far
    observed = np.bincount(ranks[:, 0], minlength=len(wanted))
    cells = (np.add.reduceat(values, starts) for values in (observed, wanted))
    return float(stats.chisquare(*cells).pvalue) if len(starts) > 1 else 1.0


def uniforms(log_p: np.ndarray, ranks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return (n_trials, M) numbers, independent and uniform when the law is right.

    Each draw is placed at a random point of its own step in the distribution function of what
    is left, likeliest first. Weights are computed afresh at each draw, so that none underflows.
    """
    trials, m = ranks.shape
    step = max(1, 1_000_000 // len(log_p))
    if trials > step:
        parts = [ranks[start : start + step] for start in range(0, trials, step)]
        return np.concatenate([uniforms(log_p, part, rng) for part in parts])
    left = np.tile(log_p, (trials, 1))
    rows, numbers = np.arange(trials), np.empty((trials, m))
    for j in range(m):
        weights = np.exp(left - left.max(axis=1, keepdims=True))
        mine = weights[rows, ranks[:, j]]
        up_to = weights.cumsum(axis=1)
        before = up_to[rows, ranks[:, j]] - mine
        numbers[:, j] = (before + rng.random(trials) * mine) / up_to[:, -1]
        left[rows, ranks[:, j]] = -np.inf
    return numbers


def uniforms_p(u: np.ndarray) -> dict[str, float]:
    """Return Kolmogorov p-values of all, first and last draws, and of pairs on an 8 × 8 grid."""
    views = {"all": u.ravel(), "first": u[:, 0], "last": u[:, -1]}
    found = {name: stats.kstest(values, "uniform").pvalue for name, values in views.items()}
    cells = (u * 8).astype(int).clip(0, 7)
    pairs = {"trial to trial": (cells[:-1, 0], cells[1:, 0])}
    if u.shape[1] > 1:
        pairs["draw to draw"], pairs["ends"] = cells[:, :2].T, cells[:, [0, -1]].T
    for name, (a, b) in pairs.items():
        found[name] = stats.chisquare(np.bincount(8 * a + b, minlength=64)).pvalue
    return {f"uniforms, {name}": float(p_value) for name, p_value in found.items()}


def check_tail_law(draw: Draw, *, cases: list[Case]) -> None:
    """Require that `draw` follows the law on every row.

    Raises:
        LawViolation: with the row, the test and the p-value, at the first test that fails;
            once in 1e6 for a right sampler.
    """
    threshold = FALSE_ALARM / (MAX_TESTS * len(cases))
    for k, case in enumerate(cases):
        seed = 1000 + k
        order = np.argsort(-case.log_probs, kind="stable")  # likeliest first
        nucleus = np.isin(np.arange(len(order)), order[: case.nucleus_n])
        drawn = draw(case.log_probs, nucleus, case.sampled_n, case.trials, seed)
        ranks = np.argsort(order)[drawn] - case.nucleus_n  # among the tail's tokens
        if (ranks < 0).any() or (np.diff(np.sort(ranks, axis=1)) == 0).any():
            raise LawViolation(f"{case.name}: drew a token of the nucleus, or one twice")
        log_p = log_softmax(case.log_probs[order[case.nucleus_n :]])
        found = {"first draw": first_p(log_p, ranks)}
        rng = np.random.default_rng([seed, 1952])  # no stream that a sampler may use as well
        for test, p_value in (found | uniforms_p(uniforms(log_p, ranks, rng))).items():
            if not p_value >= threshold:
                raise LawViolation(f"{case.name}: {test} fails, p = {p_value:.3g}")

"""Statistical tests of a tail sampler against successive sampling without replacement.

The law: each draw takes a token from outside the nucleus and not drawn before, with probability
proportional to the teacher's. A sampler under test is a function

    draw(log_probs (V,) float64, nucleus (V,) bool, M, n_trials, seed) -> (n_trials, M) ids

in the order drawn, and `check_tail_law(draw)` raises `LawViolation` naming the row, the test and
the p-value.

The first draw is tested by itself, by χ² on cells that expect ≥ 100 trials. All draws are placed in
the distribution function of what is left, which gives independent uniform numbers exactly when the
law is right (Rosenblatt 1952): Kolmogorov and pairwise χ².

False alarms: a right sampler fails the whole suite with probability ≤ 1e-6 per seed. `FALSE_ALARM`
is 1e-7, shared equally among the rows and at most `MAX_TESTS` tests of each (Bonferroni); the
Kolmogorov p-values are exact, and the factor of ten is room for the χ² approximation so far out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import log_softmax

Draw = Callable[[np.ndarray, np.ndarray, int, int, int], np.ndarray]
FALSE_ALARM = 1e-7
MAX_TESTS = 7
MIN_EXPECTED = 100


class LawViolation(AssertionError):
    """The sampler does not draw by its law."""


@dataclass(frozen=True)
class Case:
    """A row to draw from: log-probabilities that float32 holds exactly, the `nucleus` likeliest."""

    name: str
    log_probs: np.ndarray  # (V,) float64
    nucleus_n: int
    sampled_n: int
    trials: int

    @property
    def nucleus(self) -> np.ndarray:
        """Return the (V,) bool mask of the likeliest tokens."""
        return np.isin(np.arange(len(self.log_probs)), self.order[: self.nucleus_n])

    @property
    def order(self) -> np.ndarray:
        """Return the (V,) ids, likeliest first, ties: lower id first."""
        return np.argsort(-self.log_probs, kind="stable")


def float32_row(logits: np.ndarray) -> np.ndarray:
    """Normalize, then round to what float32 holds; the law uses the rounded values."""
    return log_softmax(logits).astype(np.float32).astype(np.float64)


def make_cases(trials: int) -> list[Case]:
    """Return rows of up to 64 tokens: vanishing, crowded, peaked and flat, the cheap ones first.

    They are the same whatever the seed of the draws.
    """
    rng = np.random.default_rng(7)
    tiny = np.concatenate([[0.0], -700 - np.linspace(0, 4, 30)])
    steps = np.concatenate([[0.0, -1.0, -2.0], -700 - np.linspace(0, 3, 20), [-760, -761, -800]])
    deep = np.concatenate([[0.0], -3000 - np.linspace(0, 2.5, 12)])
    rows = [
        # name, logits, nucleus, M, share of the trials
        ("tiny", np.log([0.4, 0.25, 0.15, 0.12, 0.08]), 1, 3, 2.0),
        ("exp(-3000)", deep, 1, 5, 1.0),
        ("exp(-700)", tiny, 1, 6, 1.0),
        ("exp(-700) after ordinary ones", steps, 1, 10, 1.0),
        ("V = M + nucleus", rng.normal(0, 1, 10), 2, 8, 1.0),
        ("V = M + nucleus + 1", rng.normal(0, 1.5, 12), 3, 8, 1.0),
        ("one draw", rng.normal(0, 2, 30), 2, 1, 1.0),
        ("steep", -0.7 * np.arange(40.0), 3, 8, 1.0),
        ("peaked", np.concatenate([[9.0], rng.normal(0, 2, 47)]), 1, 12, 1.0),
        ("flat", np.zeros(64), 4, 24, 0.5),
    ]
    return as_cases(rows, rng, trials)


def make_large_cases(trials: int) -> list[Case]:
    """Return rows of 1,000 to 8,192 tokens: what a method that works by blocks can get wrong."""
    rng = np.random.default_rng(8)
    vanishing = np.concatenate([[0.0], -700 + rng.normal(0, 2, 2000)])
    ordinary = np.concatenate([[0.0], rng.uniform(-3, -1, 10), -760 + rng.normal(0, 2, 2000)])
    uneven = np.where(np.arange(1000) // 64 % 3 == 1, 0.0, -4.0) + rng.normal(0, 1, 1000)
    rows = [
        ("natural, large", -1.1 * np.log(np.arange(1, 5001)), 20, 24, 1.0),
        ("flat, large", rng.normal(0, 0.3, 8192), 1, 24, 0.5),
        ("peaked tail, large", -2.5 * np.log(np.arange(1, 3001)), 2, 24, 1.0),
        ("geometric, large", -0.5 * np.arange(1500.0), 1, 16, 0.5),
        ("exp(-700), large", vanishing, 1, 24, 0.5),
        ("exp(-760) after ordinary ones, large", ordinary, 1, 24, 0.5),
    ]
    return [*as_cases(rows, rng, trials), Case("uneven blocks", float32_row(uneven), 3, 24, trials)]


def as_cases(
    rows: list[tuple[str, np.ndarray, int, int, float]], rng: np.random.Generator, trials: int
) -> list[Case]:
    """Shuffle the ids of each row, so that likely tokens stand anywhere."""
    return [
        Case(name, float32_row(rng.permutation(row)), nucleus, m, int(trials * share))
        for name, row, nucleus, m, share in rows
    ]


def first_p(log_p: np.ndarray, ranks: np.ndarray) -> float:
    """Return the p-value of χ² of the first draw; neighbours are merged to cells of 100."""
    cells, expected = [], [0.0]
    for wanted in (np.exp(log_p) * len(ranks)).tolist():
        if expected[-1] >= MIN_EXPECTED:
            expected.append(0.0)
        expected[-1] += wanted
        cells.append(len(expected) - 1)
    if len(expected) > 1 and expected[-1] < MIN_EXPECTED:
        last = expected.pop()
        expected[-1] += last
    cell_of = np.minimum(cells, len(expected) - 1)
    observed = np.bincount(cell_of[ranks[:, 0]], minlength=len(expected))
    return float(stats.chisquare(observed, expected).pvalue) if len(expected) > 1 else 1.0


def uniforms(log_p: np.ndarray, ranks: np.ndarray, seed: int) -> np.ndarray:
    """Return (n_trials, M) numbers, independent and uniform when the law is right.

    Each draw is placed at a random point of its own step in the distribution function of what
    is left, likeliest first.
    """
    rng = np.random.default_rng([seed, 1952])  # no stream that a sampler may use as well
    if np.exp(log_p[ranks.shape[1] :]).sum() > 1e-3:  # whatever was drawn, this much is left
        return uniforms_by_difference(np.exp(log_p), ranks, rng)
    step = max(1, 1_000_000 // len(log_p))
    parts = [ranks[start : start + step] for start in range(0, len(ranks), step)]
    return np.concatenate([uniforms_afresh(log_p, part, rng) for part in parts])


def uniforms_afresh(log_p: np.ndarray, ranks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Recompute the weights from what is left at each draw, so that nothing underflows."""
    trials, m = ranks.shape
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


def uniforms_by_difference(
    p: np.ndarray, ranks: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Subtract what was drawn; right where the draws leave most of the mass."""
    trials, m = ranks.shape
    before_all = np.concatenate([[0.0], p.cumsum()])
    numbers = np.empty((trials, m))
    for j in range(m):
        mine, drawn = ranks[:, j], ranks[:, :j]
        earlier = p[drawn]  # (n_trials, j)
        before = before_all[mine] - (earlier * (drawn < mine[:, None])).sum(axis=1)
        left = before_all[-1] - earlier.sum(axis=1)
        numbers[:, j] = (before + rng.random(trials) * p[mine]) / left
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


def ranks_of(case: Case, drawn: np.ndarray) -> np.ndarray:
    """Return the draws as ranks among the tail's tokens; a token of the nucleus or twice raises."""
    wanted = (case.trials, case.sampled_n)
    if drawn.shape != wanted or drawn.min() < 0 or drawn.max() >= len(case.log_probs):
        said = f"drew {drawn.shape} ids from {drawn.min()} to {drawn.max()}, not {wanted}"
        raise LawViolation(f"{case.name}: {said}")
    ranks = np.argsort(case.order)[drawn] - case.nucleus_n
    if (ranks < 0).any():
        raise LawViolation(f"{case.name}: drew a token of the nucleus")
    if (np.diff(np.sort(ranks, axis=1)) == 0).any():
        raise LawViolation(f"{case.name}: drew a token twice")
    return ranks


def check_tail_law(draw: Draw, *, cases: list[Case]) -> None:
    """Require that `draw` follows the law on every row.

    Raises:
        LawViolation: with the row, the test and the p-value, at the first test that fails;
            once in 1e6 for a right sampler.
    """
    threshold = FALSE_ALARM / (MAX_TESTS * len(cases))
    for k, case in enumerate(cases):
        seed = 1000 + k
        drawn = draw(case.log_probs, case.nucleus, case.sampled_n, case.trials, seed)
        ranks = ranks_of(case, np.asarray(drawn).astype(np.int64))
        log_p = log_softmax(case.log_probs[case.order[case.nucleus_n :]])
        found = {"first draw": first_p(log_p, ranks)}
        for test, p_value in (found | uniforms_p(uniforms(log_p, ranks, seed))).items():
            if not p_value >= threshold:
                raise LawViolation(f"{case.name}: {test} fails, p = {p_value:.3g}")

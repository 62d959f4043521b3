"""Statistical tests of a tail sampler against successive sampling without replacement.

The law: each draw takes a token from outside the nucleus and not drawn before, with probability
proportional to the teacher's. A sampler under test is a function

    draw(log_probs (V,) float64, nucleus (V,) bool, M, n_trials, seed) -> (n_trials, M) ids

in the order drawn, and `check_tail_law(draw)` raises `LawViolation` naming the row, the test and
the p-value.

Four kinds of tests, each with its own strength:

- first draw, and second draw given the first: χ² on cells that expect ≥ 100 trials;
- inclusion: how often each token is in the sample, exact probabilities by quadrature over the time
  of an exponential race, exact binomial tests;
- joint order: all ordered samples of a tiny vocabulary by enumeration, exact binomial tests;
- uniforms: every draw placed in the distribution function of what is left, which gives independent
  uniform numbers exactly when the law is right (Rosenblatt 1952); Kolmogorov and pairwise χ².

False alarms: a right sampler fails the whole suite with probability ≤ 1e-6 per seed. `FALSE_ALARM`
is 1e-7, shared equally among the rows and at most `MAX_TESTS` tests of each (Bonferroni); the
binomial and Kolmogorov p-values are exact or conservative, and the factor of ten is room for the
χ² approximation so far out.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import stats

Draw = Callable[[np.ndarray, np.ndarray, int, int, int], np.ndarray]
FALSE_ALARM = 1e-7
MAX_TESTS = 10
MIN_EXPECTED = 100


class LawViolation(AssertionError):
    """The sampler does not draw by its law; `p_value` is 0 for what can never happen."""

    def __init__(self, message: str, p_value: float = 0.0) -> None:
        super().__init__(message)
        self.p_value = p_value


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
        """Return the (V,) bool mask of the likeliest tokens, ties: lower id first."""
        mask = np.zeros(len(self.log_probs), dtype=bool)
        mask[np.argsort(-self.log_probs, kind="stable")[: self.nucleus_n]] = True
        return mask


@dataclass(frozen=True)
class Outcome:
    """One test's p-value, already multiplied by the number of comparisons inside the test."""

    case: str
    test: str
    p_value: float


# 1 Rows -------------------------------------------------------------------------------------------


def float32_row(logits: np.ndarray) -> np.ndarray:
    """Normalize, then round to what float32 holds; the law uses the rounded values."""
    peak = logits.max()
    logsumexp = peak + math.log(np.exp(logits - peak).sum())
    return (logits - logsumexp).astype(np.float32).astype(np.float64)


def make_cases(trials: int = 20_000) -> list[Case]:
    """Return rows of up to 64 tokens: vanishing, crowded, peaked and flat, the cheap ones first.

    They are the same whatever the seed of the draws.
    """
    rng = np.random.default_rng(7)
    tiny = np.concatenate([[0.0], -700 - np.linspace(0, 4, 30)])
    steps = np.concatenate([[0.0, -1.0, -2.0], -700 - np.linspace(0, 3, 20), [-760, -761, -800]])
    deep = np.concatenate([[0.0], -3000 - np.linspace(0, 2.5, 12)])
    rows = [
        # name, logits, nucleus, M, share of the trials
        ("tiny vocabulary", np.log([0.4, 0.25, 0.15, 0.12, 0.08]), 1, 3, 2.0),
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


def make_large_cases(trials: int = 4_000) -> list[Case]:
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
    cases = as_cases(rows, rng, trials)
    in_blocks = Case("uneven blocks", float32_row(uneven), 3, 24, trials)
    return [*cases, in_blocks]


def as_cases(
    rows: list[tuple[str, np.ndarray, int, int, float]], rng: np.random.Generator, trials: int
) -> list[Case]:
    """Shuffle the ids of each row, so that likely tokens stand anywhere."""
    return [
        Case(name, float32_row(rng.permutation(row)), nucleus, m, int(trials * share))
        for name, row, nucleus, m, share in rows
    ]


# 2 Exact laws -------------------------------------------------------------------------------------


def tail_probs(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids outside the nucleus, likeliest first, and their probabilities among them."""
    ids = np.flatnonzero(~case.nucleus)
    ids = ids[np.argsort(-case.log_probs[ids], kind="stable")]
    log_p = case.log_probs[ids]
    p = np.exp(log_p - log_p[0])
    return ids, p / p.sum()


def inclusion_probs(log_p: np.ndarray, m: int) -> np.ndarray:
    """Return the probability of each token to be among the first m of successive sampling.

    Token i arrives at an exponential time of rate p_i; it is in when fewer than m others came
    before. Quadrature over log time; the number of others is Poisson-binomial.
    Source: Kochar and Korwar 2001, successive sampling as an exponential race.
    """
    if m >= len(log_p):
        return np.ones(len(log_p))
    step = 0.05
    result = np.empty(len(log_p))
    for i in range(len(log_p)):
        log_time = np.arange(-40, 6, step) - log_p[i]  # (T,) e^-40 of the mass lies before
        rates = np.exp(np.minimum(log_p[:, None] + log_time, 50))  # (n, T) p t
        fewer = probability_of_fewer(np.delete(-np.expm1(-rates), i, axis=0), m)
        result[i] = np.sum(rates[i] * np.exp(-rates[i]) * fewer) * step
    return result


@functools.cache
def cached_inclusion_probs(log_p: tuple[float, ...], m: int) -> tuple[float, ...]:
    return tuple(inclusion_probs(np.array(log_p), m).tolist())


def probability_of_fewer(arrived: np.ndarray, m: int) -> np.ndarray:
    """Return (T,) the probability that fewer than m of independent events (n, T) happened."""
    counts = np.zeros((m, arrived.shape[1]))
    counts[0] = 1
    for p in arrived:
        counts[1:] = counts[1:] * (1 - p) + counts[:-1] * p
        counts[0] *= 1 - p
    return counts.sum(axis=0)


def ordered_samples(p: np.ndarray, m: int) -> dict[tuple[int, ...], float]:
    """Return the probability of every ordered sample of m from a tiny vocabulary."""
    law = {}
    for order in itertools.permutations(range(len(p)), m):
        left, probability = 1.0, 1.0
        for i in order:
            probability *= p[i] / left
            left = max(left - p[i], 0.0)
        law[order] = probability
    return law


# 3 Tests of one row -------------------------------------------------------------------------------


def chi_square(counts: np.ndarray, probs: np.ndarray) -> tuple[float, int]:
    """Return χ² and its degrees of freedom; neighbours are merged until each cell expects 100."""
    total = counts.sum()
    observed, expected = [0.0], [0.0]
    for count, probability in zip(counts, probs, strict=True):
        if expected[-1] >= MIN_EXPECTED:
            observed.append(0.0)
            expected.append(0.0)
        observed[-1] += count
        expected[-1] += probability * total
    if len(expected) > 1 and expected[-1] < MIN_EXPECTED:
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    o, e = np.array(observed), np.array(expected)
    return float(((o - e) ** 2 / e).sum()), len(e) - 1


def binomial_p(counts: np.ndarray, probs: np.ndarray, trials: int) -> float:
    """Return the smallest exact two-sided p-value of the counts, times their number."""
    probs = np.clip(probs, 0.0, 1.0)
    low = stats.binom.cdf(counts, trials, probs)
    high = stats.binom.sf(counts - 1, trials, probs)
    return float(min(1.0, 2 * len(counts) * np.minimum(low, high).min()))


def first_p(p: np.ndarray, ranks: np.ndarray) -> float:
    chi2, freedom = chi_square(np.bincount(ranks[:, 0], minlength=len(p)), p)
    return float(stats.chi2.sf(chi2, freedom)) if freedom else 1.0


def second_p(p: np.ndarray, ranks: np.ndarray) -> float:
    """Add up the χ² of the second draw after each of the likeliest first draws."""
    chi2, freedom = 0.0, 0
    for first in range(min(8, len(p))):
        after = ranks[ranks[:, 0] == first, 1]
        if len(after) < 3 * MIN_EXPECTED:
            continue
        rest = p.copy()
        rest[first] = 0
        more, cells = chi_square(np.bincount(after, minlength=len(p)), rest / rest.sum())
        chi2, freedom = chi2 + more, freedom + cells
    return float(stats.chi2.sf(chi2, freedom)) if freedom else 1.0


def inclusion_p(log_p: np.ndarray, ranks: np.ndarray) -> float:
    counts = np.bincount(ranks.ravel(), minlength=len(log_p))
    probs = np.array(cached_inclusion_probs(tuple(log_p.tolist()), ranks.shape[1]))
    return binomial_p(counts, probs, len(ranks))


def joint_order_p(p: np.ndarray, ranks: np.ndarray) -> float:
    law = ordered_samples(p, ranks.shape[1])
    seen = dict.fromkeys(law, 0)
    for order in map(tuple, ranks.tolist()):
        seen[order] += 1
    return binomial_p(np.array(list(seen.values())), np.array(list(law.values())), len(ranks))


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


def uniforms_p(u: np.ndarray) -> Iterator[tuple[str, float]]:
    """Yield Kolmogorov p-values of all, first and last draws, and of pairs on an 8 × 8 grid."""
    for name, values in (("all", u.ravel()), ("first", u[:, 0]), ("last", u[:, -1])):
        yield f"uniforms, {name}", float(stats.kstest(values, "uniform").pvalue)
    cells = (u * 8).astype(int).clip(0, 7)
    pairs = [("trial to trial", cells[:-1, 0], cells[1:, 0])]
    if u.shape[1] > 1:
        pairs += [("draw to draw", cells[:, 0], cells[:, 1]), ("ends", cells[:, 0], cells[:, -1])]
    for name, a, b in pairs:
        counts = np.bincount(8 * a + b, minlength=64)
        yield f"uniforms, {name}", float(stats.chisquare(counts).pvalue)


# 4 The suite --------------------------------------------------------------------------------------


def ranks_of(case: Case, drawn: np.ndarray) -> np.ndarray:
    """Return the draws as ranks among the tail's tokens; a token of the nucleus or twice raises."""
    ids, _ = tail_probs(case)
    rank = np.full(len(case.log_probs), -1)
    rank[ids] = np.arange(len(ids))
    wanted = (case.trials, case.sampled_n)
    if drawn.shape != wanted:
        raise LawViolation(f"{case.name}: drew {drawn.shape}, not {wanted}")
    if drawn.min() < 0 or drawn.max() >= len(rank):
        raise LawViolation(f"{case.name}: ids from {drawn.min()} to {drawn.max()}")
    ranks = rank[drawn]
    if (ranks < 0).any():
        raise LawViolation(f"{case.name}: drew a token of the nucleus")
    ordered = np.sort(ranks, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise LawViolation(f"{case.name}: drew a token twice")
    return ranks


def outcomes(case: Case, draw: Draw, seed: int) -> Iterator[Outcome]:
    """Draw and yield the p-value of every test that suits the row."""
    drawn = draw(case.log_probs, case.nucleus, case.sampled_n, case.trials, seed)
    ranks = ranks_of(case, np.asarray(drawn).astype(np.int64))
    ids, p = tail_probs(case)
    log_p = case.log_probs[ids] - case.log_probs[ids[0]] + math.log(p[0])
    yield Outcome(case.name, "first draw", first_p(p, ranks))
    if case.sampled_n > 1:
        yield Outcome(case.name, "second given first", second_p(p, ranks))
    if len(ids) <= 64:
        yield Outcome(case.name, "inclusion", inclusion_p(log_p, ranks))
    if len(ids) <= 5:
        yield Outcome(case.name, "joint order", joint_order_p(p, ranks))
    for name, p_value in uniforms_p(uniforms(log_p, ranks, seed)):
        yield Outcome(case.name, name, p_value)


def check_tail_law(draw: Draw, *, cases: list[Case] | None = None, seed: int = 1) -> list[Outcome]:
    """Require that `draw` follows the law on every row; return all outcomes.

    Raises:
        LawViolation: with the row, the test and the p-value, at the first test that fails;
            once in 1e6 for a right sampler.
    """
    cases = [*make_cases(), *make_large_cases()] if cases is None else cases
    threshold = FALSE_ALARM / (MAX_TESTS * len(cases))
    found = []
    for k, case in enumerate(cases):
        for outcome in outcomes(case, draw, 1000 * seed + k):
            if not outcome.p_value >= threshold:
                raise LawViolation(
                    f"{case.name}: {outcome.test} fails, p = {outcome.p_value:.3g}", outcome.p_value
                )
            found.append(outcome)
    return found

"""The tail's statistical tests pass a right sampler and reject samplers with the usual mistakes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tail_law
from tail_law import Case, LawViolation, check_tail_law


def exponential_race(
    log_probs: np.ndarray, nucleus: np.ndarray, m: int, n_trials: int, seed: int,
    *, scale: float = 1.0,
) -> np.ndarray:  # fmt: skip
    """Draw by the Gumbel-max trick in float64, a thousand trials at a time."""
    rng = np.random.default_rng(seed)
    found = []
    for start in range(0, n_trials, 1000):
        shape = (min(1000, n_trials - start), len(log_probs))
        keys = log_probs + scale * rng.gumbel(size=shape)
        keys[:, nucleus] = -np.inf
        found.append(first_of(keys, m))
    return np.concatenate(found)


def first_of(keys: np.ndarray, m: int) -> np.ndarray:
    """Return the ids of the m largest keys of each row, largest first."""
    m_or_all = min(m, keys.shape[1] - 1)
    some = np.argpartition(-keys, m_or_all, axis=1)[:, : m_or_all + 1]
    order = np.argsort(-np.take_along_axis(keys, some, axis=1), axis=1)[:, :m]
    return np.take_along_axis(some, order, axis=1)


def one_by_one(
    log_probs: np.ndarray, nucleus: np.ndarray, m: int, n_trials: int, seed: int
) -> np.ndarray:
    """Draw by the words of the law: one, take it away, renormalise, again."""
    rng = np.random.default_rng(seed)
    left = np.tile(np.where(nucleus, -np.inf, log_probs), (n_trials, 1))
    drawn = np.empty((n_trials, m), dtype=np.int64)
    for j in range(m):
        weights = np.exp(left - left.max(axis=1, keepdims=True)).cumsum(axis=1)
        at = rng.random(n_trials) * weights[:, -1]
        drawn[:, j] = (weights <= at[:, None]).sum(axis=1)
        left[np.arange(n_trials), drawn[:, j]] = -np.inf
    return drawn


SMALL = tail_law.make_cases()
LARGE = tail_law.make_large_cases(1200)


def check_counts(outcomes: list[tail_law.Outcome], cases: list[Case]) -> None:
    """Require that every row was tested, within the number of tests that Bonferroni assumes."""
    for case in cases:
        tests = [outcome for outcome in outcomes if outcome.case == case.name]
        assert 5 <= len(tests) <= tail_law.MAX_TESTS


def test_sampling_one_by_one_passes() -> None:
    check_counts(check_tail_law(one_by_one, cases=SMALL), SMALL)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_gumbel_max_trick_passes(seed: int) -> None:
    check_counts(check_tail_law(exponential_race, cases=SMALL, seed=seed), SMALL)


def test_the_gumbel_max_trick_passes_on_large_rows() -> None:
    check_counts(check_tail_law(exponential_race, cases=LARGE), LARGE)


def test_p_values_of_a_right_sampler_are_spread_evenly() -> None:
    """The χ² and the exact tests alike; the fractions have a standard error of about 0.02."""
    cases = [case for case in tail_law.make_cases(3000) if len(case.log_probs) <= 31]
    runs = [check_tail_law(exponential_race, cases=cases, seed=seed) for seed in range(5)]
    p_values = np.array([o.p_value for run in runs for o in run if o.test != "inclusion"])
    assert len(p_values) > 200
    assert 0.35 < (p_values < 0.5).mean() < 0.65
    assert (p_values < 0.01).mean() < 0.05


# --------------------------------------------------------------------------------------------------
# Exact laws against enumeration
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_inclusion_probabilities_agree_with_enumeration(m: int) -> None:
    p = np.array([0.55, 0.3, 0.1, 0.0499, 0.0001])
    enumerated = np.zeros(5)
    for order, probability in tail_law.ordered_samples(p, m).items():
        enumerated[list(order)] += probability
    np.testing.assert_allclose(tail_law.inclusion_probs(np.log(p), m), enumerated, atol=1e-9)


def test_both_ways_to_make_uniforms_agree() -> None:
    case = SMALL[-1]
    drawn = exponential_race(case.log_probs, case.nucleus, case.sampled_n, 500, 3)
    case = Case(case.name, case.log_probs, case.nucleus_n, case.sampled_n, 500)
    _, p = tail_law.tail_probs(case)
    ranks = tail_law.ranks_of(case, drawn)
    small = tail_law.uniforms_afresh(np.log(p), ranks, np.random.default_rng(4))
    large = tail_law.uniforms_by_difference(p, ranks, np.random.default_rng(4))
    np.testing.assert_allclose(small, large, atol=1e-9)


# --------------------------------------------------------------------------------------------------
# Power: each of these has been written in earnest somewhere
# --------------------------------------------------------------------------------------------------


def with_replacement(*args: Any) -> np.ndarray:
    log_probs, nucleus, m, n_trials, seed = args
    rng = np.random.default_rng(seed)
    weights = np.exp(np.where(nucleus, -np.inf, log_probs - log_probs[~nucleus].max()))
    return rng.choice(len(weights), size=(n_trials, m), p=weights / weights.sum())


def with_replacement_repeats_filled_uniformly(*args: Any) -> np.ndarray:
    drawn = with_replacement(*args)
    others = np.tile(np.flatnonzero(~args[1]), (len(drawn), 1))
    fill = np.random.default_rng(args[-1] + 1).permuted(others, axis=1)
    rows = np.concatenate([drawn, fill], axis=1).tolist()
    return np.array([list(dict.fromkeys(row))[: args[2]] for row in rows])


def underflow_in_float32(*args: Any) -> np.ndarray:
    """Race with clocks Exp / p where p is float32: exp(-700) is 0 and its clock never rings."""
    log_probs, nucleus, m, n_trials, seed = args
    rng = np.random.default_rng(seed)
    with np.errstate(divide="ignore", under="ignore"):
        clocks = rng.exponential(size=(n_trials, len(log_probs))) / np.exp(np.float32(log_probs))
    clocks[:, nucleus] = np.inf
    order = np.argsort(clocks + np.where(nucleus, np.inf, 0), axis=1, kind="stable")
    finite_last = order[:, : len(log_probs) - nucleus.sum()]
    return np.where(nucleus[finite_last], np.flatnonzero(~nucleus)[-1], finite_last)[:, :m]


def floor_at_1e_38(*args: Any) -> np.ndarray:
    """Clamp probabilities away from zero, as in log(p + tiny): the unlikely become equal."""
    return exponential_race(args[0].clip(min=-87.5), *args[1:])


def sorted_by_probability(*args: Any) -> np.ndarray:
    drawn = exponential_race(*args)
    order = np.argsort(-args[0][drawn], axis=1, kind="stable")
    return np.take_along_axis(drawn, order, axis=1)


def sorted_by_id(*args: Any) -> np.ndarray:
    return np.sort(exponential_race(*args), axis=1)


def last_drawn_first(*args: Any) -> np.ndarray:
    return exponential_race(*args)[:, ::-1]


def gumbel_of_scale(scale: float) -> tail_law.Draw:
    return lambda *args: exponential_race(*args, scale=scale)


def normal_instead_of_gumbel(*args: Any) -> np.ndarray:
    log_probs, nucleus, m, n_trials, seed = args
    keys = log_probs + 1.2825 * np.random.default_rng(seed).normal(size=(n_trials, len(log_probs)))
    keys[:, nucleus] = -np.inf
    return first_of(keys, m)


def not_renormalised(*args: Any) -> np.ndarray:
    """Draw from what is left with the old sum: the missing mass falls to the last token left."""
    log_probs, nucleus, m, n_trials, seed = args
    rng = np.random.default_rng(seed)
    weights = np.exp(np.where(nucleus, -np.inf, log_probs - log_probs[~nucleus].max()))
    left = np.tile(weights / weights.sum(), (n_trials, 1))
    open_ = np.tile(~nucleus, (n_trials, 1))
    drawn = np.empty((n_trials, m), dtype=np.int64)
    rows = np.arange(n_trials)
    for j in range(m):
        at = (left.cumsum(axis=1) <= rng.random(n_trials)[:, None]).sum(axis=1)
        last = len(weights) - 1 - open_[:, ::-1].argmax(axis=1)
        drawn[:, j] = np.where(at < len(weights), at, last)
        left[rows, drawn[:, j]] = 0
        open_[rows, drawn[:, j]] = False
    return drawn


def one_noise_for_all_trials(*args: Any) -> np.ndarray:
    log_probs, nucleus, m, n_trials, seed = args
    return np.tile(exponential_race(log_probs, nucleus, m, 1, seed), (n_trials, 1))


def noise_shared_by_neighbouring_trials(*args: Any) -> np.ndarray:
    log_probs, nucleus, m, n_trials, seed = args
    half = exponential_race(log_probs, nucleus, m, (n_trials + 1) // 2, seed)
    return np.repeat(half, 2, axis=0)[:n_trials]


def noise_shared_by_neighbouring_ids(*args: Any) -> np.ndarray:
    log_probs, nucleus, m, n_trials, seed = args
    rng = np.random.default_rng(seed)
    noise = np.repeat(rng.gumbel(size=(n_trials, (len(log_probs) + 1) // 2)), 2, axis=1)
    keys = log_probs + noise[:, : len(log_probs)]
    keys[:, nucleus] = -np.inf
    return first_of(keys, m)


def uniform_outside_the_nucleus(*args: Any) -> np.ndarray:
    return exponential_race(np.zeros_like(args[0]), *args[1:])


def bf16_log_probs(*args: Any) -> np.ndarray:
    bits = args[0].astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return exponential_race(rounded.astype(np.float64), *args[1:])


def first_repeat_ends_the_race(*args: Any) -> np.ndarray:
    """Drop repeats of 40 draws with replacement, then fill up with the likeliest of the rest."""
    drawn = with_replacement(args[0], args[1], 40, args[3], args[4])
    by_rank = np.argsort(-np.where(args[1], -np.inf, args[0]))[:64]
    fill = np.tile(by_rank, (len(drawn), 1))
    rows = np.concatenate([drawn, fill], axis=1).tolist()
    return np.array([list(dict.fromkeys(row))[: args[2]] for row in rows])


def the_likeliest(*args: Any) -> np.ndarray:
    keys = np.where(args[1], -np.inf, args[0])
    return np.tile(first_of(keys[None], args[2]), (args[3], 1))


def nucleus_not_left_out(*args: Any) -> np.ndarray:
    return exponential_race(args[0], np.zeros_like(args[1]), *args[2:])


@pytest.mark.parametrize(
    "draw",
    [
        with_replacement, with_replacement_repeats_filled_uniformly, underflow_in_float32,
        floor_at_1e_38, sorted_by_probability, sorted_by_id, last_drawn_first,
        gumbel_of_scale(0.96), gumbel_of_scale(1.04), normal_instead_of_gumbel, not_renormalised,
        one_noise_for_all_trials, noise_shared_by_neighbouring_trials,
        noise_shared_by_neighbouring_ids, uniform_outside_the_nucleus, bf16_log_probs,
        the_likeliest, nucleus_not_left_out,
    ],
)  # fmt: skip
def test_a_biased_sampler_is_rejected_at_both_seeds(draw: tail_law.Draw) -> None:
    for seed in (1, 2):
        with pytest.raises(LawViolation):
            check_tail_law(draw, cases=SMALL, seed=seed)


@pytest.mark.parametrize(
    "draw",
    [
        gumbel_of_scale(0.9), gumbel_of_scale(1.1), sorted_by_id, underflow_in_float32,
        floor_at_1e_38, first_repeat_ends_the_race,
    ],
)  # fmt: skip
def test_a_biased_sampler_is_rejected_on_large_rows(draw: tail_law.Draw) -> None:
    with pytest.raises(LawViolation):
        check_tail_law(draw, cases=LARGE)


def test_tiny_rows_alone_reject_what_underflows() -> None:
    tiny = [case for case in SMALL if "exp(-" in case.name]
    assert len(tiny) == 3
    for case in tiny:
        with pytest.raises(LawViolation):
            check_tail_law(underflow_in_float32, cases=[case])
        with pytest.raises(LawViolation):
            check_tail_law(floor_at_1e_38, cases=[case])

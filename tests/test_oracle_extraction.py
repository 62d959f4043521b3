"""Extraction against the oracle: token by token, and the law of its tail.

Both implementations that the script holds, fast and reference, on logits of every kind, from
vocabularies of 300 to 262,144.
"""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import tail_law
import torch

from extract_logits import ExtractedTokens, extract_tokens

EXACT = 1e-12  # the reference implementation sums in float64
BOTH = pytest.mark.parametrize("reference", [False, True], ids=["fast", "reference"])
SIZES = [300, 32_000, 70_000, 151_936, 262_144]


def make_logits(vocab_size: int, *, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return (9, V) logits: natural, sure, torn, flat, tied, masked and extreme rows."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(9, vocab_size, generator=generator)
    ranks = torch.arange(vocab_size).float()
    zipf = -1.2 * torch.log1p(ranks)[torch.randperm(vocab_size, generator=generator)]
    x = torch.stack([
        zipf + 0.3 * noise[0],
        3 * noise[1],
        zipf + 20 * (ranks == vocab_size - 1),  # sure of the highest id
        0.01 * noise[3],
        torch.full((vocab_size,), -3.5),  # all equal
        torch.round(2 * noise[5]),  # ties everywhere
        torch.where(noise[6] > 0, 4 * noise[6], -torch.inf),
        40 * noise[7] - 300,
        torch.where(ranks % 97 == 5, 5.0, -80.0) + 0.1 * noise[8],
    ])  # fmt: skip
    return x.to(dtype)


def extract(
    logits: torch.Tensor, *, top_p: float = 0.98, top_p_max: int = 100, sampled_n: int = 24,
    seed: int = 42, reference: bool = False, positions: torch.Tensor | None = None,
) -> ExtractedTokens:  # fmt: skip
    n = len(logits)
    positions = torch.arange(1, n + 1) if positions is None else positions
    index = torch.full((n,), 17, dtype=torch.int64)
    return extract_tokens(
        logits, index, positions, top_p=top_p, top_p_max=top_p_max, sampled_n=sampled_n, seed=seed,
        reference=reference,
    )  # fmt: skip


def check_against_oracle(
    logits: torch.Tensor, found: ExtractedTokens, settings: oracle.Settings
) -> float:
    """Compare ids, order, values and log-sum-exp of each row; return the largest |Δ lse|."""
    assert found.usable.all()
    worst = 0.0
    for t, row in enumerate(logits.double().numpy()):
        right = oracle.oracle_token(row, settings.top_p, settings.top_p_max)
        count = int(found.top_counts[t])
        assert found.top_ids[t, :count].tolist() == right.nucleus, f"row {t}"
        assert found.top_logits[t, :count].tolist() == row[right.nucleus].tolist(), f"row {t}"
        tail = found.sampled_ids[t].tolist()
        assert len(set(tail)) == settings.sampled_n, f"row {t}"
        assert not set(tail) & set(right.nucleus), f"row {t}"
        assert 0 <= min(tail, default=0) <= max(tail, default=0) < len(row), f"row {t}"
        assert found.sampled_logits[t].tolist() == row[tail].tolist(), f"row {t}"
        assert np.isfinite(row[tail]).all(), f"row {t}"
        worst = max(worst, abs(float(found.logsumexp[t]) - right.logsumexp))
    return worst


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", SIZES)
def test_every_token_is_the_oracles(vocab_size: int, dtype: torch.dtype, reference: bool) -> None:
    logits = make_logits(vocab_size, dtype=dtype)
    found = extract(logits, reference=reference)
    worst = check_against_oracle(logits, found, oracle.Settings())
    assert worst <= (EXACT if reference else oracle.SAME_LOGITS.logsumexp)


@BOTH
@pytest.mark.parametrize(
    ("top_p", "top_p_max", "sampled_n"),
    [
        (0.98, 1, 24), (0.5, 255, 0), (1.0, 100, 1), (1e-6, 100, 24), (0.9, 255, 40),
        (0.999999, 7, 3),
    ],
)  # fmt: skip
def test_other_settings_are_the_oracles(
    top_p: float, top_p_max: int, sampled_n: int, reference: bool
) -> None:
    for vocab_size in (300, 20_000):
        logits = make_logits(vocab_size, dtype=torch.float32, seed=3)
        found = extract(
            logits, top_p=top_p, top_p_max=top_p_max, sampled_n=sampled_n, reference=reference
        )
        settings = oracle.Settings(top_p, top_p_max, sampled_n)
        worst = check_against_oracle(logits, found, settings)
        assert worst <= (EXACT if reference else oracle.SAME_LOGITS.logsumexp)


@BOTH
@pytest.mark.parametrize("vocab_size", [300, 1000, 70_000])
def test_the_nucleus_includes_the_token_that_crosses_top_p(
    vocab_size: int, reference: bool
) -> None:
    """Probabilities 1/2, 1/4, 1/8, …: two tokens hold 0.75, and a hair more needs a third."""
    places = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(1))[:11]
    row = torch.full((1, vocab_size), -torch.inf)
    row[0, places] = torch.tensor([*range(-1, -11, -1), -10]) * np.log(2)
    for top_p, count in ((0.75 - 1e-6, 2), (0.75 + 1e-6, 3)):
        found = extract(row, top_p=top_p, top_p_max=8, sampled_n=2, reference=reference)
        check_against_oracle(row, found, oracle.Settings(top_p, 8, 2))
        assert int(found.top_counts[0]) == count


@BOTH
@pytest.mark.parametrize("vocab_size", [300, 70_000])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_row_with_nan_or_infinity_is_flagged_and_no_other(
    vocab_size: int, poison: float, reference: bool
) -> None:
    logits = make_logits(vocab_size, dtype=torch.float32)
    clean = extract(logits, reference=reference)
    poisoned = logits.clone()
    poisoned[1, vocab_size // 2] = poison
    poisoned[5, 0] = poison
    poisoned[7, vocab_size - 1] = poison
    found = extract(poisoned, reference=reference)
    good = [0, 2, 3, 4, 6, 8]
    assert found.usable.nonzero()[:, 0].tolist() == good
    for name in ("top_ids", "top_counts", "sampled_ids", "logsumexp"):
        assert torch.equal(getattr(found, name)[good], getattr(clean, name)[good])


@BOTH
def test_logits_are_not_modified(reference: bool) -> None:
    logits = make_logits(32_000, dtype=torch.float32)
    before = logits.clone()
    extract(logits, reference=reference)
    assert torch.equal(logits, before)


# --------------------------------------------------------------------------------------------------
# The tail
# --------------------------------------------------------------------------------------------------


def settings_for(case_probs: np.ndarray, count: int, m: int, *, loose: bool) -> tuple[float, int]:
    """Return top_p and K that make the `count` likeliest tokens the nucleus.

    A loose cap leaves likely tokens between the nucleus and the cap, a tight one leaves none.
    """
    if not loose:
        return 1.0, count
    p = np.sort(np.exp(case_probs))[::-1]
    held = np.concatenate([[0.0], p.cumsum()])
    return float(held[count - 1] + held[count]) / 2, min(100, len(p) - m)


def sampler(*, reference: bool, loose: bool = False, vary: str = "position") -> tail_law.Draw:
    """Return extraction as a tail sampler; a trial is another position or another index."""

    def draw(
        log_probs: np.ndarray, nucleus: np.ndarray, m: int, n_trials: int, seed: int
    ) -> np.ndarray:
        row, count = torch.from_numpy(log_probs).float(), int(nucleus.sum())
        top_p, cap = settings_for(log_probs, count, m, loose=loose)
        parts, rows_n = [], max(1, 4_000_000 // len(row))
        for start in range(0, n_trials, rows_n):
            trial = torch.arange(start, min(start + rows_n, n_trials))
            still = torch.full_like(trial, 5)
            found = extract_tokens(
                row.expand(len(trial), -1),
                trial if vary == "index" else still,
                trial if vary == "position" else still,
                top_p=top_p, top_p_max=cap, sampled_n=m, seed=seed, reference=reference,
            )  # fmt: skip
            assert (found.top_counts == count).all()
            assert set(found.top_ids[0, :count].tolist()) == set(np.flatnonzero(nucleus).tolist())
            parts.append(found.sampled_ids.numpy())
        return np.concatenate(parts)

    return draw


@pytest.mark.parametrize("loose", [False, True], ids=["tight cap", "loose cap"])
@pytest.mark.parametrize("large", [False, True], ids=["small rows", "large rows"])
def test_the_fast_tail_follows_the_law(large: bool, loose: bool) -> None:
    """One false alarm in 1e6 seeds; this seed is fixed."""
    trials = 5_000 if loose else 10_000
    cases = tail_law.make_large_cases(2500) if large else tail_law.make_cases(trials)
    tail_law.check_tail_law(sampler(reference=False, loose=loose), cases=cases)


def test_the_reference_tail_follows_the_law() -> None:
    cases = [*tail_law.make_cases(10_000), *tail_law.make_large_cases(600)]
    tail_law.check_tail_law(sampler(reference=True), cases=cases)


@BOTH
def test_trials_of_neighbouring_conversations_are_independent(reference: bool) -> None:
    cases = [*tail_law.make_cases(2000), tail_law.make_large_cases(500)[0]]
    tail_law.check_tail_law(sampler(reference=reference, vary="index"), cases=cases)


@BOTH
def test_trials_of_neighbouring_seeds_are_independent(reference: bool) -> None:
    """Seeds 0, 1, 2, … at one position are as good as positions at one seed."""
    cases = [c for c in tail_law.make_cases(500) if c.name in ("peaked", "tiny vocabulary")]

    def draw(
        log_probs: np.ndarray, nucleus: np.ndarray, m: int, n_trials: int, seed: int
    ) -> np.ndarray:
        row, cap = torch.from_numpy(log_probs).float()[None], int(nucleus.sum())
        found = [
            extract(row, top_p=1.0, top_p_max=cap, sampled_n=m, seed=s, reference=reference)
            for s in range(n_trials)
        ]
        return torch.cat([tokens.sampled_ids for tokens in found]).numpy()

    tail_law.check_tail_law(draw, cases=cases)


@BOTH
@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_the_tail_depends_on_seed_index_and_position_alone(
    vocab_size: int, reference: bool
) -> None:
    logits = make_logits(vocab_size, dtype=torch.float32)
    positions = torch.tensor([5, 9, 9, 2, 70_000, 1, 3, 4, 2**31 - 1])
    whole = extract(logits, positions=positions, reference=reference)
    order = [8, 3, 0, 5]
    some = extract(logits[order], positions=positions[order], reference=reference)
    for name in ("sampled_ids", "top_ids", "top_counts", "logsumexp"):
        assert torch.equal(getattr(whole, name)[order], getattr(some, name)), name
    for t in range(len(logits)):
        alone = extract(logits[t : t + 1], positions=positions[t : t + 1], reference=reference)
        assert torch.equal(alone.sampled_ids[0], whole.sampled_ids[t])


@BOTH
@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_another_seed_index_or_position_is_another_tail(vocab_size: int, reference: bool) -> None:
    row = make_logits(vocab_size, dtype=torch.float32)[3:4].expand(4, -1)  # flat
    index, position = torch.tensor([1, 1, 2, 2]), torch.tensor([1, 2, 1, 2])
    drawn = [
        tuple(ids)
        for seed in (0, 1, 2**63 - 1)
        for ids in extract_tokens(
            row, index, position, top_p=0.5, top_p_max=10, sampled_n=24, seed=seed,
            reference=reference,
        ).sampled_ids.tolist()
    ]  # fmt: skip
    assert len(set(drawn)) == 12


@BOTH
def test_a_change_of_one_unlikely_logit_leaves_the_other_draws_alone(reference: bool) -> None:
    """Numbers belong to vocabulary ids: a small change does not reshuffle the race."""
    row = make_logits(300, dtype=torch.float32)[1:2]
    changed = row.clone()
    changed[0, int(row[0].argmin())] -= 1.0
    same = sum(
        torch.equal(
            extract(row, seed=s, reference=reference).sampled_ids,
            extract(changed, seed=s, reference=reference).sampled_ids,
        )
        for s in range(40)
    )
    assert same >= 36

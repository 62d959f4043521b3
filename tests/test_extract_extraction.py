"""Extraction: nucleus, tail, log-sum-exp and quantized values of a row are what they say.

Random tests are seeded, so they give the same answer every time; each says how often a fresh seed
would raise a false alarm.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import extract_logits as el
from explore_logits import quantize_logits

PATHS = pytest.mark.parametrize("reference", [True, False], ids=["reference", "fast"])


def extract(logits: torch.Tensor, **options: Any) -> el.ExtractedTokens:
    rows = torch.arange(logits.shape[0])
    settings = {"top_p": 0.98, "top_p_max": 100, "sampled_n": 24, "seed": 42, **options}
    settings.setdefault("index", rows // 7)
    settings.setdefault("position", rows % 7 + 1)
    return el.extract_tokens(logits, settings.pop("index"), settings.pop("position"), **settings)


def trained_like(
    rows: int, vocab: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Rows from sure to torn: the best logits fall off as a power of their rank."""
    rng = np.random.default_rng(seed)
    slope = rng.uniform(0.5, 6.0, (rows, 1))
    ranked = -slope * np.log1p(np.arange(vocab)) + rng.normal(0, 0.5, (rows, vocab))
    return torch.from_numpy(rng.permuted(ranked, axis=1) + 20).to(dtype)


def rowwise_definition(row: torch.Tensor, top_p: float, k: int) -> tuple[float, list[int], int]:
    """The definition in plain floats: log-sum-exp, ids in canonical order, nucleus size."""
    x = row.double().numpy()
    order = np.lexsort((np.arange(x.size), -x))
    total = math.fsum(np.exp(x - x.max()))
    logsumexp = float(x.max() + math.log(total))
    size, mass = 0, 0.0
    while size < min(k, x.size) and mass < top_p:
        mass += math.exp(x[order[size]] - logsumexp)
        size += 1
    return logsumexp, order[:k].tolist(), size


CASES = {
    "trained_multiple_of_64": lambda: trained_like(24, 6400),
    "trained_not_multiple_of_64": lambda: trained_like(24, 5021),
    "trained_bfloat16": lambda: trained_like(24, 5021, dtype=torch.bfloat16),
    "trained_float16": lambda: trained_like(24, 6400, dtype=torch.float16),
    "small_vocabulary": lambda: trained_like(24, 300),
    "just_enough_vocabulary": lambda: trained_like(24, 124),
    "flat": lambda: torch.zeros(6, 4000),
    "nearly_flat": lambda: trained_like(6, 4000) * 1e-4,
    "ties": lambda: trained_like(12, 5021).mul(4).round() / 4,
    "two_levels": lambda: (trained_like(6, 2000) > 8).float() * 5,
    "minus_infinity": lambda: masked_rows(),
    "tiny_tail": lambda: peaked_rows(700.0),
    "underflowing_tail": lambda: peaked_rows(3000.0),
    "staircase": lambda: -100.0 * torch.arange(500.0).repeat(4, 1),
    "huge": lambda: trained_like(6, 2000) * 1e6,
}


def masked_rows() -> torch.Tensor:
    logits = trained_like(12, 5021)
    for row in range(12):
        logits[row, row::3] = -math.inf
        logits[row, 128:448] = -math.inf
    return logits


def peaked_rows(depth: float) -> torch.Tensor:
    """One sure token; the rest, all alike in size, lie `depth` below it."""
    logits = trained_like(8, 5021) * 0.1 - depth
    logits[torch.arange(8), torch.arange(8) * 600] = 10.0
    return logits


@pytest.fixture(params=sorted(CASES))
def logits(request: pytest.FixtureRequest) -> torch.Tensor:
    return CASES[request.param]()


@PATHS
@pytest.mark.parametrize("top_p", [0.5, 0.98])
def test_nucleus_and_logsumexp_follow_the_definition(
    logits: torch.Tensor, top_p: float, reference: bool
) -> None:
    got = extract(logits, top_p=top_p, reference=reference)
    assert got.usable.all()
    for row in range(logits.shape[0]):
        logsumexp, ids, size = rowwise_definition(logits[row], top_p, 100)
        assert got.logsumexp[row].item() == pytest.approx(logsumexp, rel=1e-14, abs=5e-9)
        assert got.top_counts[row] == size
        assert got.top_ids[row, :size].tolist() == ids[:size]
        assert torch.equal(got.top_logits[row, :size], logits[row, ids[:size]].float())


@PATHS
def test_tail_is_distinct_possible_and_outside_the_nucleus(
    logits: torch.Tensor, reference: bool
) -> None:
    got = extract(logits, reference=reference)
    for row in range(logits.shape[0]):
        tail = got.sampled_ids[row].tolist()
        nucleus = got.top_ids[row, : got.top_counts[row]].tolist()
        assert len(set(tail) | set(nucleus)) == len(tail) + len(nucleus)
        assert min(tail) >= 0
        assert max(tail) < logits.shape[1]
        assert torch.equal(got.sampled_logits[row], logits[row, tail].float())
        assert torch.isfinite(got.sampled_logits[row]).all()


@PATHS
def test_entries_beyond_the_count_are_finite(logits: torch.Tensor, reference: bool) -> None:
    got = extract(logits, reference=reference)
    assert torch.isfinite(got.top_logits).all()
    assert int(got.top_ids.min()) >= 0
    assert int(got.top_ids.max()) < logits.shape[1]


@PATHS
def test_a_row_gives_the_same_alone_in_any_batch_and_in_any_order(reference: bool) -> None:
    logits = trained_like(40, 5021)
    whole = extract(logits, reference=reference)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(40)
    shuffled = extract(
        logits[order], index=(rows // 7)[order], position=(rows % 7 + 1)[order], reference=reference
    )
    one = extract(
        logits[17:18], index=(rows // 7)[17:18], position=(rows % 7 + 1)[17:18], reference=reference
    )
    for name in ("logsumexp", "top_ids", "top_counts", "sampled_ids", "sampled_logits"):
        assert torch.equal(getattr(whole, name)[order], getattr(shuffled, name)), name
        assert torch.equal(getattr(whole, name)[17:18], getattr(one, name)), name


@PATHS
@pytest.mark.parametrize("changed", [{"seed": 43}, {"index": 4}, {"position": 4}])
def test_seed_index_and_position_each_change_the_tail(
    changed: dict[str, int], reference: bool
) -> None:
    logits = torch.zeros(1, 5021)
    base = {"seed": 42, "index": 3, "position": 3}
    tails = []
    for keys in (base, {**base, **changed}):
        got = extract(
            logits,
            reference=reference,
            seed=keys["seed"],
            index=torch.tensor([keys["index"]]),
            position=torch.tensor([keys["position"]]),
        )
        tails.append(got.sampled_ids[0].tolist())
    assert len(set(tails[0]) & set(tails[1])) < 12  # 24 of 5,021: 12 in common has chance 1e-20


@PATHS
def test_the_largest_seed_index_and_position_are_allowed(reference: bool) -> None:
    big = torch.tensor([2**31 - 1])
    got = extract(torch.zeros(1, 700), seed=2**63 - 1, index=big, position=big, reference=reference)
    assert got.usable.all()


@PATHS
def test_without_tail_samples_the_lists_are_empty(reference: bool) -> None:
    got = extract(trained_like(5, 700), sampled_n=0, reference=reference)
    assert got.sampled_ids.shape == got.sampled_logits.shape == (5, 0)
    assert got.usable.all()


@PATHS
def test_a_nucleus_cap_above_the_vocabulary_pads(reference: bool) -> None:
    got = extract(trained_like(5, 90), top_p_max=120, sampled_n=0, top_p=1.0, reference=reference)
    assert got.top_ids.shape == (5, 120)
    assert got.top_counts.tolist() == [90] * 5


@PATHS
def test_more_tail_samples_than_the_vocabulary_leaves_are_refused(reference: bool) -> None:
    with pytest.raises(el.ConfigError, match=r"--sampled-n 24 .* 23 tokens that --top-p-max 100"):
        extract(torch.zeros(1, 123), reference=reference)


@PATHS
def test_top_p_of_one_keeps_every_possible_token_up_to_the_cap(reference: bool) -> None:
    logits = torch.full((3, 400), -math.inf)
    logits[0] = -torch.arange(400.0)  # sums to 1 in float64 after 37 tokens
    logits[1, :50] = -torch.arange(50.0)
    logits[2, ::4] = 0.0
    got = extract(logits, top_p=1.0, sampled_n=0, reference=reference)
    assert got.top_counts.tolist() == [100, 50, 100]
    assert got.top_ids[0].tolist() == list(range(100))


@PATHS
def test_exact_ties_at_top_p_take_the_shorter_prefix(reference: bool) -> None:
    got = extract(torch.full((1, 124), 3.7), top_p=0.5, reference=reference)
    assert got.top_counts.tolist() == [62]


@PATHS
def test_unusable_rows_are_flagged_and_leave_the_others_alone(reference: bool) -> None:
    clean = trained_like(8, 5021)
    broken = clean.clone()
    broken[1, 77] = math.nan
    broken[2, 5000] = math.inf
    broken[4] = -math.inf
    broken[5, 123:] = -math.inf  # 123 possible tokens: a capped nucleus leaves 23
    broken[5, :123] = 0.0
    broken[7] = math.nan
    want, got = extract(clean, reference=reference), extract(broken, reference=reference)
    assert got.usable.tolist() == [True, False, False, True, False, False, True, False]
    assert torch.isfinite(got.logsumexp).tolist() == [
        True,
        False,
        False,
        True,
        False,
        True,
        True,
        False,
    ]
    for row in (0, 3, 6):
        assert torch.equal(got.sampled_ids[row], want.sampled_ids[row])
        assert torch.equal(got.top_ids[row], want.top_ids[row])
    for ids in (got.top_ids, got.sampled_ids):
        assert 0 <= int(ids.min()) <= int(ids.max()) < 5021
    assert torch.isfinite(got.top_logits).all()
    assert torch.isfinite(got.sampled_logits).all()
    assert int(got.top_counts.min()) >= 1


@PATHS
def test_the_last_possible_tokens_are_all_drawn(reference: bool) -> None:
    logits = torch.full((4, 900), -math.inf)
    logits[:, 100:224] = 0.0
    got = extract(logits, reference=reference)  # nucleus 100, so the tail takes all 24 others
    assert got.usable.all()
    for row in range(4):
        chosen = sorted(got.top_ids[row].tolist() + got.sampled_ids[row].tolist())
        assert chosen == list(range(100, 224))


@PATHS
def test_logits_are_never_modified(reference: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = trained_like(9, 5021, dtype=dtype)
        before = logits.clone()
        extract(logits, reference=reference)
        assert torch.equal(logits, before)


@PATHS
def test_rows_that_are_not_contiguous_are_read_right(reference: bool) -> None:
    wide = trained_like(9, 6000)
    got, want = (
        extract(wide[::2, :5021], reference=reference),
        extract(wide[::2, :5021].contiguous(), reference=reference),
    )
    assert torch.equal(got.sampled_ids, want.sampled_ids)
    assert torch.equal(got.top_ids, want.top_ids)


# The law of the tail: every ordered draw as often as sequential sampling without replacement says.
# Each test compares 336 kinds of draws by chi-square and alarms below 1e-7, so a fresh seed would
# raise a false alarm in one run of these sixteen in a million.

TAIL_IDS = [0, 5, 63, 64, 70, 130, 131, 190]  # of four blocks, the last ragged; nucleus: 66
TAIL_LOGITS = {
    "flat": [0.0] * 8,
    "graded": [0.4 * i for i in range(8)],
    "torn": [0.0, 3.0, -1.0, 3.0, 0.5, 2.9, 1.0, -0.5],
    "tiny": [-700.0 - 0.3 * i for i in range(8)],
    "underflowing": [-5000.0 + 0.3 * i for i in range(8)],
    "beside_others_that_underflow": [-900.0 + 0.3 * i for i in range(7)] + [-2.0],
    "float16_range": [-60000.0] * 5 + [-60000.5, -59999.5, -60001.0],
    "one_block": [0.0, 0.7, -0.5] + [-math.inf] * 5,
}


def draw_probabilities(logits: list[float], draws: int) -> dict[tuple[int, ...], float]:
    """Probability of each ordered draw without replacement, by successive softmax."""
    ordered = {}
    possible = [i for i, x in enumerate(logits) if x > -math.inf]
    for draw in itertools.permutations(possible, draws):
        left, log_p = list(possible), 0.0
        for i in draw:
            top = max(logits[j] for j in left)
            log_p += logits[i] - top - math.log(sum(math.exp(logits[j] - top) for j in left))
            left.remove(i)
        ordered[draw] = math.exp(log_p)
    return ordered


def chi_square_p(
    counts: Counter[tuple[int, ...]], probabilities: dict[tuple[int, ...], float]
) -> float:
    """p-value of counts under probabilities; kinds expected less than 8 times are one kind."""
    total = counts.total()
    big = [draw for draw, p in probabilities.items() if p * total >= 8]
    observed = [counts[draw] for draw in big]
    expected = [probabilities[draw] * total for draw in big]
    if len(big) < len(probabilities):
        observed.append(total - sum(observed))
        expected.append(total - sum(expected))
    if expected[-1] < 1e-6 * total and observed[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    return float(stats.chi2.sf(statistic, max(1, len(expected) - 1)))


def tail_counts(
    row: torch.Tensor, *, reference: bool, draws: int = 3, rows: int = 10_000
) -> Counter[tuple[int, ...]]:
    got = extract(
        row.expand(rows, -1),
        top_p=0.5,
        top_p_max=1,
        sampled_n=draws,
        reference=reference,
        index=torch.arange(rows) // 200,
        position=torch.arange(rows) % 200 + 1,
    )
    assert set(got.top_ids[:, 0].tolist()) == {66}
    return Counter(map(tuple, got.sampled_ids.tolist()))


@PATHS
@pytest.mark.parametrize("kind", sorted(TAIL_LOGITS))
def test_the_tail_is_drawn_one_by_one_in_proportion_to_what_is_left(
    kind: str, reference: bool
) -> None:
    row = torch.full((1, 197), -math.inf)
    row[0, TAIL_IDS] = torch.tensor(TAIL_LOGITS[kind])
    row[0, 66] = 9.0
    logits = [float(row[0, i]) for i in TAIL_IDS]
    want = {
        tuple(TAIL_IDS[i] for i in draw): p for draw, p in draw_probabilities(logits, 3).items()
    }
    counts = tail_counts(row, reference=reference)
    assert set(counts) <= set(want)
    assert chi_square_p(counts, want) > 1e-7


@PATHS
def test_single_draws_from_a_whole_vocabulary_follow_its_probabilities(reference: bool) -> None:
    row = trained_like(1, 700, seed=4)
    row[0, 66] = 60.0
    probabilities = torch.softmax(row[0].double().index_fill(0, torch.tensor([66]), -math.inf), 0)
    want = {(i,): float(p) for i, p in enumerate(probabilities) if i != 66}
    counts = tail_counts(row, reference=reference, draws=1)
    assert chi_square_p(counts, want) > 1e-7  # false alarm: one fresh seed in ten million


def test_chi_square_notices_a_law_that_is_a_fifth_off() -> None:
    row = torch.full((1, 197), -math.inf)
    row[0, TAIL_IDS] = torch.tensor(TAIL_LOGITS["graded"])
    row[0, 66] = 9.0
    off = [x + 0.2 * (i == 3) for i, x in enumerate(TAIL_LOGITS["graded"])]
    want = {tuple(TAIL_IDS[i] for i in draw): p for draw, p in draw_probabilities(off, 3).items()}
    assert chi_square_p(tail_counts(row, reference=False, rows=40_000), want) < 1e-7


# The fast path against itself without its shortcuts, under noise, and at full size


def race_all_blocks(
    logits: torch.Tensor, counts: torch.Tensor, states: torch.Tensor, m: int
) -> list[list[int]]:
    """The fast path's draw with every block in the race, row by row in plain float64."""
    tails = []
    for row, count, state in zip(logits, counts.tolist(), states, strict=True):
        x = row.double()
        top = el.top_k_ids(row.unsqueeze(0), 100)[0]
        arrivals = torch.full_like(x, math.inf)
        alone = top[count:]
        arrivals[alone] = el.exponential_clocks(state, alone).log() - x[alone]
        x[top] = -math.inf
        for block in range(-(-x.numel() // 64)):
            ids = torch.arange(64 * block, min(64 * block + 64, x.numel()))
            ids = ids[x[ids] > -math.inf]
            if ids.numel():
                start = el.exponential_clocks(state, torch.tensor([2**32 + block])).log() - x[
                    ids
                ].logsumexp(0)
                clocks = el.exponential_clocks(state, ids).log() - x[ids]
                later = clocks + (-torch.expm1(clocks.min() - clocks)).log()
                arrivals[ids] = torch.logaddexp(start, later)
        tails.append(arrivals.argsort()[:m].tolist())
    return tails


def test_blocks_left_out_of_the_race_never_hold_a_winner(logits: torch.Tensor) -> None:
    got = extract(logits)
    rows = torch.arange(logits.shape[0])
    states = el.row_states(rows // 7, rows % 7 + 1, seed=42)
    assert got.sampled_ids.tolist() == race_all_blocks(logits, got.top_counts, states, 24)


def test_fast_and_reference_agree_on_every_row(logits: torch.Tensor) -> None:
    fast, plain = extract(logits), extract(logits, reference=True)
    assert (fast.logsumexp - plain.logsumexp).abs().le(5e-9 + 1e-15 * plain.logsumexp.abs()).all()
    assert torch.equal(fast.top_counts, plain.top_counts)
    assert torch.equal(fast.usable, plain.usable)
    nucleus = torch.arange(100) < plain.top_counts.unsqueeze(1)
    assert torch.equal(fast.top_ids[nucleus], plain.top_ids[nucleus])
    assert torch.equal(fast.top_logits[nucleus], plain.top_logits[nucleus])


@pytest.mark.parametrize("top_p_max", [1, 3, 200])
def test_the_log_sum_exp_is_as_exact_with_any_nucleus_cap(top_p_max: int) -> None:
    for logits in (trained_like(24, 5021), trained_like(24, 5021) * 0.3, torch.rand(24, 700)):
        got = extract(logits, top_p_max=top_p_max)
        want = extract(logits, top_p_max=top_p_max, reference=True)
        assert (got.logsumexp - want.logsumexp).abs().max() < 5e-9
        assert torch.equal(got.top_ids[:, 0], want.top_ids[:, 0])
        assert torch.equal(got.top_counts, want.top_counts)


@pytest.mark.parametrize("vocab", [32_000, 151_936, 151_669, 262_144])
def test_fast_and_reference_agree_on_whole_vocabularies(vocab: int) -> None:
    test_fast_and_reference_agree_on_every_row(trained_like(4, vocab))


@PATHS
def test_rounding_noise_seldom_changes_a_tail(reference: bool) -> None:
    logits = trained_like(400, 5021)
    noise = 1e-6 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    before, after = (
        extract(logits, reference=reference),
        extract(logits * (1 + noise), reference=reference),
    )
    changed = (before.sampled_ids != after.sampled_ids).any(1)
    assert int(changed.sum()) <= 6  # seen: one row in a thousand


def test_no_rows_give_no_tokens() -> None:
    got = extract(torch.zeros(0, 5021))
    assert got.top_ids.shape == (0, 100)
    assert got.sampled_ids.shape == (0, 24)


@PATHS
def test_top_k_goes_by_logit_then_id(reference: bool) -> None:
    row = torch.tensor([[1.0, -0.0, 2.0, 0.0, 2.0, -3.0, 0.0, 1.0]])
    got = extract(row, top_p=1.0, top_p_max=8, sampled_n=0, reference=reference)
    assert got.top_ids[0].tolist() == [2, 4, 0, 7, 1, 3, 6, 5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_what_a_cpu_gives(logits: torch.Tensor) -> None:
    rows = torch.arange(logits.shape[0])
    want = extract(logits)
    got = extract(logits.cuda(), index=(rows // 7).cuda(), position=(rows % 7 + 1).cuda())
    nucleus = torch.arange(100) < want.top_counts.unsqueeze(1)
    assert torch.equal(got.top_counts.cpu(), want.top_counts)
    assert torch.equal(got.top_ids.cpu()[nucleus], want.top_ids[nucleus])
    assert torch.equal(got.sampled_ids.cpu(), want.sampled_ids)
    assert (got.logsumexp.cpu() - want.logsumexp).abs().max() < 1e-7


# Quantization and transfer


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_rows_are_quantized_as_the_format_says(bits: int) -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(0, 8, (200, 30)).astype(np.float32)
    values[3] = 1.5
    counts = rng.integers(1, 31, 200)
    q, low, high = el.quantize_rows(torch.from_numpy(values), torch.from_numpy(counts), bits=bits)
    flat = np.concatenate([row[:n] for row, n in zip(values, counts, strict=True)])
    want_q, want_low, want_high = quantize_logits(flat, counts, bits=bits)
    got_q = np.concatenate([row[:n] for row, n in zip(q.numpy(), counts, strict=True)])
    np.testing.assert_array_equal(got_q, want_q)
    np.testing.assert_array_equal(low.numpy(), want_low)
    np.testing.assert_array_equal(high.numpy(), want_high)


def test_quantizing_no_columns_gives_no_values() -> None:
    q, low, high = el.quantize_rows(torch.zeros(3, 0))
    assert q.shape == (3, 0)
    assert low.tolist() == high.tolist() == [0.0, 0.0, 0.0]


class FixedTeacher:
    """Serves given logits in chunks of positions."""

    def __init__(self, logits: torch.Tensor, chunk: int) -> None:
        self.logits, self.chunk = logits, chunk

    def iter_logits(self, sequences: list[Any], token_positions: list[Any]) -> Any:
        assert sum(p.size for p in token_positions) == self.logits.shape[0]
        return iter(self.logits.split(self.chunk))


def fixed_batch() -> el.Batch:
    rng = np.random.default_rng(3)
    rows = []
    for index, n in ((11, 5), (4, 1), (90, 8)):
        ids = rng.integers(0, 700, 20).astype(np.int32)
        rows.append(
            el.EncodedRow(
                index, ids, np.sort(rng.choice(np.arange(1, 20), n, replace=False)).astype(np.int32)
            )
        )
    return el.Batch(rows)


@PATHS
def test_a_batch_is_the_same_in_any_chunks_and_knows_the_actual_tokens(reference: bool) -> None:
    logits, batch = trained_like(14, 700), fixed_batch()
    settings = {"top_p": 0.9, "top_p_max": 20, "sampled_n": 7, "seed": 1, "reference": reference}
    whole = el.gpu_process_batch(FixedTeacher(logits, 14), batch, **settings).to_host()
    parts = el.gpu_process_batch(FixedTeacher(logits, 3), batch, **settings).to_host()
    for name, value in vars(whole).items():
        np.testing.assert_array_equal(value, getattr(parts, name), err_msg=name)
    actual = np.concatenate([row.input_ids[row.token_positions] for row in batch.rows])
    np.testing.assert_array_equal(whole.actual_logits, logits.numpy()[np.arange(14), actual])
    probabilities = torch.softmax(logits.double(), -1).numpy()
    for token in range(14):
        ids = whole.top_ids[token, : whole.top_counts[token]]
        assert whole.nucleus_mass[token] == pytest.approx(
            probabilities[token, ids].sum(), abs=1e-12
        )


@pytest.mark.parametrize("sampled_n", [0, 5])
def test_the_host_copy_is_the_same_in_every_field_and_takes_one_transfer(
    sampled_n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = el.gpu_process_batch(
        FixedTeacher(trained_like(14, 700), 5),
        fixed_batch(),
        top_p=0.9,
        top_p_max=20,
        sampled_n=sampled_n,
        seed=1,
    )
    transfers = []
    move = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: transfers.append(1) or move(self))
    host = result.to_host()
    assert len(transfers) == 1
    for name, value in vars(result).items():
        got = getattr(host, name)
        assert isinstance(got, np.ndarray)
        assert got.dtype == value.numpy().dtype
        assert got.flags.aligned
        np.testing.assert_array_equal(got, value.numpy())


def test_a_batch_keeps_unusable_rows_apart() -> None:
    logits = trained_like(14, 700)
    logits[6, 3] = math.nan
    host = el.gpu_process_batch(
        FixedTeacher(logits, 5), fixed_batch(), top_p=0.9, top_p_max=20, sampled_n=7, seed=1
    ).to_host()
    assert np.flatnonzero(~host.usable).tolist() == [6]
    assert np.isfinite(host.nucleus_mass).all()

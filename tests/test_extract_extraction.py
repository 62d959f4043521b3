"""Section 5 of `extract_logits.py`: nucleus, tail, log-sum-exp and quantized values of a row.

Both implementations, fast and reference, against the oracle, and the law of their tail. Random
tests are seeded, so they give the same answer every time.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import tail_law
import torch

import extract_logits as el
from explore_logits import quantize_logits

PATHS = pytest.mark.parametrize("reference", [True, False], ids=["reference", "fast"])
FIELDS = ("logsumexp", "top_ids", "top_counts", "sampled_ids", "sampled_logits", "usable")


def extract(logits: torch.Tensor, **options: Any) -> el.ExtractedTokens:
    rows = torch.arange(logits.shape[0])
    usual = {"index": rows // 7, "position": rows % 7 + 1, "seed": 42}
    usual |= {"top_p": 0.98, "top_p_max": 100, "sampled_n": 24}
    return el.extract_tokens(logits, **usual | options)


def trained_like(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows from sure to torn: the best logits fall off as a power of their rank."""
    rng = np.random.default_rng(0)
    slope = rng.uniform(0.5, 6.0, (rows, 1))
    ranked = -slope * np.log1p(np.arange(vocab)) + rng.normal(0, 0.5, (rows, vocab))
    return torch.from_numpy(rng.permuted(ranked, axis=1) + 20).to(dtype)


def masked_rows() -> torch.Tensor:
    logits = trained_like(12, 5021)
    logits[:, 128:448] = -math.inf
    for n, row in enumerate(logits):
        row[n::3] = -math.inf
    return logits


def peaked_rows(depth: float) -> torch.Tensor:
    """One sure token; the rest, all alike in size, lie `depth` below it."""
    logits = trained_like(8, 5021) * 0.1 - depth
    logits[torch.arange(8), torch.arange(8) * 600] = 10.0
    return logits


CASES = {
    "trained_multiple_of_64": lambda: trained_like(24, 6400),
    "trained_not_multiple_of_64": lambda: trained_like(24, 5021),
    "trained_bfloat16": lambda: trained_like(24, 5021, torch.bfloat16),
    "trained_float16": lambda: trained_like(24, 6400, torch.float16),
    "just_enough_vocabulary": lambda: trained_like(24, 124),
    "flat": lambda: torch.zeros(6, 4000),
    "ties": lambda: trained_like(12, 5021).mul(4).round() / 4,
    "minus_infinity": masked_rows,
    "tiny_tail": lambda: peaked_rows(700.0),
    "underflowing_tail": lambda: peaked_rows(3000.0),
    "huge": lambda: trained_like(6, 2000) * 1e6,
    "signed_zeros": lambda: torch.cat([torch.tensor([1, -0.0, 2, 0.0, 2]), -torch.ones(140)])[None],
}
ALL_CASES = pytest.mark.parametrize("case", sorted(CASES))


def check(logits, *, reference, top_p=0.98, cap=100, m=24) -> el.ExtractedTokens:
    """Compare ids, order, values and log-sum-exp of each row with the oracle's."""
    found = extract(logits, reference=reference, top_p=top_p, top_p_max=cap, sampled_n=m)
    assert found.usable.all()
    assert torch.isfinite(found.top_logits).all()  # beyond the count, too
    assert 0 <= int(found.top_ids.min()) <= int(found.top_ids.max()) < logits.shape[1]
    near = 1e-12 if reference else 6e-8  # the latter sums in float32 inside blocks
    for t, row in enumerate(logits.double().numpy()):
        right = oracle.oracle_token(row, top_p, cap)
        count, tail = int(found.top_counts[t]), found.sampled_ids[t].tolist()
        assert found.top_ids[t, :count].tolist() == right.nucleus, f"row {t}"
        assert found.top_logits[t, :count].tolist() == row[right.nucleus].tolist(), f"row {t}"
        assert len(set(tail) - set(right.nucleus)) == m, f"row {t}"
        assert found.sampled_logits[t].tolist() == row[tail].tolist(), f"row {t}"
        assert np.isfinite(row[tail]).all(), f"row {t}"
        error = abs(float(found.logsumexp[t]) - right.logsumexp)
        assert error <= near + 1e-15 * abs(right.logsumexp), f"row {t}"
    return found


@PATHS
@ALL_CASES
@pytest.mark.parametrize("top_p", [0.5, 0.98])
def test_every_token_is_the_oracles(case, top_p, reference):
    check(CASES[case](), reference=reference, top_p=top_p)


@PATHS
def test_every_token_of_a_whole_vocabulary_is_the_oracles(reference):
    check(trained_like(4, 262_144), reference=reference)
    check(trained_like(4, 151_669, torch.bfloat16), reference=reference)


@PATHS
@pytest.mark.parametrize(
    ("top_p", "cap", "m"),
    [(0.98, 1, 24), (1.0, 100, 1), (1e-6, 100, 24), (0.9, 255, 40), (1.0, 255, 0)],
)
def test_other_settings_are_the_oracles(top_p, cap, m, reference):
    few = torch.where(torch.arange(400) < 150, -torch.arange(400.0), -math.inf)
    for logits in (trained_like(9, 300), trained_like(9, 20_000) * 0.3, few[None]):
        check(logits, reference=reference, top_p=top_p, cap=cap, m=m)


@PATHS
def test_the_nucleus_includes_the_token_that_crosses_top_p_and_ties_go_by_id(reference):
    """Probabilities 1/2, 1/4, 1/8, …: two tokens hold 0.75, and a hair more needs a third."""
    places = torch.randperm(70_000, generator=torch.Generator().manual_seed(1))[:11]
    row = torch.full((1, 70_000), -math.inf)
    row[0, places] = torch.tensor([*range(-1, -11, -1), -10]) * math.log(2)
    for top_p, count in ((0.75 - 1e-6, 2), (0.75 + 1e-6, 3)):
        found = check(row, reference=reference, top_p=top_p, cap=8, m=2)
        assert int(found.top_counts[0]) == count
    alike = check(torch.full((1, 124), 3.7), top_p=0.5 - 1e-9, reference=reference)
    assert alike.top_ids[0, : alike.top_counts[0]].tolist() == list(range(62))


@PATHS
def test_unusable_rows_are_flagged_and_leave_the_others_alone(reference):
    clean = trained_like(9, 5021)
    broken = clean.clone()
    broken[1, 77] = broken[8, 5020] = math.nan
    broken[1, 78:] = -math.nan  # as a CPU makes it of inf - inf: below everything
    broken[2, 5000] = broken[3, 0] = math.inf
    broken[4] = -math.inf
    broken[5, 123:] = -math.inf  # 123 possible tokens: a capped nucleus leaves 23
    broken[5, :123] = 0.0
    want, got = extract(clean, reference=reference), extract(broken, reference=reference)
    good = [0, 6, 7]
    assert got.usable.nonzero()[:, 0].tolist() == good
    assert torch.isfinite(got.logsumexp).nonzero()[:, 0].tolist() == [0, 5, 6, 7]
    for name in FIELDS:
        assert torch.equal(getattr(got, name)[good], getattr(want, name)[good]), name


@PATHS
@pytest.mark.parametrize("vocab", [300, 5021])
def test_a_row_is_the_same_alone_in_any_batch_and_in_any_order(vocab, reference):
    logits, index = trained_like(9, vocab), torch.arange(9) // 7
    position = torch.tensor([5, 9, 9, 2, 70_000, 1, 3, 4, 2**31 - 1])
    whole = extract(logits, index=index, position=position, reference=reference)
    for order in ([8, 3, 0, 5], [4], [7, 6, 5, 4, 3, 2, 1, 0, 8]):
        where = {"index": index[order], "position": position[order], "reference": reference}
        some = extract(logits[order], **where)
        for name in FIELDS:
            assert torch.equal(getattr(whole, name)[order], getattr(some, name)), name


@PATHS
def test_another_seed_index_or_position_is_another_tail(reference):
    row, big = torch.zeros(4, 5021), 2**31 - 1
    index, position = torch.tensor([1, 1, big, big]), torch.tensor([1, big, 1, big])
    where = {"index": index, "position": position, "reference": reference}
    drawn = [extract(row, seed=seed, **where).sampled_ids for seed in (0, 1, 2**63 - 1)]
    assert len(torch.cat(drawn).unique(dim=0)) == 12


SMALL, LARGE = tail_law.make_cases(5_000), tail_law.make_large_cases(1_500)


@pytest.mark.parametrize(
    ("reference", "loose", "vary", "cases"),
    [(False, False, "position", SMALL + LARGE), (False, True, "position", SMALL + LARGE),
     (True, False, "position", SMALL + tail_law.make_large_cases(300)),
     (False, False, "index", SMALL)],
)  # fmt: skip
def test_the_tail_follows_the_law(reference, loose, vary, cases):
    """A trial is another position or index. One false alarm in 1e6 seeds; these are fixed.

    A loose cap leaves likely tokens between the nucleus and the cap, a tight one leaves none.
    """

    def draw(log_probs, nucleus, m, n_trials, seed):
        row, count = torch.from_numpy(log_probs).float(), int(nucleus.sum())
        top_p, cap = 1.0, count
        if loose:
            held = np.cumsum([0.0, *np.sort(np.exp(log_probs))[::-1]])
            top_p, cap = float(held[count - 1] + held[count]) / 2, min(100, len(log_probs) - m)
        where = {"index": torch.full((n_trials,), 5), "position": torch.full((n_trials,), 5)}
        where[vary] = torch.arange(n_trials)
        sizes = {"top_p": top_p, "top_p_max": cap, "sampled_n": m}
        rows = row.expand(n_trials, -1)
        found = extract(rows, **where, **sizes, seed=seed, reference=reference)
        assert (found.top_counts == count).all()
        assert set(found.top_ids[0, :count].tolist()) == set(np.flatnonzero(nucleus).tolist())
        return found.sampled_ids.numpy()

    tail_law.check_tail_law(draw, cases=cases)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@ALL_CASES
def test_a_gpu_gives_what_a_cpu_gives(case):
    logits = CASES[case]()
    rows = torch.arange(logits.shape[0])
    want = extract(logits)
    got = extract(logits.cuda(), index=(rows // 7).cuda(), position=(rows % 7 + 1).cuda())
    nucleus = torch.arange(100) < want.top_counts.unsqueeze(1)
    assert torch.equal(got.top_counts.cpu(), want.top_counts)
    assert torch.equal(got.top_ids.cpu()[nucleus], want.top_ids[nucleus])
    assert torch.equal(got.sampled_ids.cpu(), want.sampled_ids)
    assert (got.logsumexp.cpu() - want.logsumexp).abs().max() < 1e-7


@pytest.mark.parametrize("bits", [4, 16])
def test_rows_are_quantized_as_the_format_says(bits):
    rng = np.random.default_rng(5)
    values, counts = rng.normal(0, 8, (200, 30)).astype(np.float32), rng.integers(1, 31, 200)
    values[3] = 1.5
    q, low, high = el.quantize_rows(torch.from_numpy(values), torch.from_numpy(counts), bits=bits)
    there = np.arange(30) < counts[:, None]
    wanted = quantize_logits(values[there], counts, bits=bits)
    for found, right in zip((q.numpy()[there], low, high), wanted, strict=True):
        np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize(("reference", "sampled_n"), [(True, 7), (False, 0)])
def test_a_batch_is_the_same_in_chunks_and_by_one_transfer(reference, sampled_n, monkeypatch):
    logits, rng, rows = trained_like(14, 700), np.random.default_rng(3), []
    for index, n in ((11, 5), (4, 1), (90, 8)):
        at = np.sort(rng.choice(np.arange(1, 20), n, replace=False)).astype(np.int32)
        rows.append(el.EncodedRow(index, rng.integers(0, 700, 20).astype(np.int32), at))
    batch = el.Batch(rows)
    settings = {"top_p": 0.9, "top_p_max": 20, "sampled_n": sampled_n, "reference": reference}
    whole, parts = (
        el.gpu_process_batch(
            SimpleNamespace(iter_logits=lambda *_, chunk=chunk: iter(logits.split(chunk))),
            batch, seed=1, **settings,
        ) for chunk in (14, 3)
    )  # fmt: skip
    transfers, move = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: transfers.append(1) or move(self))
    host = parts.to_host()
    assert len(transfers) == 1
    for name, value in vars(parts).items():
        np.testing.assert_array_equal(getattr(host, name), value.numpy(), name, strict=True)
        np.testing.assert_array_equal(getattr(whole, name), value, name)
    actual = np.concatenate([row.input_ids[row.token_positions] for row in rows])
    np.testing.assert_array_equal(host.actual_logits, logits.numpy()[np.arange(14), actual])
    p = torch.softmax(logits.double(), -1).numpy()
    inside = np.arange(20) < host.top_counts[:, None]
    mass = (np.take_along_axis(p, host.top_ids, 1) * inside).sum(1)
    np.testing.assert_allclose(host.nucleus_mass, mass, rtol=0, atol=1e-12)

"""Figures over outputs, and the comparison of two: exact against plain numpy and full logits."""

import json

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from small_output import SETTINGS, STORED, extract_row, random_logits, random_rows, write_output

import explore_logits as explore
from explore_logits import analyze_nucleus_sizes, compare_outputs, compute_dataset_stats

ROWS = random_rows(30, settings=STORED, tokens=20)
SIZES = np.concatenate([row["top_counts"] for row in ROWS])


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return write_output(tmp_path_factory.mktemp("stats"), ROWS, settings=STORED)


def assert_describes(stats: explore.NucleusSizeStats, sizes: np.ndarray) -> None:
    assert (stats.tokens, stats.min, stats.max) == (sizes.size, sizes.min(), sizes.max())
    assert stats.mean == pytest.approx(sizes.mean(), rel=1e-14)
    assert stats.std == pytest.approx(sizes.std(), rel=1e-12, abs=1e-12)
    for q in (0, 0.1, 1, 5, 25, 33.3, 50, 75, 95, 99, 100):
        assert stats.percentile(q) == np.percentile(sizes, q, method="inverted_cdf")


def test_nucleus_sizes_are_exact_for_every_kind_of_dataset(output):
    mapped = datasets.load_dataset("parquet", data_dir=str(output / "data"), split="train")
    stream = mapped.to_iterable_dataset()
    for kind in (output, explore.load_logit_dataset(output), mapped, stream, ROWS):
        for device in (None, "cpu", "cuda")[: 2 + torch.cuda.is_available()]:
            stats = analyze_nucleus_sizes(kind, device=device)
            assert stats.rows == 30
            assert_describes(stats, SIZES)
    stats = analyze_nucleus_sizes(output, max_samples=7)
    assert stats.rows == 7
    assert_describes(stats, np.concatenate([row["top_counts"] for row in ROWS[:7]]))
    stats = analyze_nucleus_sizes([])
    assert (stats.tokens, stats.mean, stats.std, stats.percentile(50)) == (0, 0, 0, 0)
    hundred = explore.NucleusSizeStats(np.bincount(range(1, 101), minlength=256), 1)
    assert [hundred.percentile(q) for q in range(1, 101)] == [*range(1, 101)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 255), min_size=1, max_size=60))
def test_the_histogram_gives_what_numpy_gives_on_the_sizes_themselves(sizes):
    stats = explore.NucleusSizeStats(np.bincount(sizes, minlength=256), 1)
    assert_describes(stats, np.array(sizes))


def test_dataset_figures_equal_a_loop_over_tokens(output):
    stats = compute_dataset_stats(output)
    masses, firsts, tails, log_probs, places = [], [], [], [], []
    for sample in explore.iter_samples(ROWS):
        actual = sample["input_ids"][sample["token_positions"]]
        for t in range(sample["num_tokens"]):
            mass = explore.get_nucleus_probability_mass(sample, t)
            ids, logits = explore.dequantize_top_logits(sample, t)
            tail_ids, tail = explore.dequantize_sampled_logits(sample, t)
            total = sample["logsumexp"][t]
            masses.append(mass)
            firsts.append(np.exp(logits[0] - total))
            tails.append(np.exp(tail - total).sum())
            in_top, in_tail = actual[t] in ids, actual[t] in tail_ids
            places.append((actual[t] == ids[0], in_top, in_tail))
            if in_top or in_tail:
                everything = dict(zip([*ids, *tail_ids], [*logits, *tail], strict=True))
                log_probs.append(everything[actual[t]] - total)
            else:
                log_probs.append(np.log(min(np.exp(logits[-1] - total), 1 - mass - tails[-1])))
    assert (stats.rows, stats.tokens, stats.known) == (30, len(masses), len(masses))
    means = (stats.mean_mass, stats.mean_first, stats.mean_tail_mass)
    assert means == pytest.approx(np.mean([masses, firsts, tails], axis=1))
    assert stats.min_mass == pytest.approx(np.min(masses))
    capped = (np.array(masses) < 0.98 - 1e-4) & (SIZES == 100)
    assert stats.capped == pytest.approx(capped.mean())
    agreement = (stats.agreement, stats.in_nucleus, stats.in_tail)
    assert agreement == pytest.approx(np.mean(places, axis=0))
    assert 0 < stats.in_tail < stats.agreement < stats.in_nucleus < 1  # the rows show every case
    assert stats.mean_log_probability == pytest.approx(np.mean(log_probs), abs=2e-3)


def test_the_share_of_capped_nuclei_hardly_depends_on_the_bits(tmp_path):
    settings = SETTINGS | {"logit_bits": 4, "top_p_max": 30}
    rows = random_rows(40, settings=settings, tokens=20)
    full = np.mean(np.concatenate([row["top_counts"] for row in rows]) == 30)
    assert full > 0.1
    stats = compute_dataset_stats(write_output(tmp_path, rows, settings=settings))
    assert stats.capped == pytest.approx(full, rel=0.05)


def test_bytes_per_token_are_the_files_divided_by_the_tokens(output):
    stats = explore.compute_bytes_per_token_stats(output)
    total = sum(path.stat().st_size for path in (output / "data").iterdir())
    assert (stats.total_bytes, stats.tokens) == (total, SIZES.size)
    assert stats.bytes_per_token == pytest.approx(total / SIZES.size)
    assert set(stats.column_bytes) == {*explore.READ_COLUMNS} - {"sampled_counts"}
    assert 0 < sum(stats.column_bytes.values()) < total


def test_without_text_nothing_is_said_about_the_actual_token(tmp_path):
    stats = compute_dataset_stats(write_output(tmp_path))
    assert (stats.known, stats.agreement, stats.mean_log_probability) == (0, None, None)
    assert not any("actual" in label for label in stats.facts())
    assert compute_dataset_stats(ROWS).capped is None, "rows alone do not say what the cap is"


def rows_of(logits, *, seed, **changes):
    rng = np.random.default_rng(seed)
    made = SETTINGS | {"vocab_size": logits[0].shape[1], **changes}
    return [extract_row(part, made, rng, index=i) for i, part in enumerate(logits)]


def test_another_tail_of_the_same_teacher_is_no_difference():
    logits = [random_logits(np.random.default_rng(i), 8, 500) for i in range(6)]
    seen = compare_outputs(rows_of(logits, seed=1), rows_of(logits, seed=2))
    assert (seen.common_rows, seen.unequal_rows, seen.tokens) == (6, 0, 48)
    assert (seen.same_first, seen.max_logsumexp) == (1, 0)
    assert seen.max_divergence < 1e-4


@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("cap", [5, 100])
def test_the_divergence_is_a_lower_bound_and_near_when_much_is_stored(noise, cap):
    rng = np.random.default_rng(7)
    one = [random_logits(rng, 8, 500) for _ in range(6)]
    two = [part + noise * rng.standard_normal(part.shape).astype(np.float32) for part in one]
    a, b = (
        explore.decode_rows(explore.as_rows(rows_of(part, seed=i, top_p_max=cap)))
        for i, part in enumerate((one, two))
    )
    bound = explore.bound_divergence(a, b)
    p, q = (log_softmax(np.concatenate(part).astype(float), axis=1) for part in (one, two))
    truth = (np.exp(p) * (p - q)).sum(axis=1)
    assert (bound <= truth + 1e-6).all()
    covered = a.top.mass >= 0.97
    assert covered.sum() >= 8
    if noise > 0.1:  # 4e-5 nats drown in quantization
        assert bound[covered].sum() > 0.5 * truth[covered].sum()


def test_the_largest_differences_are_named_and_rows_are_joined_by_index():
    rng = np.random.default_rng(3)
    logits = [random_logits(rng, 5, 300) for _ in range(8)]
    changed = [part.copy() for part in logits]
    changed[4][3, :50] += 4
    shorter = changed[6][:2]
    other = rows_of([*changed[:6], shorter], seed=1)[::-1]  # row order differs, index 7 is missing
    seen = compare_outputs(rows_of(logits, seed=1), other)
    assert (seen.rows, seen.common_rows, seen.unequal_rows) == ((8, 7), 7, 1)
    assert seen.largest[0][1:] == (4, 3)
    assert "conversation 4, token 3" in str(seen)


def test_without_a_common_token_there_is_no_figure(output, tmp_path, capsys):
    others = [{**row, "index": row["index"] + 100} for row in ROWS[:4]]
    other = write_output(tmp_path, others, settings=STORED)
    assert explore.main([str(output), "--compare", str(other)]) == 3
    comparison = json.loads(capsys.readouterr().out.splitlines()[-1])["comparison"]
    assert comparison["rows"] == [30, 4]
    for figure in ("mean_divergence", "max_divergence", "same_first", "max_logsumexp"):
        assert comparison[figure] is None

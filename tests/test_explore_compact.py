"""Compact rows as the explorer reads, scores, checks and shows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEACHER
from small_output import SETTINGS, write_parts

import explore_logits as explore
from explore_logits import compare_outputs, distillation_loss, load_logit_dataset, logits_to_probs
from extract_logits import (
    Batch,
    EncodedRow,
    cpu_postprocess_batch,
    extract_tokens,
    quantize_tokens,
)

VOCAB, MIN_P, SIZES = 700, 0.01, [5, 1, 9]


def some_logits(vocab: int = VOCAB) -> torch.Tensor:
    """Return logits of 15 tokens: natural ones, a flat one, a certain one."""
    logits = torch.randn(15, vocab, generator=torch.Generator().manual_seed(1)) * 3
    logits[4] *= 0.01
    logits[7, 2:] = -200.0
    return logits


def make_rows(
    logits: torch.Tensor, sizes: list[int], *, min_p: float | None, bits: int = 16
) -> list[dict[str, Any]]:
    """Return the extractor's rows of `sizes` tokens each, of (N, V) logits; conversations 0, 1, …

    The actual tokens are ids 0, 1, … of the vocabulary. No threshold: plain rows.
    """
    encoded = []
    for n, size in enumerate(sizes):
        ids = np.arange(size + 1, dtype=np.int32) % logits.shape[1]
        encoded.append(EncodedRow(n, ids, np.arange(1, size + 1, dtype=np.int32)))
    index = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
    position = torch.from_numpy(np.concatenate([row.token_positions for row in encoded])).long()
    kept = {name: SETTINGS[name] for name in ("top_p", "top_p_max", "sampled_n")}
    tokens = extract_tokens(logits, index, position, seed=7, min_p=min_p, **kept)
    actual = logits.gather(1, (position % logits.shape[1]).unsqueeze(1)).squeeze(1).float()
    result = quantize_tokens(tokens, actual, bits=bits).to_host()
    schema = explore.shard_schema(store_tokens=True, compact=min_p is not None, settings={})
    packed = cpu_postprocess_batch(result, Batch(encoded), schema=schema)
    assert not packed.unusable
    return packed.table.select(schema.names).to_pylist()


def write(
    folder: Path, logits: torch.Tensor | None = None, sizes: list[int] = SIZES, *,
    min_p: float | None = MIN_P, bits: int = 16, rows: list[dict[str, Any]] | None = None,
) -> Path:  # fmt: skip
    """Write such rows, or those that are given, as an output of one part."""
    logits = some_logits() if logits is None else logits
    settings = SETTINGS | {"store_tokens": True, "vocab_size": logits.shape[1], "logit_bits": bits}
    if min_p is not None:
        settings |= {"format_version": 2, "min_p": min_p}
        for name in ("top_p", "top_p_max", "sampled_n"):
            del settings[name]
    rows = rows or make_rows(logits, sizes, min_p=min_p, bits=bits)
    return write_parts(folder, rows, settings=settings, rows_per_part=len(rows))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return write(tmp_path / "out")


def test_a_sample_holds_what_the_row_stores(output: Path) -> None:
    sample = explore.get_sample(load_logit_dataset(output), 0)
    exact = some_logits()[:5].double().softmax(-1).numpy()
    for t in range(5):
        ids, logits = explore.dequantize_top_logits(sample, t)
        assert set(ids) == set(np.flatnonzero(exact[t] >= MIN_P))
        assert np.allclose(logits_to_probs(logits, sample["logsumexp"][t]), exact[t, ids], 1e-4)
        points, stands = explore.dequantize_sampled_logits(sample, t)
        assert points.size == sample["sampled_counts"][t] == sample["sampled_indices"][t].size
        assert np.all(logits_to_probs(stands, sample["logsumexp"][t]) <= MIN_P * 1.01)
        _, everything = explore.dequantize_all_logits(sample, t)
        assert logits_to_probs(everything, sample["logsumexp"][t]).sum() == pytest.approx(1)
    assert sample["top_counts"][4] == 0  # flat: no token has 1%


def test_a_token_without_a_logit_has_at_most_the_threshold(output: Path) -> None:
    dataset, words = load_logit_dataset(output), explore.load_tokenizer(str(TEACHER))
    exact = some_logits().double().softmax(-1).numpy()
    seen = set()
    for row, first in ((0, 0), (2, 6)):
        for token in explore.execute_analysis(dataset, row, tokenizer=words).tokens:
            p = exact[first + token.t, token.id]
            seen.add(token.where)
            assert token.exact == (token.where == "nucleus") == (p >= MIN_P)
            assert token.probability <= (p * 1.001 if token.exact else MIN_P * 1.000001)
            assert token.probability >= p * 0.999
            assert token.rank <= 1 + (exact[first + token.t] > p).sum()
    assert len(seen) > 1


def test_every_way_to_show_them_works(output: Path, tmp_path: Path) -> None:
    dataset, words = load_logit_dataset(output), explore.load_tokenizer(str(TEACHER))
    for sample in explore.iter_samples(dataset):
        explore.print_sample_info(sample)
        for t in range(sample["num_tokens"]):
            explore.print_top_tokens(sample, t)
            explore.plot_logit_distribution(sample, t)
        explore.plot_nucleus_vs_sampled(sample)
        explore.plot_nucleus_sizes(sample)
        analysis = explore.execute_analysis(dataset, sample["index"], tokenizer=words)
        page = explore.visualize_conversation_probabilities(analysis, True)
        assert "&lt;1.0%" in page or sample["num_tokens"] == 1
    stats = explore.compute_dataset_stats(dataset)
    assert (stats.tokens, stats.capped) == (15, None)
    assert explore.analyze_nucleus_sizes(dataset).min == 0
    assert stats.mean_mass + stats.mean_tail_mass == pytest.approx(1)
    page = str(tmp_path / "p.html")
    assert explore.main([str(output), "--model", str(TEACHER), "--stats", "--html", page]) == 0


def test_compared_with_plain_rows_of_the_same_teacher_they_do_not_differ(
    output: Path, tmp_path: Path
) -> None:
    plain = write(tmp_path / "plain", min_p=None)
    for pair in ((output, plain), (plain, output)):
        found = compare_outputs(*pair)
        assert found.tokens == 15
        assert found.max_divergence is not None
        assert found.max_divergence < 1e-4
    other = write(tmp_path / "other", -some_logits())
    assert compare_outputs(output, other).mean_divergence > 0.1


@pytest.mark.parametrize("bits", [4, 8, 13, 16])
def test_what_the_extractor_wrote_is_valid_and_exported(tmp_path: Path, bits: int) -> None:
    output = write(tmp_path / "out", bits=bits)
    report = explore.validate_output(output)
    assert report.ok, report
    assert (report.rows, report.tokens) == (3, 15)
    assert explore.export_axolotl(output, tmp_path / "axolotl", k=8) == 3
    assert explore.export_distillkit(output, tmp_path / "distillkit", k=8) == 3


# rule: row, column, what its list becomes
FAULTS: dict[str, tuple[int, str, Callable[[list[Any]], list[Any]]]] = {
    "threshold": (0, "top_min", lambda v: [v[0] - 3, *v[1:]]),
    "tail count": (2, "sampled_counts", lambda v: [v[0] - 5, v[1] + 5, *v[2:]]),
    "order": (2, "sampled_indices_low", lambda v: v[1::-1] + v[2:]),
    "id": (2, "sampled_indices_low", lambda v: [*v[:-1], VOCAB]),
    "length": (1, "sampled_counts", lambda v: [v[0] + 1]),
}


@pytest.mark.parametrize("rule", [*FAULTS, "duplicate"])
def test_what_breaks_their_rules_is_named(tmp_path: Path, rule: str) -> None:
    rows = make_rows(some_logits(), SIZES, min_p=MIN_P)
    if rule == "duplicate":  # a point on an id that is kept
        rows[0]["sampled_indices_low"][0] = rows[0]["top_indices_low"][0]
    else:
        row, column, change = FAULTS[rule]
        rows[row][column] = change(rows[row][column])
    report = explore.validate_output(write(tmp_path / "out", rows=rows))
    assert rule in report.counts, report


# Training -----------------------------------------------------------------------------------------


def make_batch(output: Path) -> dict[str, Any]:
    rows = explore.LogitIterableDataset(output, seed=None, rank=0, world_size=1)
    return explore.collate_logits(list(rows))


@pytest.mark.parametrize("min_p", [0.02, 0.1])
@pytest.mark.parametrize("scale", [4, 2, 0.1], ids=["peaked", "natural", "flat"])
def test_the_gradient_of_the_loss_is_that_of_the_whole_distribution_on_average(
    tmp_path: Path, scale: float, min_p: float
) -> None:
    """2,000 conversations of one distribution; 6 standard deviations, a false alarm in 1e6.

    A coordinate of the tail deviates by sqrt(p (share - p)), share at most min_p. Seeds are fixed.
    """
    count = 2000
    teacher = torch.randn(60, generator=torch.Generator().manual_seed(4)) * scale
    batch = make_batch(write(tmp_path, teacher.expand(count, -1), [1] * count, min_p=min_p))
    student = torch.randn(60, generator=torch.Generator().manual_seed(9)).double()
    leaf = student.expand(count, -1).clone().requires_grad_()
    distillation_loss(leaf, batch, reduction="sum").backward()
    assert leaf.grad is not None
    p = teacher.double().softmax(-1)
    deviation = torch.where(p < min_p, (min_p * p).sqrt(), 0.0)
    off = (leaf.grad.mean(0) - (student.softmax(-1) - p)).abs()
    assert (off <= 6 * deviation / count**0.5 + 1e-4).all()  # 16 bits round by less than that
    assert leaf.grad.var(0).sum() <= 1.1 * (deviation**2).sum() + 1e-6
    assert leaf.grad.std(0).max() > 1e-3  # they do differ


@pytest.mark.parametrize("tail", ["ghost", "ignore"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_what_needs_no_tail_is_that_of_plain_rows(
    tmp_path: Path, divergence: str, tail: str
) -> None:
    """Where both keep the same nucleus: a teacher with eight probable tokens and equal others."""
    teacher = torch.full((15, VOCAB), -9.0)
    teacher[:, 100:108] = torch.arange(8.0) / 100
    compact, plain = (
        distillation_loss(-some_logits(), make_batch(made), divergence=divergence, tail=tail)
        for made in (
            write(tmp_path / "compact", teacher, min_p=0.05),
            write(tmp_path / "plain", teacher, min_p=None),
        )
    )
    assert float(compact) == pytest.approx(float(plain), rel=2e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "reverse_kl"},
        {"divergence": "jsd", "tail": "renormalized"},
        {"temperature": 2.0, "tail": "ghost"},
    ],
)
def test_what_needs_the_logits_of_the_tail_is_refused(output: Path, options: Any) -> None:
    with pytest.raises(explore.LogitsError, match="needs the tail's logits"):
        distillation_loss(some_logits(), make_batch(output), **options)


def test_beside_plain_rows_in_one_batch_each_counts_as_it_does_alone(
    output: Path, tmp_path: Path
) -> None:
    read = {"seed": None, "rank": 0, "world_size": 1}
    rows: list[Any] = list(explore.LogitIterableDataset(output, **read))
    rows += explore.LogitIterableDataset(write(tmp_path / "plain", min_p=None), **read)
    student = some_logits().repeat(2, 1) / 2
    together, one, other = (
        distillation_loss(student[: 15 * len(part) // 3], explore.collate_logits(part))
        for part in (rows, rows[:3], rows[3:])
    )
    torch.testing.assert_close(together, (one + other) / 2)


def test_where_no_token_is_kept_an_export_has_nothing_to_normalise(tmp_path: Path) -> None:
    with np.errstate(divide="raise"):
        explore.export_axolotl(write(tmp_path / "out"), tmp_path / "a", k=8, normalize=True)

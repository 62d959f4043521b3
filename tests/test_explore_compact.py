"""Compact rows as the explorer reads, scores, checks and shows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from compact_rows import make_table, write_output
from conftest import TEACHER

from explore_logits import (
    LogitIterableDataset,
    LogitsError,
    analyze_nucleus_sizes,
    collate_logits,
    compare_outputs,
    compute_dataset_stats,
    dequantize_all_logits,
    dequantize_sampled_logits,
    dequantize_top_logits,
    distillation_loss,
    execute_analysis,
    export_axolotl,
    export_distillkit,
    get_sample,
    iter_samples,
    load_logit_dataset,
    load_tokenizer,
    logits_to_probs,
    main,
    plot_logit_distribution,
    plot_nucleus_sizes,
    plot_nucleus_vs_sampled,
    print_sample_info,
    print_top_tokens,
    validate_output,
    visualize_conversation_probabilities,
)

VOCAB, MIN_P, SIZES = 700, 0.01, [5, 1, 9]


def some_logits(vocab: int = VOCAB) -> torch.Tensor:
    """Return logits of 15 tokens: natural ones, a flat one, a certain one."""
    logits = torch.randn(15, vocab, generator=torch.Generator().manual_seed(1)) * 3
    logits[4] *= 0.01
    logits[7, 2:] = -200.0
    return logits


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return write_output(tmp_path / "out", make_table(some_logits(), SIZES, min_p=MIN_P))


def test_a_sample_holds_what_the_row_stores(output: Path) -> None:
    sample = get_sample(load_logit_dataset(output), 0)
    exact = some_logits()[:5].double().softmax(-1).numpy()
    for t in range(5):
        kept = np.flatnonzero(exact[t] >= MIN_P)
        ids, logits = dequantize_top_logits(sample, t)
        assert set(ids) == set(kept)
        assert np.allclose(logits_to_probs(logits, sample["logsumexp"][t]), exact[t, ids], 1e-4)
        points, stands = dequantize_sampled_logits(sample, t)
        assert points.size == sample["sampled_counts"][t] == sample["sampled_indices"][t].size
        assert sample["sampled_logits_quantized"][t].size == 0
        share = logits_to_probs(stands, sample["logsumexp"][t])
        assert np.all(share <= MIN_P * 1.01)
        _, everything = dequantize_all_logits(sample, t)
        assert logits_to_probs(everything, sample["logsumexp"][t]).sum() == pytest.approx(1)
    assert sample["top_counts"][4] == 0  # flat: no token has 1%
    assert "sampled_counts" not in get_sample(make_table(some_logits(), SIZES, min_p=None))


def test_a_token_without_a_logit_has_at_most_the_threshold(output: Path) -> None:
    dataset, words = load_logit_dataset(output), load_tokenizer(str(TEACHER))
    exact = some_logits().double().softmax(-1).numpy()
    seen = set()
    for row, first in ((0, 0), (2, 6)):
        for token in execute_analysis(dataset, row, tokenizer=words).tokens:
            p = exact[first + token.t, token.id]
            seen.add(token.where)
            assert token.exact == (token.where == "nucleus") == (p >= MIN_P)
            assert token.probability <= (p * 1.001 if token.exact else MIN_P * 1.000001)
            assert token.probability >= p * 0.999
            assert token.rank <= 1 + (exact[first + token.t] > p).sum()
    assert len(seen) > 1


def test_every_way_to_show_them_works(output: Path, tmp_path: Path, capsys: Any) -> None:
    dataset, words = load_logit_dataset(output), load_tokenizer(str(TEACHER))
    for sample in iter_samples(dataset):
        print_sample_info(sample)
        for t in range(sample["num_tokens"]):
            print_top_tokens(sample, t)
            plot_logit_distribution(sample, t)
        plot_nucleus_vs_sampled(sample)
        plot_nucleus_sizes(sample)
        analysis = execute_analysis(dataset, sample["index"], tokenizer=words)
        page = visualize_conversation_probabilities(analysis, True)
        assert "&lt;1.0%" in page or sample["num_tokens"] == 1
    stats = compute_dataset_stats(dataset)
    assert (stats.tokens, stats.capped) == (15, None)
    assert analyze_nucleus_sizes(dataset).min == 0
    assert stats.mean_mass + stats.mean_tail_mass == pytest.approx(1)
    command = ["--model", str(TEACHER), "--sample", "0", "--stats", "--html"]
    assert main([str(output), *command, str(tmp_path / "p.html")]) == 0
    assert "min_p 0.01" in (tmp_path / "p.html").read_text()
    capsys.readouterr()


def test_compared_with_plain_rows_of_the_same_teacher_they_do_not_differ(
    output: Path, tmp_path: Path
) -> None:
    plain = write_output(tmp_path / "plain", make_table(some_logits(), SIZES, min_p=None))
    for pair in ((output, plain), (plain, output)):
        found = compare_outputs(*pair)
        assert found.tokens == 15
        assert found.max_divergence is not None
        assert found.max_divergence < 1e-4
    other = write_output(tmp_path / "other", make_table(-some_logits(), SIZES, min_p=MIN_P))
    assert compare_outputs(output, other).mean_divergence > 0.1


def replace_list(table: pa.Table, name: str, row: int, change: Callable[[list[Any]], Any]) -> Any:
    values = table[name].to_pylist()
    values[row] = change(values[row])
    place = table.column_names.index(name)
    return table.set_column(place, table.schema.field(name), pa.array(values, table[name].type))


FAULTS = {
    "threshold": lambda t: replace_list(t, "top_min", 0, lambda v: [v[0] - 3, *v[1:]]),
    "tail count": lambda t: replace_list(
        t, "sampled_counts", 2, lambda v: [v[0] - 5, v[1] + 5, *v[2:]]
    ),
    "order": lambda t: replace_list(t, "sampled_indices_low", 2, lambda v: v[1::-1] + v[2:]),
    "id": lambda t: replace_list(t, "sampled_indices_low", 2, lambda v: [*v[:-1], VOCAB]),
    "length": lambda t: replace_list(t, "sampled_counts", 1, lambda v: [v[0] + 1]),
    "duplicate": lambda t: replace_list(
        t, "sampled_indices_low", 0, lambda v: [t["top_indices_low"][0][0].as_py(), *v[1:]]
    ),
}


@pytest.mark.parametrize("bits", [4, 8, 13, 16])
def test_what_the_extractor_wrote_is_valid_and_exported(tmp_path: Path, bits: int) -> None:
    table = make_table(some_logits(), SIZES, min_p=MIN_P, bits=bits)
    output = write_output(tmp_path / "out", table)
    report = validate_output(output)
    assert report.ok, report
    assert (report.rows, report.tokens) == (3, 15)
    assert export_axolotl(output, tmp_path / "axolotl", k=8) == 3
    assert export_distillkit(output, tmp_path / "distillkit", k=8) == 3


@pytest.mark.parametrize("rule", FAULTS)
def test_what_breaks_their_rules_is_named(tmp_path: Path, rule: str) -> None:
    broken = FAULTS[rule](make_table(some_logits(), SIZES, min_p=MIN_P))
    report = validate_output(write_output(tmp_path / "out", broken))
    assert rule in report.counts, report


# Training -----------------------------------------------------------------------------------------


def make_batch(output: Path) -> dict[str, Any]:
    return collate_logits(list(LogitIterableDataset(output, seed=None, rank=0, world_size=1)))


SHAPES = {
    "peaked": torch.randn(60, generator=torch.Generator().manual_seed(4)) * 4,
    "natural": torch.randn(60, generator=torch.Generator().manual_seed(5)) * 2,
    "flat": torch.randn(60, generator=torch.Generator().manual_seed(6)) * 0.1,
}


@pytest.mark.parametrize("min_p", [0.02, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_the_loss_is_that_of_the_whole_distribution_on_average(
    tmp_path: Path, shape: str, min_p: float
) -> None:
    """2,000 conversations of one distribution; 6 standard deviations, a false alarm in 1e6.

    A coordinate of the tail deviates by sqrt(p (share - p)), share at most min_p. Seeds are fixed.
    """
    count, teacher = 2000, SHAPES[shape]
    table = make_table(teacher.expand(count, -1), [1] * count, min_p=min_p)
    batch = make_batch(write_output(tmp_path / "out", table))
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
    losses = []
    for name, min_p in (("compact", 0.05), ("plain", None)):
        folder = write_output(tmp_path / name, make_table(teacher, SIZES, min_p=min_p))
        options = {"divergence": divergence, "tail": tail}
        losses.append(distillation_loss(-some_logits(), make_batch(folder), **options))
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=2e-2)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"divergence": "reverse_kl"}, "reverse_kl needs the tail's logits"),
        ({"divergence": "jsd", "tail": "renormalized"}, "jsd needs the tail's logits"),
        ({"temperature": 2.0}, "temperature 2 needs the tail's logits"),
        ({"temperature": 2.0, "tail": "ghost"}, "temperature 2 needs the tail's logits"),
    ],
)
def test_what_needs_the_logits_of_the_tail_is_refused(
    output: Path, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(LogitsError, match=why):
        distillation_loss(some_logits(), make_batch(output), **options)

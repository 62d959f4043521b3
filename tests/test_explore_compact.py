"""Compact rows as the explorer reads, scores, checks and shows them."""

import itertools

import datasets
import numpy as np
import pytest
import torch
from conftest import TEACHER
from small_output import STORED, write_parts
from sparse_batches import randn

import explore_logits as explore
import extract_logits as extract
from explore_logits import compare_outputs, distillation_loss, logits_to_probs

VOCAB, MIN_P, SIZES = 700, 0.01, [5, 1, 9]
LOGITS = 3 * randn(15, VOCAB, seed=1)
LOGITS[4] *= 0.01  # flat
LOGITS[7, 2:] = -200.0  # certain
PLAIN = {name: STORED[name] for name in ("top_p", "top_p_max", "sampled_n")}


def write(folder, logits=LOGITS, sizes=SIZES, *, min_p=MIN_P, bits=16, fault=None):
    """Write the extractor's rows of `sizes` tokens each, of (N, V) logits, as an output of a part.

    The actual tokens are ids 0, 1, … of the vocabulary. No threshold: plain rows.
    """
    settings = STORED | {"vocab_size": logits.shape[1], "logit_bits": bits}
    if min_p is not None:
        settings = {name: settings[name] for name in settings if name not in PLAIN}
        settings |= {"format_version": 2, "min_p": min_p}
    texts = [np.arange(size + 1, dtype=np.int32) for size in sizes]
    encoded = [extract.EncodedRow(n, ids % logits.shape[1], ids[1:]) for n, ids in enumerate(texts)]
    index = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
    position = torch.from_numpy(np.concatenate([row.token_positions for row in encoded])).long()
    tokens = extract.extract_tokens(logits, index, position, seed=7, min_p=min_p, **PLAIN)
    result = extract.quantize_tokens(tokens, logits[:, 0].float(), bits=bits).to_host()
    schema = explore.shard_schema(store_tokens=True, compact=min_p is not None, settings={})
    packed = extract.cpu_postprocess_batch(result, extract.Batch(encoded), schema=schema)
    assert not packed.unusable
    rows = packed.table.select(schema.names).to_pylist()
    if fault is not None:
        row, column, change = fault
        rows[row][column] = change(rows[row][column])
    return write_parts(folder, rows, settings=settings, rows_per_part=len(rows))


def make_batch(*outputs):
    rows = [row for output in outputs for row in explore.LogitIterableDataset(output, seed=None)]
    return explore.collate_logits(rows)


@pytest.fixture
def output(tmp_path):
    return write(tmp_path / "out")


def test_a_sample_holds_what_the_row_stores(output):
    sample = explore.get_sample(output)
    exact = LOGITS[:5].double().softmax(-1).numpy()
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


def test_a_token_without_a_logit_has_at_most_the_threshold(output):
    exact = LOGITS.double().softmax(-1).numpy()
    seen = set()
    for row, first in ((0, 0), (2, 6)):
        for token in explore.execute_analysis(output, row, model=TEACHER).tokens:
            p = exact[first + token.t, token.id]
            seen.add(token.where)
            assert token.exact == (token.where == "nucleus") == (p >= MIN_P)
            assert token.probability <= (p * 1.001 if token.exact else MIN_P * 1.000001)
            assert token.probability >= p * 0.999
            assert token.rank <= 1 + (exact[first + token.t] > p).sum()
    assert len(seen) > 1


def test_every_way_to_show_them_works(output, tmp_path):
    sample = explore.get_sample(output)
    explore.print_top_tokens(sample, 4)
    explore.plot_logit_distribution(sample, 4)
    explore.plot_nucleus_vs_sampled(sample)
    explore.plot_nucleus_sizes(sample)
    stats = explore.compute_dataset_stats(output)
    assert (stats.tokens, stats.capped) == (15, None)
    assert explore.analyze_nucleus_sizes(output).min == 0
    assert stats.mean_mass + stats.mean_tail_mass == pytest.approx(1)
    page = tmp_path / "p.html"
    assert explore.main([str(output), "--model", str(TEACHER), "--html", str(page)]) == 0
    assert "&lt;1.0%" in page.read_text(encoding="utf-8")


def test_compared_with_plain_rows_of_the_same_teacher_they_do_not_differ(output, tmp_path):
    plain = write(tmp_path / "plain", min_p=None)
    for pair in ((output, plain), (plain, output)):
        found = compare_outputs(*pair)
        assert found.tokens == 15
        assert found.max_divergence < 1e-4
    other = write(tmp_path / "other", -LOGITS)
    assert compare_outputs(output, other).mean_divergence > 0.1
    flat = [write(tmp_path / f"{t}", LOGITS[[4, 4]], [2], min_p=t) for t in (None, 0.1)]
    for pair in (flat, flat[::-1], 2 * flat[1:]):  # one has no nucleus at all
        assert compare_outputs(*pair).max_divergence < 0.3


@pytest.mark.parametrize("bits", [4, 8, 13, 16])
def test_what_the_extractor_wrote_is_valid_and_exported(tmp_path, bits):
    output = write(tmp_path / "out", LOGITS - 100, bits=bits)  # as GPT-2's, all below 0
    report = explore.validate_output(output)
    assert (report.ok, report.rows, report.tokens) == (True, 3, 15), report
    how = {"k": 8, "labels_at": "predicting"}
    assert explore.export_distillkit(output, tmp_path / "distillkit", **how) == 3
    first = datasets.load_from_disk(str(tmp_path / "distillkit"))[0]
    stored = np.array(first["compressed_logprobs"][4], np.uint8).view("<f4")
    assert stored[0] > -1e-5, "no nucleus: the text's token, not eight that DistillKit would scale"
    with np.errstate(divide="raise"):  # where no token is kept, there is nothing to normalise
        assert explore.export_axolotl(output, tmp_path / "normal", k=8, normalize=True) == 3


FAULTS = {  # rule: row, column, what its list becomes
    "duplicate": (0, "sampled_indices_low", lambda v: [int(LOGITS[0].argmax()), *v[1:]]),
    "threshold": (0, "top_min", lambda v: [v[0] - 3, *v[1:]]),
    "tail count": (2, "sampled_counts", lambda v: [v[0] - 5, v[1] + 5, *v[2:]]),
    "order": (2, "sampled_indices_low", lambda v: v[1::-1] + v[2:]),
    "id": (2, "sampled_indices_low", lambda v: [*v[:-1], VOCAB]),
    "length": (1, "sampled_counts", lambda v: [v[0] + 1]),
}


@pytest.mark.parametrize("rule", FAULTS)
def test_what_breaks_their_rules_is_named(tmp_path, rule):
    report = explore.validate_output(write(tmp_path / "out", fault=FAULTS[rule]))
    assert rule in report.counts, report


@pytest.mark.parametrize("min_p", [0.02, 0.1])
@pytest.mark.parametrize("scale", [4, 2, 0.1], ids=["peaked", "natural", "flat"])
def test_the_gradient_is_that_of_the_whole_distribution_on_average(tmp_path, scale, min_p):
    """2,000 conversations of one distribution; 6 standard deviations, a false alarm in 1e6.

    A coordinate of the tail deviates by sqrt(p (share - p)), share at most min_p. Seeds are fixed.
    """
    count = 2000
    teacher = scale * randn(60, seed=4)
    batch = make_batch(write(tmp_path, teacher.expand(count, -1), [1] * count, min_p=min_p))
    student = randn(60, seed=9).double()
    leaf = student.repeat(count, 1).requires_grad_()
    distillation_loss(leaf, batch, reduction="sum").backward()
    p = teacher.double().softmax(-1)
    deviation = torch.where(p < min_p, (min_p * p).sqrt(), 0.0)
    off = (leaf.grad.mean(0) - (student.softmax(-1) - p)).abs()
    assert (off <= 6 * deviation / count**0.5 + 1e-4).all()  # 16 bits round by less than that
    assert leaf.grad.var(0).sum() <= 1.1 * (deviation**2).sum() + 1e-6
    assert leaf.grad.std(0).max() > 1e-3  # they do differ


def test_what_needs_no_tail_is_that_of_plain_rows(tmp_path):
    """Where both keep the same nucleus: a teacher with eight probable tokens and equal others."""
    teacher = torch.full((15, VOCAB), -9.0)
    teacher[:, 100:108] = torch.arange(8.0) / 100
    batches = [make_batch(write(tmp_path / str(p), teacher, min_p=p)) for p in (0.05, None)]
    for divergence, tail in itertools.product(explore.DIVERGENCES, ("ghost", "ignore")):
        how = {"divergence": divergence, "tail": tail}
        compact, plain = (float(distillation_loss(-LOGITS, batch, **how)) for batch in batches)
        assert compact == pytest.approx(plain, rel=2e-2), how


def test_what_needs_the_logits_of_the_tail_is_refused(output):
    for options in ({"divergence": "reverse_kl"}, {"divergence": "jsd", "tail": "renormalized"},
                    {"temperature": 2.0, "tail": "ghost"}):  # fmt: skip
        with pytest.raises(explore.LogitsError, match="needs the tail's logits"):
            distillation_loss(LOGITS, make_batch(output), **options)


def test_beside_plain_rows_in_one_batch_each_counts_as_it_does_alone(output, tmp_path):
    plain = write(tmp_path / "plain", min_p=None)
    together = distillation_loss(LOGITS.repeat(2, 1) / 2, make_batch(output, plain))
    alone = [distillation_loss(LOGITS / 2, make_batch(one)) for one in (output, plain)]
    torch.testing.assert_close(together, sum(alone) / 2)


def test_a_token_without_a_nucleus_is_no_other_likeliest_token(tmp_path):
    flat = LOGITS[[4, 4]], [2]  # of which compact rows have no nucleus
    for name, rows in (("some", (LOGITS, SIZES)), ("none", flat)):
        plain, compact = (write(tmp_path / f"{name}{t}", *rows, min_p=t) for t in (None, 0.1))
        counts = np.concatenate([block.top.counts for block in explore.iter_blocks(compact)])
        stats, seen = explore.compute_dataset_stats(compact), compare_outputs(plain, compact)
        assert seen.nuclei == (counts > 0).sum() == counts.size - stats.without_nucleus
        assert (counts == 0).any()
        assert seen.same_first == (1 if name == "some" else None)
        assert f"of {seen.nuclei} tokens with a nucleus in both" in str(seen)
        for label in ("likeliest token", "actual is likeliest"):
            assert stats.facts()[label].startswith("≥ ")
            assert "≥" not in explore.compute_dataset_stats(plain).facts()[label]

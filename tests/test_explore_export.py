"""Exports for other trainers, decoded here by what those trainers publish about their layouts.

The trainers themselves are run by `make clients`.
"""

import math

import datasets
import numpy as np
import pytest
import torch
import yaml
from small_output import STORED, write_output
from sparse_batches import exact_block, make_row, randn

import explore_logits as explore
from explore_logits import LogitsError, export_axolotl, export_distillkit

SMALL = {**STORED, "vocab_size": 24, "top_p_max": 8, "sampled_n": 2}
K = 11  # more than the small rows hold of a token


@pytest.fixture
def output(tmp_path):
    """Return an output of 20 rows that stores its tokens."""
    return write_output(tmp_path / "out", settings=STORED)


def load(folder):
    """Return the rows of an export as both trainers load it."""
    return list(datasets.load_from_disk(str(folder)))


def with_wanted(output, folder):
    """Yield each row of an export, and by predicting position what is stored there.

    These are its k likeliest ids, their log-probabilities, and the least likely id of all.
    """
    for row, sample in zip(load(folder), explore.iter_samples(output), strict=True):
        wanted = {}
        for t, position in enumerate(sample["token_positions"].tolist()):
            ids, logits = explore.dequantize_top_logits(sample, t)
            tail, tail_logits = explore.dequantize_sampled_logits(sample, t)
            least = tail[tail_logits.argmin()]
            wanted[position - 1] = ids[:K].tolist(), (logits - sample["logsumexp"][t])[:K], least
        yield row, wanted


def test_axolotl_columns_hold_the_nucleus_at_the_position_that_predicts(output, tmp_path):
    assert export_axolotl(output, tmp_path / "axolotl", k=K) == 20
    columns = "input_ids attention_mask labels target_token_ids target_logprobs target_mask"
    for row, wanted in with_wanted(output, tmp_path / "axolotl"):
        assert list(row) == columns.split()
        assert len({len(values) for values in row.values()}) == 1
        for position, mask in enumerate(row["target_mask"]):
            ids, log_probs, least = wanted.get(position, ([], [], 0))
            assert mask == [1] * len(ids) + [0] * (K - len(ids))
            # its kd_normalize_topk sums the student over all k ids, whatever the mask says
            assert row["target_token_ids"][position] == ids + [least] * (K - len(ids))
            found = row["target_logprobs"][position]
            np.testing.assert_allclose(found[: len(ids)], log_probs, atol=1e-5)
            assert set(found[len(ids) :]) <= {-1e9}
            if ids:
                assert row["labels"][position + 1] == row["input_ids"][position + 1]


def test_axolotls_older_trainer_gets_them_one_position_later(output, tmp_path):
    for at in ("predicting", "predicted"):
        export_axolotl(output, tmp_path / at, k=K, at=at)
    pairs = zip(load(tmp_path / "predicting"), load(tmp_path / "predicted"), strict=True)
    assert all(a["target_token_ids"][:-1] == b["target_token_ids"][1:] for a, b in pairs)


ALL = (3 * randn(6, 40, seed=1), {"top_p_max": 16, "sampled_n": 24})
EQUAL_TAIL = torch.nn.functional.pad(ALL[0][:, :8].abs() + 1, (0, STORED["vocab_size"] - 8))


@pytest.mark.parametrize(
    ("teacher", "kept", "temperature", "normalize"),
    [(*ALL, 2.0, False), (*ALL, 2.0, True),
     (EQUAL_TAIL, {"top_p_max": 8, "sampled_n": 0}, 2.0, False)],
)  # fmt: skip
def test_axolotls_targets_are_tempered_and_normalised_as_its_kernel_takes_them(
    teacher, kept, temperature, normalize, output, tmp_path, monkeypatch
):
    row = make_row(exact_block(teacher, top_p=1.0, **kept))
    monkeypatch.setattr("explore_logits.LogitIterableDataset", lambda *_, **__: [row])
    export_axolotl(output, tmp_path / "a", k=8, temperature=temperature, normalize=normalize)
    found = load(tmp_path / "a")[0]
    ids = torch.tensor(found["target_token_ids"])[:-1]
    log_p = (teacher / temperature).log_softmax(-1).gather(1, ids)
    log_p = log_p.log_softmax(-1) if normalize else log_p
    log_probs = torch.tensor(found["target_logprobs"])[:-1]
    torch.testing.assert_close(log_probs, log_p, atol=2e-5, rtol=0)


@pytest.mark.parametrize("export", [export_axolotl, export_distillkit])
def test_an_export_is_whole_in_a_new_folder_or_not_there(output, tmp_path, export):
    folder, damaged = tmp_path / "new" / "export", output / "data" / "part-00002.parquet"
    sound = damaged.read_bytes()
    damaged.write_bytes(sound[:100])
    with pytest.raises(LogitsError, match="part-00002"):
        export(output, folder)
    assert list((tmp_path / "new").iterdir()) == []
    damaged.write_bytes(sound)
    assert export(output, folder) == 20
    files = sorted(folder.iterdir())
    with pytest.raises(LogitsError, match="is not empty: name a new folder"):
        export(output, folder)
    assert sorted(folder.iterdir()) == files


def test_rows_of_an_export_are_written_together_fewer_where_they_are_long():
    rows = [{"ids": np.zeros(2 * size, np.uint8)} for size in (3, 1, 9, 1, 1, 1, 1, 1)]
    chunks = explore.gather_rows(iter(rows), most=3, most_bytes=8)
    assert [len(chunk) for chunk in chunks] == [2, 1, 3, 2]


def decode_distillkit(row, position, vocab):
    """Return ids and log-probabilities at a position, as bitpack.py reads them: high bits first."""
    bits = math.ceil(math.log2(vocab))
    packed = row["bytepacked_indices"][position]
    assert len(packed) == -(-K * bits // 8)
    stream = "".join(f"{byte:08b}" for byte in packed)
    ids = [int(stream[i * bits : (i + 1) * bits], 2) for i in range(K)]
    values = torch.tensor(row["compressed_logprobs"][position], dtype=torch.uint8)
    return ids, values.view(torch.float32).numpy()


@pytest.mark.parametrize("labels_at", ["predicted", "predicting"])
@pytest.mark.parametrize("settings", [STORED, SMALL])
def test_distillkit_rows_decode_by_its_own_rules(labels_at, settings, tmp_path):
    """Its symmetric_uniform takes log(1 - sum over ids), of teacher and student, masked or not."""
    output = write_output(tmp_path / "out", settings=settings)
    kit, vocab = tmp_path / "kit", settings["vocab_size"]
    assert export_distillkit(output, kit, k=K, labels_at=labels_at) == 20
    layout = yaml.safe_load((kit / "compression_config.yaml").read_text())
    told = {"d": vocab, "k": K, "exact_k": K, "exact_dtype": "float32"}
    assert layout == layout | told | {"residual_bins": [], "delta_encoding": False}
    for row, wanted in with_wanted(output, kit):
        size = len(row["input_ids"]) - 1
        assert len(row["compressed_logprobs"]) == len(row["bytepacked_indices"]) == size
        for position in range(size):
            ids, log_probs = decode_distillkit(row, position, vocab)
            assert (np.diff(log_probs) <= 0).all(), "by descending log-probability"
            assert np.exp(log_probs).sum(dtype=np.float32) < 1, "log(1 - sum) must be finite"
            assert len(set(ids)) == K, "none is summed twice"
            assert max(ids) < vocab
            if position in wanted:
                right, right_log_probs, _ = wanted[position]
                assert ids[: len(right)] == right
                np.testing.assert_allclose(log_probs[: len(right)], right_log_probs, atol=1e-5)
                assert (log_probs[len(right) :] < -99).all()
            else:
                follows = row["input_ids"][position + 1]
                assert (ids[0] == follows) == (row["labels"][position] >= 0)
                assert log_probs[0] == np.float32(-1e-6)
                assert row["labels"][position] >= 0 or follows not in ids, "no sure thing"


def test_distillkits_mask_and_length_can_be_had_as_its_trainer_wants_them(output, tmp_path):
    export_distillkit(output, tmp_path / "plain", k=K)
    export_distillkit(output, tmp_path / "ready", k=K, labels_at="predicting", max_length=7)
    ready = with_wanted(output, tmp_path / "ready")
    for plain, (row, wanted) in zip(load(tmp_path / "plain"), ready, strict=True):
        assert {len(values) for values in row.values()} == {7}, "prepacked: true stacks them"
        size = min(len(plain["input_ids"]) - 1, 7)
        assert row["attention_mask"] == [1] * size + [0] * (7 - size)
        for name in ("input_ids", "compressed_logprobs", "bytepacked_indices"):
            assert row[name][:size] == plain[name][:size]
        masked = {position for position in range(7) if row["labels"][position] >= 0}
        assert masked == {position for position in wanted if position < size}

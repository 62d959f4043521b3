"""Exports for other trainers, decoded here by what those trainers publish about their layouts.

The trainers themselves are run by `make clients`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from small_output import SETTINGS, random_rows, write_output
from sparse_batches import exact_block, make_row

import explore_logits as explore
from explore_logits import LogitsError, export_axolotl, export_distillkit, get_sample

STORED: dict[str, Any] = {**SETTINGS, "store_tokens": True}
K = 9


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Return an output of 20 rows that stores its tokens."""
    return write_output(tmp_path / "out", random_rows(20, settings=STORED), settings=STORED)


def load(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of an export as both trainers load it."""
    return list(datasets.load_from_disk(str(folder)))


def wanted_entries(output: Path, row: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Return by predicting position the ids and log-probabilities of a row's k likeliest."""
    sample = get_sample(explore.load_logit_dataset(output), row)
    found = {}
    for t, position in enumerate(sample["token_positions"].tolist()):
        ids, logits = explore.dequantize_top_logits(sample, t)
        found[position - 1] = ids[:K], (logits - sample["logsumexp"][t])[:K]
    return found


def test_axolotl_columns_hold_the_nucleus_at_the_position_that_predicts(
    output: Path, tmp_path: Path
) -> None:
    assert export_axolotl(output, tmp_path / "axolotl", k=K) == 20
    columns = "input_ids attention_mask labels target_token_ids target_logprobs target_mask"
    for i, row in enumerate(load(tmp_path / "axolotl")):
        assert list(row) == columns.split()
        assert len({len(values) for values in row.values()}) == 1
        wanted = wanted_entries(output, i)
        for position, mask in enumerate(row["target_mask"]):
            ids, log_probs = wanted.get(position, (np.zeros(0), np.zeros(0)))
            assert mask == [1] * ids.size + [0] * (K - ids.size)
            assert row["target_token_ids"][position][: ids.size] == ids.tolist()
            found = row["target_logprobs"][position]
            np.testing.assert_allclose(found[: ids.size], log_probs, atol=1e-5)
            assert set(found[ids.size :]) <= {-1e9}
            if ids.size:
                assert row["labels"][position + 1] == row["input_ids"][position + 1]


def test_axolotls_older_trainer_gets_them_one_position_later(output: Path, tmp_path: Path) -> None:
    for at in ("predicting", "predicted"):
        export_axolotl(output, tmp_path / at, k=K, at=at)
    pairs = zip(load(tmp_path / "predicting"), load(tmp_path / "predicted"), strict=True)
    assert all(a["target_token_ids"][:-1] == b["target_token_ids"][1:] for a, b in pairs)
    for wrong, named in (({"at": "here"}, "predicting, predicted"), ({"temperature": 0.0}, "0.0")):
        with pytest.raises(LogitsError, match=named):
            export_axolotl(output, tmp_path / "wrong", **wrong)


@pytest.mark.parametrize(("temperature", "normalize"), [(1.0, False), (2.0, False), (2.0, True)])
def test_axolotls_targets_are_tempered_and_normalised_as_its_kernel_takes_them(
    temperature: float, normalize: bool, output: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    teacher = 3 * torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    row = make_row(exact_block(teacher, top_p=1.0, top_p_max=16, sampled_n=24))
    monkeypatch.setattr("explore_logits.LogitIterableDataset", lambda *_, **__: [row])
    export_axolotl(output, tmp_path / "a", k=8, temperature=temperature, normalize=normalize)
    found = load(tmp_path / "a")[0]
    ids = torch.tensor(found["target_token_ids"])[:-1]
    log_p = (teacher / temperature).log_softmax(-1).gather(1, ids)
    log_p = log_p.log_softmax(-1) if normalize else log_p
    log_probs = torch.tensor(found["target_logprobs"])[:-1]
    torch.testing.assert_close(log_probs, log_p, atol=2e-5, rtol=0)


def test_ids_where_nothing_is_are_the_least_likely_ones(output: Path, tmp_path: Path) -> None:
    # axolotl's kd_normalize_topk sums the student over all k ids, whatever the mask says
    export_axolotl(output, tmp_path / "a", k=255)
    sample = get_sample(explore.load_logit_dataset(output), 0)
    row = load(tmp_path / "a")[0]
    for t, position in enumerate(sample["token_positions"].tolist()):
        ids = np.array(row["target_token_ids"][position - 1])
        count = sample["top_counts"][t]
        least = sample["sampled_indices"][t][sample["sampled_logits_quantized"][t].argmin()]
        assert set(ids[count:].tolist()) == {least}


@pytest.mark.parametrize("export", [export_axolotl, export_distillkit])
def test_an_export_is_whole_in_a_new_folder_or_not_there(
    output: Path, tmp_path: Path, export: Any
) -> None:
    folder = tmp_path / "new" / "export"
    for k in (0, True, 2.0, 2**40):
        with pytest.raises(LogitsError, match="keeps 1 to 262144 entries"):
            export(output, folder, k=k)
    damaged = tmp_path / "out" / "data" / "part-00002.parquet"
    sound = damaged.read_bytes()
    damaged.write_bytes(sound[:100])
    with pytest.raises(LogitsError, match="part-00002"):
        export(output, folder)
    damaged.write_bytes(sound)
    assert list((tmp_path / "new").iterdir()) == []
    assert export(output, folder) == 20
    files = sorted(folder.iterdir())
    with pytest.raises(LogitsError, match="is not empty: name a new folder"):
        export(output, folder)
    assert sorted(folder.iterdir()) == files


def test_rows_of_an_export_are_written_many_at_a_time_or_few_where_they_are_long() -> None:
    rows = [{"ids": np.zeros(size, np.uint8), "there": np.ones(size, np.uint8)} for size in
            (3, 1, 9, 1, 1, 1, 1, 1)]  # fmt: skip
    chunks = explore.gather_rows(iter(rows), most=3, most_bytes=8)
    assert [[row["ids"].size for row in chunk] for chunk in chunks] == [
        [3, 1],
        [9],
        [1, 1, 1],
        [1, 1],
    ]


def decode_distillkit(
    row: dict[str, Any], position: int, vocab: int = STORED["vocab_size"]
) -> tuple[list[int], np.ndarray]:
    """Return ids and log-probabilities at a position, as bitpack.py reads them: high bits first."""
    bits = math.ceil(math.log2(vocab))
    packed = row["bytepacked_indices"][position]
    assert len(packed) == -(-K * bits // 8)
    stream = "".join(f"{byte:08b}" for byte in packed)
    ids = [int(stream[i * bits : (i + 1) * bits], 2) for i in range(K)]
    values = torch.tensor(row["compressed_logprobs"][position], dtype=torch.uint8)
    return ids, values.view(torch.float32).numpy()


def test_distillkit_rows_decode_by_its_own_rules(output: Path, tmp_path: Path) -> None:
    assert export_distillkit(output, tmp_path / "kit", k=K) == 20
    lines = (tmp_path / "kit" / "compression_config.yaml").read_text().splitlines()
    wanted_lines = (
        f"d: {STORED['vocab_size']}; k: {K}; exact_k: {K}; exact_dtype: float32; "
        "residual_bins: []; delta_encoding: false"
    )
    assert set(wanted_lines.split("; ")) <= set(lines)
    for i, row in enumerate(load(tmp_path / "kit")):
        wanted = wanted_entries(output, i)
        size = len(row["input_ids"]) - 1
        assert len(row["compressed_logprobs"]) == len(row["bytepacked_indices"]) == size
        for position in range(size):
            ids, log_probs = decode_distillkit(row, position)
            assert (np.diff(log_probs) <= 0).all(), "by descending log-probability"
            assert np.exp(log_probs).sum(dtype=np.float32) < 1, "log(1 - sum) must be finite"
            if position in wanted:
                kept = wanted[position][0].size
                assert ids[:kept] == wanted[position][0].tolist()
                np.testing.assert_allclose(log_probs[:kept], wanted[position][1], atol=1e-5)
                assert (log_probs[kept:] < -99).all()
            else:
                follows = row["input_ids"][position + 1]
                assert (ids[0] == follows) == (row["labels"][position] >= 0)
                assert log_probs[0] == np.float32(-1e-6)


@pytest.mark.parametrize("labels_at", ["predicted", "predicting"])
def test_a_students_probabilities_of_distillkits_ids_are_no_sure_thing(
    labels_at: str, tmp_path: Path
) -> None:
    # Its symmetric_uniform takes log(1 - their sum), also where the mask leaves the result out.
    settings = {**STORED, "vocab_size": 24, "top_p_max": 8, "sampled_n": 2}
    output = write_output(tmp_path / "out", random_rows(20, settings=settings), settings=settings)
    export_distillkit(output, tmp_path / "kit", k=K, labels_at=labels_at)
    for i, row in enumerate(load(tmp_path / "kit")):
        wanted = wanted_entries(output, i)
        for position in range(len(row["input_ids"]) - 1):
            ids, _ = decode_distillkit(row, position, settings["vocab_size"])
            assert len(set(ids)) == K, "none is summed twice"
            assert max(ids) < settings["vocab_size"]
            if row["labels"][position] < 0 and position not in wanted:
                assert row["input_ids"][position + 1] not in ids


def test_distillkits_mask_and_length_can_be_had_as_its_trainer_wants_them(
    output: Path, tmp_path: Path
) -> None:
    export_distillkit(output, tmp_path / "plain", k=K)
    export_distillkit(output, tmp_path / "ready", k=K, labels_at="predicting", max_length=7)
    pairs = zip(load(tmp_path / "plain"), load(tmp_path / "ready"), strict=True)
    for i, (plain, row) in enumerate(pairs):
        assert {len(values) for values in row.values()} == {7}, "prepacked: true stacks them"
        size = min(len(plain["input_ids"]) - 1, 7)
        assert row["attention_mask"] == [1] * size + [0] * (7 - size)
        for name in ("input_ids", "compressed_logprobs", "bytepacked_indices"):
            assert row[name][:size] == plain[name][:size]
        masked = {position for position in range(7) if row["labels"][position] >= 0}
        assert masked == {position for position in wanted_entries(output, i) if position < size}

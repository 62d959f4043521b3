"""Exports for other trainers, decoded here by what those trainers publish about their layouts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_output import SETTINGS, random_rows, write_output

from explore_logits import (
    LogitsError,
    dequantize_top_logits,
    export_axolotl,
    export_distillkit,
    get_sample,
    load_logit_dataset,
)

STORED: dict[str, Any] = {**SETTINGS, "store_tokens": True}
K = 9


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Return an output of 20 rows that stores its tokens."""
    return write_output(tmp_path / "out", random_rows(20, settings=STORED), settings=STORED)


def decode_bits(data: list[int], bits: int, count: int) -> list[int]:
    """Read a stream of ids, the highest bit first, as DistillKit's bitpack.py does."""
    stream = "".join(f"{byte:08b}" for byte in data)
    return [int(stream[i * bits : (i + 1) * bits], 2) for i in range(count)]


def test_axolotl_columns_hold_the_nucleus_at_the_position_that_predicts(
    output: Path, tmp_path: Path
) -> None:
    assert export_axolotl(output, tmp_path / "axolotl", k=K) == 20
    rows = pq.read_table(tmp_path / "axolotl").to_pylist()
    dataset = load_logit_dataset(output)
    for i, row in enumerate(rows):
        sample = get_sample(dataset, i)
        assert list(row) == [
            *("input_ids", "attention_mask", "labels"),
            *("target_token_ids", "target_logprobs", "target_mask"),
        ]
        size = len(row["input_ids"])
        assert all(len(values) == size for values in row.values())
        predicting = set((sample["token_positions"] - 1).tolist())
        for position in range(size):
            mask = np.array(row["target_mask"][position])
            assert mask.size == K
            if position not in predicting:
                assert not mask.any()
                continue
            t = int(np.flatnonzero(sample["token_positions"] - 1 == position)[0])
            ids, logits = dequantize_top_logits(sample, t)
            kept = min(ids.size, K)
            assert mask.sum() == kept
            assert row["target_token_ids"][position][:kept] == ids[:kept].tolist()
            np.testing.assert_allclose(
                row["target_logprobs"][position][:kept],
                (logits - sample["logsumexp"][t])[:kept],
                atol=1e-5,
            )
            assert row["labels"][position + 1] == row["input_ids"][position + 1]


def test_axolotls_older_trainer_gets_them_one_position_later(output: Path, tmp_path: Path) -> None:
    for at in ("predicting", "predicted"):
        export_axolotl(output, tmp_path / at, k=K, at=at)
    early, late = (
        pq.read_table(tmp_path / at)["target_token_ids"].to_pylist()
        for at in ("predicting", "predicted")
    )
    assert all(a[:-1] == b[1:] for a, b in zip(early, late, strict=True))
    with pytest.raises(LogitsError, match="predicting, predicted"):
        export_axolotl(output, tmp_path, at="here")


@pytest.mark.parametrize("export", [export_axolotl, export_distillkit])
def test_an_export_is_whole_in_a_new_folder_or_not_there(
    output: Path, tmp_path: Path, export: Any
) -> None:
    folder = tmp_path / "new" / "export"
    for k in (0, -1, 2.5):
        with pytest.raises(LogitsError, match="keeps at least 1 entry"):
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


def test_axolotls_published_loss_reads_the_export(output: Path, tmp_path: Path) -> None:
    # Σ p (log p - log q) over the masked entries of each position, as its forward_kl.py says
    export_axolotl(output, tmp_path / "axolotl", k=255)
    row = pq.read_table(tmp_path / "axolotl").to_pylist()[0]
    ids, log_p, mask = (
        torch.tensor(row[name]) for name in ("target_token_ids", "target_logprobs", "target_mask")
    )
    log_q = torch.zeros(len(row["input_ids"]), STORED["vocab_size"]).log_softmax(-1)
    chosen = mask.bool()
    terms = log_p.exp() * (log_p - log_q.gather(1, ids.long()))
    entropy = 0.0
    sample = get_sample(load_logit_dataset(output), 0)
    for t in range(sample["num_tokens"]):
        _, logits = dequantize_top_logits(sample, t)
        log_probs = logits - sample["logsumexp"][t]
        entropy += float((np.exp(log_probs) * (log_probs + math.log(STORED["vocab_size"]))).sum())
    assert float(terms[chosen].sum()) == pytest.approx(entropy, abs=1e-3)


def test_distillkit_rows_decode_by_its_own_rules(output: Path, tmp_path: Path) -> None:
    assert export_distillkit(output, tmp_path / "kit", k=K) == 20
    table = pq.read_table(tmp_path / "kit" / "data_0.parquet")
    bytes_type = pa.list_(pa.list_(pa.uint8()))
    assert table.schema.field("input_ids").type == pa.list_(pa.uint64())
    assert table.schema.field("compressed_logprobs").type == bytes_type
    assert table.schema.field("bytepacked_indices").type == bytes_type
    bits = math.ceil(math.log2(STORED["vocab_size"]))
    dataset = load_logit_dataset(output)
    for i, row in enumerate(table.to_pylist()):
        sample = get_sample(dataset, i)
        size = len(row["input_ids"]) - 1
        assert len(row["compressed_logprobs"]) == len(row["bytepacked_indices"]) == size
        owner = {int(p) - 1: t for t, p in enumerate(sample["token_positions"])}
        for position in range(size):
            packed = row["bytepacked_indices"][position]
            assert len(packed) == -(-K * bits // 8)
            ids = decode_bits(packed, bits, K)
            values = torch.tensor(row["compressed_logprobs"][position], dtype=torch.uint8)
            log_probs = values.view(torch.float32).numpy()
            assert log_probs.size == K
            assert (np.diff(log_probs) <= 0).all(), "by descending log-probability"
            if position in owner:
                wanted, logits = dequantize_top_logits(sample, owner[position])
                kept = min(wanted.size, K)
                assert ids[:kept] == wanted[:kept].tolist()
                expected = (logits - sample["logsumexp"][owner[position]])[:kept]
                np.testing.assert_allclose(log_probs[:kept], expected, atol=1e-5)
                assert (log_probs[kept:] == -100).all()
            else:
                assert (ids[0], log_probs[0]) == (row["input_ids"][position + 1], 0)


def test_distillkits_configuration_says_how_the_bytes_were_made(
    output: Path, tmp_path: Path
) -> None:
    export_distillkit(output, tmp_path / "kit", k=K)
    lines = (tmp_path / "kit" / "compression_config.yaml").read_text().splitlines()
    config = dict(line.split(": ") for line in lines)
    assert config["d"] == str(STORED["vocab_size"])
    assert config["k"] == config["exact_k"] == str(K)
    assert config["exact_dtype"] == "float32"
    assert config["residual_bins"] == "[]"
    assert config["delta_encoding"] == "false"

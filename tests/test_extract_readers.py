"""What other programs read from a shard: every common reader gives back what was stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import run_code
from small_output import SETTINGS, random_rows, rows_to_table

from extract_logits import StreamingHFUploader, write_part

# Settings that lead to other encodings, or to lists without an entry.
SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "tokens": {"store_tokens": True},
    "8 bits": {"logit_bits": 8},
    "large vocabulary": {"vocab_size": 100_000},
    "no tail": {"sampled_n": 0},
}


@pytest.fixture(params=SHAPES, scope="module")
def shard(request: Any, tmp_path_factory: Any) -> tuple[Path, list[dict[str, Any]]]:
    """A shard as the extractor writes it, and the rows it was made from."""
    settings = {**SETTINGS, **SHAPES[request.param]}
    rows = random_rows(6 if settings["vocab_size"] > 600 else 130, settings=settings, tokens=5)
    table = rows_to_table(rows, settings=settings)
    folder = tmp_path_factory.mktemp("shard")
    write_part(folder / "part-00000.parquet", table, table.schema)
    return folder / "part-00000.parquet", table.to_pylist()


def load(path: Path, **how: Any) -> Any:
    return datasets.load_dataset("parquet", data_files=str(path), split="train", **how)


READERS: dict[str, Callable[[Path], Iterable[Mapping[str, Any]]]] = {
    "pyarrow": lambda path: pq.read_table(path).to_pylist(),
    "pandas": lambda path: pd.read_parquet(path).to_dict("records"),
    "datasets": lambda path: load(path, cache_dir=str(path.parent / "datasets")),
    "a stream": lambda path: load(path, streaming=True),
    "polars": lambda path: pl.read_parquet(path).to_dicts(),
    "lazy polars": lambda path: pl.scan_parquet(path).collect(engine="streaming").to_dicts(),
    "duckdb": lambda path: duckdb.read_parquet(str(path)).df().to_dict("records"),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_gives_back_what_was_stored(shard, reader):
    path, rows = shard
    found = [
        {str(k): v.tolist() if hasattr(v, "tolist") else v for k, v in row.items()}
        for row in READERS[reader](path)
    ]
    assert found == rows


OVER_THE_HUB = """
import json
import datasets, duckdb, pandas as pd, polars as pl, pyarrow.parquet as pq
from huggingface_hub import HfFileSystem

repo, fs = "tester/read", HfFileSystem()
parts = ["hf://" + path for path in fs.glob(f"datasets/{repo}/data/*.parquet")]
duckdb.register_filesystem(fs)
folder = parts[0].rpartition("/")[0].removeprefix("hf://")
found = {
    "datasets": list(datasets.load_dataset(repo, split="train", streaming=True)),
    "pandas": [row for part in parts for row in pd.read_parquet(part).to_dict("records")],
    "polars": [row for part in parts for row in pl.read_parquet(fs.open(part)).to_dicts()],
    "pyarrow": pq.read_table(folder, filesystem=fs).to_pylist(),
    "duckdb": duckdb.read_parquet(parts).df().to_dict("records"),
}

def plain(value):
    value = value.tolist() if hasattr(value, "tolist") else value
    return value.hex() if isinstance(value, bytes | bytearray) else value

for reader, rows in found.items():
    print(json.dumps([reader, [{k: plain(v) for k, v in row.items()} for row in rows]]))
"""


def test_every_reader_reads_an_output_on_the_hub(hub, tmp_path):
    settings = {**SETTINGS, "store_tokens": True}
    table = rows_to_table(random_rows(25, settings=settings), settings=settings)
    uploader = StreamingHFUploader(
        "tester/read", schema=table.schema, settings=settings, cache_dir=tmp_path / "cache"
    )
    figures = pa.array([1.0] * table.num_rows)
    rows_to_store = table.append_column("_mass", figures).append_column("_actual", figures)
    for number in range(3):
        uploader.begin_part(number, table["index"].to_numpy()[10 * number :][:10])
    uploader.add_sample(rows_to_store)
    uploader.flush(final=True)
    uploader.shutdown()
    home = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HOME": str(tmp_path)}
    done = run_code(OVER_THE_HUB, env={**home, "HF_HUB_OFFLINE": "0"})
    want = [
        {k: v.hex() if isinstance(v, bytes) else v for k, v in row.items()}
        for row in table.to_pylist()
    ]
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert sorted(found) == ["datasets", "duckdb", "pandas", "polars", "pyarrow"]
    for reader, rows in found.items():
        assert sorted(rows, key=lambda row: row["index"]) == want, reader

"""What other programs read from a shard: every common reader gives back what was stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import duckdb
import pandas as pd
import polars as pl
import pytest
from small_output import SETTINGS, random_rows, rows_to_table

from extract_logits import write_part

# Settings that lead to other encodings, or to lists without an entry.
SHAPES: dict[str, dict[str, Any]] = {
    "tokens": {"store_tokens": True}, "8 bits": {"logit_bits": 8}, "no tail": {"sampled_n": 0},
    "large vocabulary": {"vocab_size": 100_000},
}  # fmt: skip


@pytest.fixture(params=SHAPES, scope="module")
def shard(request: Any, tmp_path_factory: Any) -> tuple[Path, list[dict[str, Any]]]:
    """A shard as the extractor writes it, and the rows it was made from."""
    settings = {**SETTINGS, **SHAPES[request.param]}
    rows = random_rows(6 if settings["vocab_size"] > 600 else 130, settings=settings, tokens=5)
    table = rows_to_table(rows, settings=settings)
    folder = tmp_path_factory.mktemp("shard")
    write_part(folder / "part-00000.parquet", table, table.schema)
    return folder / "part-00000.parquet", table.to_pylist()


READERS: dict[str, Callable[[Path], Iterable[Any]]] = {
    "pandas": lambda path: pd.read_parquet(path).to_dict("records"),
    "datasets": lambda path: datasets.Dataset.from_parquet(str(path), cache_dir=str(path.parent)),
    "a stream": lambda path: datasets.load_dataset(
        "parquet", data_files=str(path), split="train", streaming=True
    ),
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

"""Shards in a local folder: buffer, files, checkpoint, resume."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from shard_rows import SETTINGS, make_row, make_rows, make_schema

from extract_logits import ConfigError, StreamingHFUploader


def open_uploader(folder: Path, **options: Any) -> StreamingHFUploader:
    """Open an uploader of a folder's `out`, cache in `cache`, 10 rows a shard."""
    settings = options.pop("settings", SETTINGS)
    return StreamingHFUploader(
        str(folder / options.pop("output", "out")),
        **{
            "schema": make_schema(settings),
            "settings": settings,
            "chat_template": "{{ messages }}",
            "cache_dir": folder / "cache",
            "upload_every": 10,
            **options,
        },
    )


def listed(folder: Path) -> Counter[int]:
    """Count the ids in the shards of an output."""
    found: Counter[int] = Counter()
    for path in sorted((folder / "data").glob("*.parquet")):
        found.update(pq.read_table(path)["index"].to_pylist())
    return found


def feed(uploader: StreamingHFUploader, start: int, stop: int, batch: int = 3) -> None:
    """Add rows as a run does."""
    for first in range(start, stop, batch):
        uploader.add_sample(make_rows(range(first, min(first + batch, stop))))
        if uploader.should_flush():
            uploader.flush()


def test_a_run_writes_shards_of_the_asked_size_and_a_checkpoint(tmp_path: Path) -> None:
    uploader = open_uploader(tmp_path)
    feed(uploader, 0, 25)
    uploader.flush(final=True)
    uploader.shutdown()
    names = sorted(p.relative_to(tmp_path / "out").as_posix() for p in tmp_path.glob("out/**/*.*"))
    assert names == [
        "README.md",
        "chat_template.jinja",
        "checkpoint.json",
        "data/part-00000.parquet",
        "data/part-00001.parquet",
        "data/part-00002.parquet",
        "extraction_config.json",
    ]
    sizes = [pq.read_metadata(p).num_rows for p in sorted(tmp_path.glob("out/data/*"))]
    assert sizes == [10, 10, 5]
    assert listed(tmp_path / "out") == Counter(range(25))
    checkpoint = json.loads((tmp_path / "out/checkpoint.json").read_text())
    assert checkpoint["rows"] == 25
    assert uploader.summary()["rows"] == 25
    assert uploader.summary()["undelivered"] == []
    assert json.loads((tmp_path / "out/extraction_config.json").read_text()) == SETTINGS


def test_rows_come_back_as_they_were_added(tmp_path: Path) -> None:
    uploader = open_uploader(tmp_path)
    feed(uploader, 0, 12)
    uploader.flush(final=True)
    uploader.shutdown()
    tables = [pq.read_table(p) for p in sorted((tmp_path / "out/data").glob("*"))]
    for table in tables:
        assert table.schema.names == make_schema().names
        for row in table.to_pylist():
            wanted = make_row(row["index"])
            assert all(
                row[name] == (value.tolist() if hasattr(value, "tolist") else value)
                for name, value in wanted.items()
                if not name.startswith("_")
            )


def test_the_same_rows_give_the_same_bytes_whatever_the_batches(tmp_path: Path) -> None:
    for output, batch in (("a", 1), ("b", 7)):
        uploader = open_uploader(tmp_path, output=output)
        feed(uploader, 0, 20, batch=batch)
        uploader.flush(final=True)
        uploader.shutdown()
    for name in ("part-00000.parquet", "part-00001.parquet"):
        assert (tmp_path / "a/data" / name).read_bytes() == (
            tmp_path / "b/data" / name
        ).read_bytes()


def test_pending_rows_merge_with_new_ones_and_go_only_once_listed(tmp_path: Path) -> None:
    for number in range(3):
        uploader = open_uploader(tmp_path, resume=True)
        uploader.load_pending_into_buffer()
        feed(uploader, number * 3, number * 3 + 3)
        uploader.save_pending_locally()
        uploader.shutdown()
    assert len(list(tmp_path.glob("cache/*/pending/*.parquet"))) == 3
    uploader = open_uploader(tmp_path, resume=True)
    info = uploader.get_resume_info()
    assert info.pending.tolist() == list(range(9))
    assert info.done.size == 0
    assert uploader.load_pending_into_buffer() == 9
    feed(uploader, 9, 11)
    uploader.flush(final=True)
    uploader.shutdown()
    assert listed(tmp_path / "out") == Counter(range(11))
    assert pq.read_metadata(tmp_path / "out/data/part-00000.parquet").num_rows == 10
    assert not list(tmp_path.glob("cache/*/pending/*.parquet"))


def test_resume_from_an_empty_cache_goes_on_after_the_listed_parts(tmp_path: Path) -> None:
    uploader = open_uploader(tmp_path)
    feed(uploader, 0, 25)
    uploader.flush(final=True)
    uploader.shutdown()
    uploader = open_uploader(tmp_path, cache_dir=tmp_path / "elsewhere", resume=True)
    info = uploader.get_resume_info()
    assert info.done.tolist() == list(range(25))
    assert info.next_part == 3
    feed(uploader, 0, 31)
    uploader.flush(final=True)
    uploader.shutdown()
    assert listed(tmp_path / "out") == Counter(range(31))
    assert (tmp_path / "out/data/part-00003.parquet").exists()


def test_an_output_with_shards_needs_resume_or_force_restart(tmp_path: Path) -> None:
    uploader = open_uploader(tmp_path)
    feed(uploader, 0, 25)
    uploader.flush(final=True)
    uploader.shutdown()
    with pytest.raises(ConfigError, match="--resume"):
        open_uploader(tmp_path)
    uploader = open_uploader(tmp_path, force_restart=True)
    assert uploader.get_resume_info().done.size == 0
    feed(uploader, 100, 112)
    uploader.flush(final=True)
    uploader.shutdown()
    assert listed(tmp_path / "out") == Counter(range(100, 112))


def test_other_settings_are_refused_with_their_differences(tmp_path: Path) -> None:
    uploader = open_uploader(tmp_path)
    feed(uploader, 0, 10)
    uploader.flush(final=True)
    uploader.shutdown()
    with pytest.raises(ConfigError, match=r"top_p: 0\.98 there, 0\.9 now"):
        open_uploader(tmp_path, resume=True, settings={**SETTINGS, "top_p": 0.9})
    other_versions = {**SETTINGS, "versions": {"torch": "3"}}
    open_uploader(tmp_path, resume=True, settings=other_versions).shutdown()


def test_two_live_runs_cannot_share_a_cache(tmp_path: Path) -> None:
    uploader = open_uploader(tmp_path)
    with pytest.raises(ConfigError, match=str(os.getpid())):
        open_uploader(tmp_path, resume=True)
    uploader.shutdown()
    open_uploader(tmp_path, resume=True).shutdown()

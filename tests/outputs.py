"""Outputs as they lie in a folder or on a loopback Hub, read by pyarrow alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from loopback_hub import LoopbackHub
from shard_rows import SETTINGS, make_rows

from explore_logits import shard_schema

PART = re.compile(r"data/(?:\d{3}/)?part-(\d{5,})\.parquet")


def digest_ids(ids: Iterable[int]) -> str:
    """Return the 16 hexadecimal digits that stand for these conversations in this order."""
    return hashlib.sha256(np.asarray(list(ids), "<i8").tobytes()).hexdigest()[:16]


class Output:
    """An output by the name that a user gives it; `hub` where it is a repository."""

    def __init__(self, name: str | Path, hub: LoopbackHub | None = None) -> None:
        self.name, self.hub = str(name), hub

    def files(self) -> set[str]:
        """Return the path of every file but the temporary ones of a process that was killed."""
        if self.hub is not None:
            is_there = ("dataset", self.name) in self.hub.store.repos
            return set(self.hub.files(self.name)) if is_there else set()
        paths = (path for path in Path(self.name).rglob("*") if path.is_file())
        return {p.relative_to(self.name).as_posix() for p in paths if p.suffix != ".tmp"}

    def read(self, path: str) -> bytes:
        if self.hub is not None:
            return self.hub.content(self.name, path)
        return (Path(self.name) / path).read_bytes()

    def json(self, path: str) -> Any:
        return json.loads(self.read(path))

    def write(self, path: str, content: bytes) -> None:
        """Put a file there as a person would."""
        if self.hub is not None:
            self.hub.edit(self.name, path, content)
        else:
            (Path(self.name) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(self.name) / path).write_bytes(content)

    def delete(self, *paths: str) -> None:
        """Take files away as a person would."""
        if self.hub is not None:
            repo = self.hub.store.get("dataset", self.name)
            self.hub.store.commit(repo, "Delete", {}, paths)
        else:
            for path in paths:
                (Path(self.name) / path).unlink()

    def part_paths(self) -> dict[int, str]:
        """Return the path of each part by its number; every file in data/ is a part."""
        found = {path: PART.fullmatch(path) for path in self.files() if path.startswith("data/")}
        assert None not in found.values(), f"no name of a part: {sorted(found)}"
        return {int(match[1]): path for path, match in sorted(found.items()) if match}

    def table(self, number: int) -> pa.Table:
        return pq.read_table(pa.BufferReader(self.read(self.part_paths()[number])))

    def parts(self) -> dict[int, list[int]]:
        """Return the ids of each part in their order."""
        return {n: self.table(n)["index"].to_pylist() for n in sorted(self.part_paths())}

    def ids(self) -> list[int]:
        """Return all ids, in the order of the parts."""
        return [index for part in self.parts().values() for index in part]

    def rows(self) -> dict[int, dict[str, Any]]:
        """Return all rows by id."""
        rows = [row for number in self.part_paths() for row in self.table(number).to_pylist()]
        assert len({row["index"] for row in rows}) == len(rows), "a row is there twice"
        return {row["index"]: row for row in rows}

    def record(self, number: int) -> dict[str, Any]:
        """Return what a part says of itself."""
        return dict(json.loads(self.table(number).schema.metadata[b"logits.part"]))

    def hashes(self) -> dict[str, str]:
        """Return the sha256 of each part."""
        paths = self.part_paths().values()
        return {path: hashlib.sha256(self.read(path)).hexdigest() for path in paths}


def open_uploader(output: Output, cache: Path, **options: Any) -> Any:
    """Open an uploader of made-up rows (shard_rows.py), 10 a part."""
    from extract_logits import StreamingHFUploader  # here: it brings torch

    settings = {**SETTINGS, **options.pop("settings", {})}
    usual = {"schema": shard_schema(settings=settings), "settings": settings, "cache_dir": cache}
    return StreamingHFUploader(
        output.name, **{**usual, "chat_template": "{{ messages }}", "resume": True, **options}
    )


def fill(uploader: Any, number: int, ids: Iterable[int] | None = None) -> list[int]:
    """Give a part, of ten rows, the rows that it lacks, as a run does; return which these were."""
    ids = range(10 * number, 10 * number + 10) if ids is None else ids
    left: list[int] = uploader.begin_part(number, list(ids))
    for at in range(0, len(left), 3):
        uploader.add_sample(make_rows(left[at : at + 3]))
        if uploader.should_flush():
            uploader.flush()
    return left


def fill_parts(uploader: Any, rows: int) -> list[int]:
    """Fill the parts of 10 that hold the rows 0..rows; return what they lacked."""
    left = []
    for first in range(0, rows, 10):
        left += fill(uploader, first // 10, range(rows)[first : first + 10])
    return left


def finish(uploader: Any) -> dict[str, Any]:
    """Deliver everything and return the summary."""
    uploader.flush(final=True)
    uploader.shutdown()
    return dict(uploader.summary())


def run_uploader(output: Output, cache: Path, rows: int, **options: Any) -> dict[str, Any]:
    """Run over rows 0..rows as the next run of a job does; return its summary.

    "asked" are the rows that it had still to extract.
    """
    uploader = open_uploader(output, cache, **options)
    uploader.load_pending_into_buffer()
    asked = fill_parts(uploader, rows)
    return {**finish(uploader), "asked": asked}

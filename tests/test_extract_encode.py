"""Row groups are encoded several at once, and the file is the one that a single writer makes."""

from __future__ import annotations

import errno
import gc
import io
import os
import resource
import sys
import threading
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import Child
from shard_rows import SETTINGS, make_rows, make_schema

import extract_logits
from explore_logits import shard_schema
from extract_logits import (
    HubError,
    JoinedGroups,
    ShardWriter,
    StreamingHFUploader,
    edit_struct,
    encode_footer,
    encode_row_notes,
    encode_varint,
    measure_table,
    read_varint,
    skip_value,
    split_footer,
    writer_options,
)


def write_shard(folder: Path, rows: pa.Table, *, batch: int) -> bytes:
    """Return the bytes of a shard whose rows were added some at a time."""
    writer = ShardWriter(folder, make_schema(), nucleus_cap=SETTINGS["top_p_max"])
    for start in range(0, rows.num_rows, batch):
        writer.add(rows.slice(start, batch))
    return writer.close(folder / "shard.parquet").path.read_bytes()


def write_alone(rows: pa.Table, groups: list[int], notes: bytes) -> bytes:
    """Return what one `ParquetWriter` makes of row groups of these sizes, one after the other."""
    sink, start = io.BytesIO(), 0
    writer = pq.ParquetWriter(sink, make_schema(), **writer_options(make_schema()))
    for size in groups:
        group = rows.slice(start, size).select(make_schema().names).combine_chunks()
        writer.write_table(group.cast(make_schema()), row_group_size=size)
        start += size
    writer.add_key_value_metadata({extract_logits.METADATA_ROWS: notes})
    writer.close()
    return sink.getvalue()


@pytest.mark.parametrize("joins", [True, False], ids=["joined", "one_writer"])
@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize(("rows", "group"), [(1, 64), (9, 4), (64, 4), (45, 2), (200, 64)])
def test_the_file_is_that_of_one_writer_to_the_byte(
    rows: int,
    group: int,
    threads: int,
    joins: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert extract_logits.groups_join(make_schema())
    monkeypatch.setattr(extract_logits, "groups_join", lambda schema: joins)
    monkeypatch.setattr(extract_logits, "ROW_GROUP_ROWS", group)
    monkeypatch.setattr(extract_logits, "encode_threads", lambda: threads)
    table = make_rows(range(rows), tokens=7)
    sizes = [min(group, rows - start) for start in range(0, rows, group)]
    measured = measure_table(table, nucleus_cap=SETTINGS["top_p_max"])
    notes = encode_row_notes(list(zip(measured.indices, measured.figures, strict=True)))
    wanted = write_alone(table, sizes, notes)
    for batch in (1, 3, rows):
        assert write_shard(tmp_path, table, batch=batch) == wanted


@pytest.mark.parametrize("changed", ["page_index", "footer"])
def test_a_pyarrow_that_writes_otherwise_encodes_in_one_thread_and_it_is_said(
    changed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    extract_logits.groups_join.cache_clear()
    if changed == "page_index":
        known = extract_logits.writer_options
        more = {"write_page_index": True}
        monkeypatch.setattr(extract_logits, "writer_options", lambda schema: known(schema) | more)
    else:
        monkeypatch.setattr(extract_logits, "FIXED_BYTES", {})
        monkeypatch.setattr(extract_logits, "BINARY", 13)
    rows = make_rows(range(200))
    write_shard(tmp_path, rows, batch=50)
    file = pq.ParquetFile(tmp_path / "shard.parquet")
    assert file.read()["index"].to_pylist() == list(range(200))
    assert file.metadata.row_group(1).column(0).has_offset_index == (changed == "page_index")
    assert "one thread encodes" in caplog.text
    extract_logits.groups_join.cache_clear()


def test_several_row_groups_are_encoded_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extract_logits.groups_join(make_schema())
    meeting = threading.Barrier(3, timeout=30)
    encode = JoinedGroups.encode

    def meet(*args: Any, **options: Any) -> Any:
        meeting.wait()  # breaks, and raises, unless three are there at once
        return encode(*args, **options)

    monkeypatch.setattr(extract_logits, "ROW_GROUP_ROWS", 4)
    monkeypatch.setattr(extract_logits, "encode_threads", lambda: 3)
    monkeypatch.setattr(JoinedGroups, "encode", meet)
    rows = make_rows(range(24))
    write_shard(tmp_path, rows, batch=24)
    assert pq.read_table(tmp_path / "shard.parquet")["index"].to_pylist() == list(range(24))


@pytest.mark.parametrize(
    ("processors", "threads"), [(1, 1), (2, 1), (4, 1), (8, 2), (16, 5), (256, 8)]
)
def test_a_third_of_the_processors_encodes(
    processors: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract_logits, "count_processors", lambda: processors)
    assert extract_logits.encode_threads() == threads


def test_rows_that_wait_for_the_encoder_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extract_logits.groups_join(make_schema())
    gate, added = threading.Event(), 0
    encode = JoinedGroups.encode

    def wait(*args: Any, **options: Any) -> Any:
        assert gate.wait(timeout=30)
        return encode(*args, **options)

    monkeypatch.setattr(extract_logits, "ROW_GROUP_ROWS", 1)
    monkeypatch.setattr(extract_logits, "encode_threads", lambda: 2)
    monkeypatch.setattr(JoinedGroups, "encode", wait)
    writer = ShardWriter(tmp_path, make_schema(), nucleus_cap=255)

    def add() -> None:
        nonlocal added
        for number in range(30):
            writer.add(make_rows([number]))
            added += 1

    adding = threading.Thread(target=add)
    adding.start()
    adding.join(timeout=1)
    assert added == 2 * extract_logits.GROUPS_AHEAD
    gate.set()
    adding.join(timeout=30)
    assert writer.close(tmp_path / "shard.parquet").notes.figures.rows == 30


def test_figures_and_sizes_of_rows_do_not_depend_on_the_table_they_stand_in() -> None:
    rows = pa.concat_tables([make_rows(range(5), tokens=3), make_rows(range(5, 9), tokens=11)])
    together = measure_table(rows, nucleus_cap=2)
    for place, row in enumerate(rows.to_pylist()):
        alone = measure_table(rows.slice(place, 1), nucleus_cap=2)
        figures = together.figures[place]
        assert alone.figures == [figures]
        assert alone.sizes == [together.sizes[place]]
        assert alone.indices == [together.indices[place]] == [row["index"]]
        assert figures.tokens == row["num_tokens"]
        assert figures.nucleus_tokens == sum(row["top_counts"])
        assert figures.capped_tokens == row["top_counts"].count(2)
        assert figures.mass == row["_mass"]
    without = measure_table(rows.drop_columns(["_mass"]), nucleus_cap=2)
    assert {figures.measured_tokens for figures in without.figures} == {0}


def test_sizes_of_rows_are_those_of_their_values() -> None:
    rows = make_rows(range(3), tokens=40)
    buffers = rows.combine_chunks().nbytes
    assert sum(measure_table(rows, nucleus_cap=255).sizes) == pytest.approx(buffers, rel=0.05)


# Footers ------------------------------------------------------------------------------------------


def test_integers_of_variable_length_come_back() -> None:
    draw = np.random.default_rng(0)
    for value in [0, 127, 128, 2**63 - 1, *draw.integers(0, 2**62, 50).tolist()]:
        data = b"\xff" + encode_varint(value)
        assert read_varint(data, 1) == (value, len(data))


def test_a_footer_is_walked_to_its_last_byte_and_copied_as_it_is() -> None:
    schema = shard_schema(store_tokens=True, settings=SETTINGS)
    footer = encode_footer(schema, writer_options(schema), {b"a": b"b" * 300})
    assert skip_value(footer, 0, extract_logits.STRUCT) == len(footer)
    copy = bytearray()
    assert edit_struct(footer, 0, {}, copy) == len(footer)
    assert copy == footer


def test_every_type_and_long_field_numbers_are_skipped() -> None:
    # 1 true, 2 false, 3 byte, 4 double, 50 (its number written out) int32, 51 list of structs
    fields = bytes([0x11, 0x12, 0x13, 9, 0x17, *range(8), 0x05, 100, 0x81, 0x01, 0x19, 0x2C, 0, 0])
    assert skip_value(fields + b"\x00more", 0, extract_logits.STRUCT) == len(fields) + 1
    edited = bytearray()
    edit_struct(fields + b"\x00more", 0, {50: lambda value: value - 200}, edited)
    assert bytes(edited) == fields.replace(b"\x81\x01", encode_varint(2 * 265 - 1)) + b"\x00"


def test_a_footer_says_where_it_starts() -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [1, 2]}), sink)
    file = sink.getvalue()
    footer, start = split_footer(file)
    assert bytes(file)[start:-8] == footer


# Beside the loop ----------------------------------------------------------------------------------


def open_uploader(folder: Path, **options: Any) -> StreamingHFUploader:
    return StreamingHFUploader(
        str(folder / "out"),
        schema=make_schema(),
        settings=SETTINGS,
        cache_dir=folder / "cache",
        upload_every=10,
        **options,
    )


def hold_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let fsync wait until the event that is returned is set."""
    gate, sync = threading.Event(), os.fsync

    def slow(file: int) -> None:
        assert gate.wait(timeout=30)
        sync(file)

    monkeypatch.setattr(os, "fsync", slow)
    return gate


def test_rows_go_on_while_a_full_shard_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploader = open_uploader(tmp_path)
    gate = hold_disk(monkeypatch)
    for number in range(15):  # the first shard is full at 10, and its disk is slow
        uploader.add_sample(make_rows([number]))
        if uploader.should_flush():
            uploader.flush()
    assert not list((tmp_path / "cache").rglob("part-*"))
    gate.set()
    uploader.flush(final=True)
    uploader.shutdown()
    parts = sorted((tmp_path / "out/data").iterdir())
    assert [pq.read_table(part)["index"].to_pylist() for part in parts] == [
        list(range(10)),
        list(range(10, 15)),
    ]


def test_shards_that_cannot_be_closed_in_time_hold_the_loop_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploader = open_uploader(tmp_path)
    gate = hold_disk(monkeypatch)
    adding = threading.Thread(target=uploader.add_sample, args=(make_rows(range(100)),))
    adding.start()
    adding.join(timeout=1)
    assert adding.is_alive()
    assert len(uploader._closed) == extract_logits.CLOSING_AT_ONCE
    gate.set()
    adding.join(timeout=30)
    uploader.flush(final=True)
    uploader.shutdown()
    assert uploader.summary()["rows"] == 100


@pytest.mark.parametrize("ends_by", ["flush", "shutdown"])
def test_a_shard_that_cannot_be_closed_is_an_error_and_leaves_no_file(
    ends_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    uploader = open_uploader(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        uploader.add_sample(make_rows(range(10)))
        if ends_by == "flush":
            with pytest.raises(HubError, match="make room"):
                uploader.flush(final=True)
        uploader.shutdown()
    assert "10 rows have to be extracted again" in caplog.text
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix == ".tmp"]
    again = open_uploader(tmp_path, resume=True)
    assert again.get_resume_info().pending.size == again.get_resume_info().done.size == 0
    again.add_sample(make_rows(range(10)))
    again.flush(final=True)
    again.shutdown()
    assert again.summary()["rows"] == 10


def test_a_disk_that_gets_full_within_a_shard_leaves_nothing_to_complain_at_the_end(
    tmp_path: Path,
) -> None:
    def work(output: IO[str]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        sys.unraisablehook = lambda failure: print("ignored", failure.exc_value, file=output)
        writer = ShardWriter(tmp_path, make_schema(), nucleus_cap=255)
        try:
            writer.add(make_rows(range(200), tokens=200))
            writer.close(tmp_path / "shard.parquet")
        except OSError as error:
            output.write(f"{error} ")
        writer.discard()
        del writer
        gc.collect()
        output.write("and no more")

    code, said = Child(work).finish()
    assert code == 0
    assert "File too large and no more" in " ".join(said.split())
    assert not list(tmp_path.iterdir())

"""Shards in a local folder: buffer, files, checkpoint, resume."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import resource
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq
import pytest
from forked import Child
from shard_rows import SETTINGS, make_row, make_rows, make_schema

import extract_logits
from extract_logits import (
    ROW_GROUP_ROWS,
    ROW_GROUP_TOKENS,
    ConfigError,
    HubError,
    PassingError,
    StreamingHFUploader,
    cache_key,
    open_destination,
)


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


def run_to_end(folder: Path, stop: int, **options: Any) -> dict[str, Any]:
    """Run over rows 0..stop as the next run of a job does, and return its summary."""
    uploader = open_uploader(folder, **{"resume": True, **options})
    uploader.load_pending_into_buffer()
    feed(uploader, 0, stop)
    uploader.flush(final=True)
    uploader.shutdown()
    return uploader.summary()


def cache_of(folder: Path) -> Path:
    """Return the folder of the local state."""
    (found,) = (folder / "cache").glob("*/")
    return found


def test_shards_closed_but_not_delivered_are_delivered_by_the_next_run(tmp_path: Path) -> None:
    uploader = open_uploader(tmp_path)
    for first in range(0, 25, 5):
        uploader.add_sample(make_rows(range(first, first + 5)))  # never flushed
    uploader.save_pending_locally()
    uploader.shutdown()
    assert not listed(tmp_path / "out")
    uploader = open_uploader(tmp_path, resume=True)
    assert uploader.get_resume_info().pending.tolist() == list(range(25))
    assert uploader.get_resume_info().next_part == 2
    uploader.shutdown()
    assert run_to_end(tmp_path, 25)["rows"] == 25
    assert listed(tmp_path / "out") == Counter(range(25))
    assert not list(tmp_path.glob("cache/**/*.parquet"))


def test_rows_are_not_done_before_a_shard_that_is_listed_holds_them(tmp_path: Path) -> None:
    uploader = open_uploader(tmp_path)
    uploader.add_sample(make_rows(range(9)))
    uploader.save_pending_locally()
    uploader.shutdown()
    assert open_uploader(tmp_path, output="other").get_resume_info().done.size == 0
    uploader = open_uploader(tmp_path, resume=True)
    assert uploader.get_resume_info().done.size == 0
    uploader.shutdown()


def test_an_id_that_is_done_pending_or_buffered_is_never_added_again(tmp_path: Path) -> None:
    uploader = open_uploader(tmp_path)
    feed(uploader, 0, 14)
    uploader.add_sample(make_rows([3, 12, 12, 13]))
    uploader.save_pending_locally()
    uploader.shutdown()
    uploader = open_uploader(tmp_path, resume=True)
    uploader.add_sample(make_rows([2, 11, 20]))
    uploader.load_pending_into_buffer()
    uploader.add_sample(make_rows([2, 11, 20]))
    uploader.flush(final=True)
    uploader.shutdown()
    assert listed(tmp_path / "out") == Counter([*range(14), 20])


def test_half_written_files_are_removed_and_damaged_or_foreign_ones_survived(
    tmp_path: Path,
) -> None:
    uploader = open_uploader(tmp_path)
    feed(uploader, 0, 5)
    uploader.save_pending_locally()
    for index in range(5, 20):
        uploader.add_sample(make_rows([index]))
    uploader.shutdown()
    cache = cache_of(tmp_path)
    (part,) = cache.glob("part-*.parquet")
    part.write_bytes(part.read_bytes()[:-100])
    (cache / "under-way.parquet.tmp").write_bytes(b"PAR1 half")
    (cache / "backup_part-00007.parquet").write_bytes(b"")
    (cache / "notes.txt").write_text("mine")
    pq.write_table(make_rows(range(50, 60)), cache / "pending" / "pending-00009.parquet")
    pq.write_table(make_rows(range(60, 70)), cache / "pending" / "foreign.parquet")
    data = tmp_path / "out/data"
    data.mkdir(parents=True, exist_ok=True)
    (data / ".part-00000.parquet.tmp").write_bytes(b"PAR1 half")
    (data / "foreign.txt").write_text("mine")
    assert run_to_end(tmp_path, 20)["rows"] == 20
    assert listed(tmp_path / "out") == Counter(range(20))
    assert (cache / "notes.txt").exists()
    assert (cache / "unreadable_part-00000.parquet").exists()
    assert (cache / "pending" / "unreadable_pending-00009.parquet").exists()
    assert (cache / "pending" / "foreign.parquet").exists()
    assert not list(cache.rglob("*.tmp"))


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"shards": {"data/x": 3}}', "older"])
def test_a_checkpoint_that_is_missing_broken_or_old_loses_nothing(
    tmp_path: Path, content: bytes | str | None
) -> None:
    checkpoint = tmp_path / "out/checkpoint.json"
    run_to_end(tmp_path, 10)
    older = checkpoint.read_bytes()
    run_to_end(tmp_path, 25)
    whole = checkpoint.read_bytes()
    if content is None:
        checkpoint.unlink()
    else:
        checkpoint.write_bytes(older if isinstance(content, str) else content)
    uploader = open_uploader(tmp_path, resume=True)
    assert uploader.get_resume_info().done.tolist() == list(range(25))
    uploader.flush(final=True)
    uploader.shutdown()
    restored = json.loads(checkpoint.read_bytes())
    wanted = json.loads(whole)
    for record in [*restored["shards"].values(), *wanted["shards"].values()]:
        record.pop("sha256")  # of a local shard only the checkpoint knew it
    assert restored == wanted


def test_a_damaged_shard_in_the_output_is_named_with_the_remedy(tmp_path: Path) -> None:
    run_to_end(tmp_path, 20)
    shard = tmp_path / "out/data/part-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(ConfigError, match=r"data/part-00001.parquet .* damaged.*delete it"):
        open_uploader(tmp_path, resume=True)
    shard.unlink()
    assert run_to_end(tmp_path, 20)["rows"] == 20
    assert listed(tmp_path / "out") == Counter(range(20))


def test_a_cache_that_holds_rows_of_other_settings_is_refused(tmp_path: Path) -> None:
    uploader = open_uploader(tmp_path)
    feed(uploader, 0, 5)
    uploader.save_pending_locally()
    uploader.shutdown()
    with pytest.raises(ConfigError, match="--resume"):
        open_uploader(tmp_path)
    with pytest.raises(ConfigError, match="seed: 42 there, 43 now"):
        open_uploader(tmp_path, resume=True, settings={**SETTINGS, "seed": 43})
    uploader = open_uploader(tmp_path, force_restart=True, settings={**SETTINGS, "seed": 43})
    assert uploader.get_resume_info().pending.size == 0
    uploader.shutdown()


def test_pending_rows_that_fill_several_shards_are_split(tmp_path: Path) -> None:
    uploader = open_uploader(tmp_path, upload_every=100)
    feed(uploader, 0, 37)
    uploader.save_pending_locally()
    uploader.shutdown()
    assert run_to_end(tmp_path, 40)["rows"] == 40
    sizes = [pq.read_metadata(p).num_rows for p in sorted(tmp_path.glob("out/data/*"))]
    assert sizes == [10, 10, 10, 10]
    assert not list(tmp_path.glob("cache/**/*.parquet"))


def test_figures_survive_pending_files_resume_and_a_lost_checkpoint(tmp_path: Path) -> None:
    for number in range(4):
        uploader = open_uploader(tmp_path, resume=True)
        uploader.load_pending_into_buffer()
        feed(uploader, number * 6, number * 6 + 6)
        uploader.save_pending_locally()
        uploader.shutdown()
        (tmp_path / "out/checkpoint.json").unlink(missing_ok=True)
    run_to_end(tmp_path, 24)
    card = (tmp_path / "out/README.md").read_text()
    tokens = sum(make_row(index)["num_tokens"] for index in range(24))
    nucleus = sum(int(make_row(index)["top_counts"].sum()) for index in range(24))
    assert f"| tokens | {tokens:,} |" in card
    assert f"| mean nucleus | {nucleus / tokens:.1f} tokens |" in card
    assert "| probability covered by the nucleus | 0.9900 on average |" in card
    assert "| probability of the actual token | 0.5000 on average |" in card


def test_shards_close_at_the_asked_encoded_size(tmp_path: Path) -> None:
    uploader = open_uploader(tmp_path, upload_size_mb=2)
    for first in range(0, 500, 10):
        uploader.add_sample(make_rows(range(first, first + 10), tokens=200))
        if uploader.should_flush():
            uploader.flush()
    uploader.flush(final=True)
    uploader.shutdown()
    sizes = [p.stat().st_size for p in sorted(tmp_path.glob("out/data/*"))]
    assert len(sizes) > 3
    assert all(abs(size - 2_000_000) < 150_000 for size in sizes[:-1])
    assert listed(tmp_path / "out") == Counter(range(500))


def test_row_groups_are_encoded_beside_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()
    write = pq.ParquetWriter.write_table

    def watch(writer: Any, table: Any, **options: Any) -> None:
        threads.add(threading.current_thread().name)
        write(writer, table, **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", watch)
    run_to_end(tmp_path, 24)
    assert threads
    assert all(name.startswith("encode") for name in threads)


@pytest.mark.parametrize("limit", [{"upload_every": 40}, {"upload_size_mb": 0.2}])
def test_rows_that_the_encoder_cannot_write_are_dropped_and_extracted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: dict[str, Any]
) -> None:
    monkeypatch.setattr(extract_logits, "ROW_GROUP_ROWS", 4)
    uploader = open_uploader(tmp_path, **limit)
    with monkeypatch.context() as full:
        full.setattr(pq.ParquetWriter, "write_table", no_room)
        with pytest.raises(HubError, match="make room"):
            feed(uploader, 0, 1000, batch=1)
    uploader.shutdown()
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    run_to_end(tmp_path, 100, resume=True)
    assert listed(tmp_path / "out") == Counter(range(100))


def no_room(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_row_groups_stay_small_so_that_one_row_is_cheap_to_read(tmp_path: Path) -> None:
    uploader = open_uploader(tmp_path, upload_every=200)
    uploader.add_sample(make_rows(range(150), tokens=5))
    uploader.add_sample(make_rows(range(150, 200), tokens=1000))
    uploader.flush(final=True)
    uploader.shutdown()
    file = pq.ParquetFile(tmp_path / "out/data/part-00000.parquet")
    for number in range(file.num_row_groups):
        tokens = file.read_row_group(number, ["num_tokens"])["num_tokens"].to_pylist()
        assert len(tokens) <= ROW_GROUP_ROWS
        assert sum(tokens[:-1]) < ROW_GROUP_TOKENS
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert file.schema_arrow.equals(make_schema())


def test_a_full_disk_is_a_clear_error_and_the_run_completes_once_there_is_room(
    tmp_path: Path,
) -> None:
    def work(limit: int, output: IO[str]) -> None:
        uploader = open_uploader(tmp_path, resume=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        uploader.load_pending_into_buffer()
        try:
            feed(uploader, 0, 100)
            uploader.flush(final=True)
        except HubError as error:
            output.write(str(error))
        uploader.shutdown()

    for limit in (3000, 12_000):  # without and with room for pending rows
        code, said = Child(functools.partial(work, limit)).finish()
        assert code == 0
        assert re.search("cannot write .*File too large.*--resume", said), said
    assert run_to_end(tmp_path, 100)["rows"] == 100
    assert listed(tmp_path / "out") == Counter(range(100))


def test_shards_that_go_away_are_a_clear_error_and_the_rows_stay(tmp_path: Path) -> None:
    uploader = open_uploader(tmp_path)
    feed(uploader, 0, 12)
    uploader.flush()
    while uploader.is_uploading():
        time.sleep(0.01)
    (tmp_path / "out/data").rename(tmp_path / "away")
    uploader.add_sample(make_rows(range(12, 25)))
    with pytest.raises(HubError, match=r"part-00000.parquet .* has gone .*--resume"):
        uploader.flush(final=True)
    uploader.shutdown()
    (tmp_path / "away").rename(tmp_path / "out/data")
    assert run_to_end(tmp_path, 25)["rows"] == 25
    assert listed(tmp_path / "out") == Counter(range(25))


def test_the_lock_of_a_killed_run_holds_nobody_up(tmp_path: Path) -> None:
    def work(_: IO[str]) -> None:
        feed(open_uploader(tmp_path), 0, 15)
        os.kill(os.getpid(), signal.SIGKILL)

    assert Child(work).wait() == -signal.SIGKILL
    assert run_to_end(tmp_path, 25)["rows"] == 25
    assert listed(tmp_path / "out") == Counter(range(25))


def test_a_worker_process_that_outlives_the_run_does_not_keep_its_lock(tmp_path: Path) -> None:
    def work(_: IO[str]) -> None:
        uploader = open_uploader(tmp_path)
        Child(lambda _: time.sleep(2))
        assert uploader.summary()["rows"] == 0
        os.kill(os.getpid(), signal.SIGKILL)

    assert Child(work).wait() == -signal.SIGKILL
    open_uploader(tmp_path, resume=True).shutdown()


@pytest.mark.parametrize("output", ["nothing-such", "a/b/c", "user/", ""])
def test_an_output_that_is_neither_folder_nor_repository_is_refused(output: str) -> None:
    with pytest.raises(ConfigError, match="neither"):
        open_destination(output)


def test_an_output_on_another_file_system_gets_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert run_to_end(tmp_path, 25)["rows"] == 25
    assert listed(tmp_path / "out") == Counter(range(25))
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_state_of_two_outputs_never_mixes(tmp_path: Path) -> None:
    keys = {
        cache_key("user/logits"),
        cache_key("./logits"),
        cache_key("../logits"),
        cache_key("user/logits", rank=0, world_size=2),
        cache_key("user/logits", rank=1, world_size=2),
    }
    assert len(keys) == 5
    assert cache_key(str(tmp_path)) == cache_key(f"{tmp_path}/")


@pytest.mark.parametrize("folders_only", [True, False])
def test_a_file_system_that_cannot_lock_or_sync_folders_holds_shards_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders_only: bool
) -> None:
    sync, lock = os.fsync, extract_logits.fcntl.flock

    def is_folder(file: Any) -> bool:
        return Path(f"/proc/self/fd/{getattr(file, 'fileno', lambda: file)()}").is_dir()

    def fsync(file: Any) -> None:
        if is_folder(file):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(file)

    def flock(file: Any, operation: int) -> None:
        if not folders_only:
            raise OSError(errno.ENOSYS, "Function not implemented")
        if is_folder(file):
            raise OSError(errno.EBADF, "Bad file descriptor")  # what NFS says
        lock(file, operation)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(extract_logits.fcntl, "flock", flock)
    uploader = open_uploader(tmp_path)
    feed(uploader, 0, 12)
    uploader.flush(final=True)
    uploader.shutdown()
    assert listed(tmp_path / "out") == Counter(range(12))


def test_a_failing_disk_is_no_file_system_that_cannot_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(file: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def fill() -> None:
        feed(uploader, 0, 12)
        uploader.flush(final=True)

    uploader = open_uploader(tmp_path)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(HubError, match="Input/output error"):
        fill()
    monkeypatch.undo()
    uploader.shutdown()


def test_what_is_left_of_a_pending_file_counts_as_what_it_is_not_as_the_file(
    tmp_path: Path,
) -> None:
    size = {"upload_size_mb": 0.06, "upload_every": 10**6}
    uploader = open_uploader(tmp_path, **size)
    rows = 0
    while not uploader.should_flush():
        uploader.add_sample(make_rows([rows], tokens=20))
        rows += 1
    uploader.shutdown()  # the shard stays in the cache
    other = open_uploader(tmp_path, cache_dir=tmp_path / "elsewhere", **size)
    other.add_sample(make_rows(range(rows * 3 // 4), tokens=20))
    other.flush(final=True)
    other.shutdown()
    uploader = open_uploader(tmp_path, resume=True, **size)
    assert uploader.load_pending_into_buffer() == rows - rows * 3 // 4
    uploader.add_sample(make_rows(range(rows, rows + rows // 4), tokens=20))
    assert not uploader.should_flush()
    uploader.shutdown()


def test_a_run_beside_workers_on_the_same_output_doubles_no_row(tmp_path: Path) -> None:
    one = open_uploader(tmp_path)
    one.add_sample(make_rows(range(10)))
    one.flush(final=True)
    worker = open_uploader(tmp_path, resume=True, rank=1, world_size=2)
    peer = open_uploader(tmp_path, resume=True, rank=0, world_size=2)
    for uploader, start in ((worker, 10), (peer, 20)):  # names of peers are none of a stranger
        uploader.add_sample(make_rows(range(start, start + 10)))
        uploader.flush(final=True)
        uploader.shutdown()
    one.add_sample(make_rows(range(10, 20)))
    one.flush(final=True)
    one.shutdown()
    assert listed(tmp_path / "out") == Counter(range(30))


def test_rows_that_two_pending_files_hold_are_delivered_once(tmp_path: Path) -> None:
    uploader = open_uploader(tmp_path)
    feed(uploader, 0, 7)
    uploader.shutdown()
    (pending,) = tmp_path.glob("cache/*/pending/*.parquet")
    shutil.copy(pending, pending.with_name("pending-00001.parquet"))
    uploader = open_uploader(tmp_path, resume=True)
    assert uploader.get_resume_info().pending.tolist() == list(range(7))
    assert uploader.load_pending_into_buffer() == 7
    feed(uploader, 7, 12)
    uploader.flush(final=True)
    uploader.shutdown()
    assert listed(tmp_path / "out") == Counter(range(12))
    assert not list(tmp_path.glob("cache/*/pending/*.parquet"))


def test_what_is_late_is_delivered_all_the_same_but_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploader = open_uploader(tmp_path, late=lambda: True)
    feed(uploader, 0, 12)
    uploader.flush(final=True)
    assert listed(tmp_path / "out") == Counter(range(12))
    tries = []

    def out_of_reach(*_: Any) -> None:
        tries.append(1)
        raise PassingError("HTTP 503")

    monkeypatch.setattr(extract_logits.FolderDestination, "commit", out_of_reach)
    uploader.add_sample(make_rows(range(12, 15)))
    uploader.flush(final=True)
    uploader.shutdown()
    assert len(tries) == 2  # once as a shard, once more as a backup at the end
    assert len(uploader.summary()["undelivered"]) == 1


# What a power loss, a stranger or another run could leave -----------------------------------------


def test_bytes_are_on_the_disk_before_a_file_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    sync, rename = os.fsync, os.replace

    def fsync(file: int) -> None:
        synced.add(os.fstat(file).st_ino)
        sync(file)

    def replace(source: Path, target: Path) -> None:
        assert os.stat(source).st_ino in synced, f"{source} was renamed before it was synced"
        rename(source, target)

    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "link", no_links)
    uploader = open_uploader(tmp_path)
    feed(uploader, 0, 12)
    uploader.flush(final=True)
    uploader.shutdown()
    assert listed(tmp_path / "out") == Counter(range(12))
    folders = {(tmp_path / name).stat().st_ino for name in ("out", "out/data")}
    assert folders <= synced


def test_a_footer_that_contradicts_its_rows_is_not_believed(tmp_path: Path) -> None:
    uploader = open_uploader(tmp_path)
    feed(uploader, 0, 6)
    uploader.shutdown()
    (pending,) = tmp_path.glob("cache/*/pending/*.parquet")
    table = pq.read_table(pending)
    speaking_of_six = pq.read_metadata(pending).metadata
    pq.write_table(table.slice(0, 5).replace_schema_metadata(speaking_of_six), pending)
    uploader = open_uploader(tmp_path, resume=True)
    assert uploader.get_resume_info().pending.size == 0
    uploader.shutdown()
    assert [path.name for path in pending.parent.iterdir()] == [f"unreadable_{pending.name}"]


def test_a_setting_that_only_one_of_two_runs_knows_makes_them_different_jobs(
    tmp_path: Path,
) -> None:
    uploader = open_uploader(tmp_path)
    feed(uploader, 0, 10)
    uploader.flush(final=True)
    uploader.shutdown()
    with pytest.raises(ConfigError, match="answers_only: None there, True now"):
        open_uploader(tmp_path, resume=True, settings={**SETTINGS, "answers_only": True})
    less = {name: value for name, value in SETTINGS.items() if name != "seed"}
    with pytest.raises(ConfigError, match="seed: 42 there, None now"):
        open_uploader(tmp_path, resume=True, settings=less)


def test_pending_rows_never_take_the_name_of_others(tmp_path: Path) -> None:
    for first in (0, 3, 6):
        uploader = open_uploader(tmp_path, resume=True)
        feed(uploader, first, first + 3)
        uploader.shutdown()
    (folder,) = tmp_path.glob("cache/*/pending")
    (folder / "pending-00000.parquet").unlink()
    uploader = open_uploader(tmp_path, resume=True)
    feed(uploader, 9, 12)
    uploader.shutdown()
    assert len(list(folder.iterdir())) == 3
    uploader = open_uploader(tmp_path, resume=True)
    assert uploader.get_resume_info().pending.tolist() == list(range(3, 12))
    uploader.shutdown()


def test_the_card_counts_the_nuclei_of_the_largest_size_only(tmp_path: Path) -> None:
    uploader = open_uploader(tmp_path)
    rows = make_rows(range(8))
    uploader.add_sample(rows)
    uploader.flush(final=True)
    uploader.shutdown()
    counts = [count for row in rows["top_counts"].to_pylist() for count in row]
    share = counts.count(SETTINGS["top_p_max"]) / len(counts)
    assert 0 < share < 1
    card = (tmp_path / "out/README.md").read_text()
    assert f"| nuclei of the largest size allowed | {share:.2%} |" in card


def test_a_commit_to_a_folder_replaces_no_shard(tmp_path: Path) -> None:
    destination = open_destination(str(tmp_path / "out"))
    destination.commit("one", {"data/part-00000.parquet": b"one"}, [])
    with pytest.raises(PassingError, match="has appeared"):
        destination.commit("two", {"data/part-00000.parquet": b"two"}, [])
    assert (tmp_path / "out/data/part-00000.parquet").read_bytes() == b"one"
    name = "data/part-00000.parquet"
    destination.commit("three", {name: b"three"}, [name])  # named as one to go
    assert (tmp_path / "out" / name).read_bytes() == b"three"


def test_part_numbers_go_on_after_the_highest_whatever_has_gone(tmp_path: Path) -> None:
    uploader = open_uploader(tmp_path)
    feed(uploader, 0, 30)
    uploader.flush(final=True)
    uploader.shutdown()
    (tmp_path / "out/data/part-00000.parquet").unlink()
    uploader = open_uploader(tmp_path, resume=True)
    assert uploader.get_resume_info().next_part == 3
    feed(uploader, 0, 10)
    uploader.flush(final=True)
    uploader.shutdown()
    assert listed(tmp_path / "out") == Counter(range(30))
    assert (tmp_path / "out/data/part-00003.parquet").exists()


def test_shards_of_workers_that_the_job_no_longer_has_are_no_peers(tmp_path: Path) -> None:
    uploader = open_uploader(tmp_path, rank=3, world_size=4)
    uploader.add_sample(make_rows(range(4)))
    uploader.flush(final=True)
    uploader.shutdown()
    with pytest.raises(ConfigError, match="already holds 1 shard"):
        open_uploader(tmp_path, rank=1, world_size=2)
    uploader = open_uploader(tmp_path, rank=0, world_size=2, force_restart=True)
    uploader.add_sample(make_rows(range(10, 12)))
    uploader.flush(final=True)
    uploader.shutdown()
    assert listed(tmp_path / "out") == Counter([10, 11])


def test_a_cached_shard_whose_name_another_machine_has_used_gets_another(tmp_path: Path) -> None:
    here = open_uploader(tmp_path)
    here.add_sample(make_rows(range(10)))  # closed in the cache, not flushed
    here.shutdown()
    elsewhere = open_uploader(tmp_path, cache_dir=tmp_path / "elsewhere")
    feed(elsewhere, 20, 30)
    elsewhere.flush(final=True)
    elsewhere.shutdown()
    here = open_uploader(tmp_path, resume=True)
    assert here.get_resume_info().pending.tolist() == list(range(10))
    here.load_pending_into_buffer()
    here.flush(final=True)
    here.shutdown()
    assert listed(tmp_path / "out") == Counter([*range(10), *range(20, 30)])


def test_two_runs_that_give_the_same_name_to_different_rows_are_noticed(tmp_path: Path) -> None:
    one, other = (open_uploader(tmp_path, cache_dir=tmp_path / name) for name in ("one", "other"))
    feed(one, 0, 10)
    one.flush(final=True)
    one.shutdown()
    other.add_sample(make_rows(range(10, 20)))
    with pytest.raises(HubError, match="written by another run"):
        other.flush(final=True)
    other.shutdown()
    assert listed(tmp_path / "out") == Counter(range(10))
    assert len(other.summary()["undelivered"]) == 1


def test_rows_that_wait_in_the_cache_alone_are_named_with_their_place(tmp_path: Path) -> None:
    uploader = open_uploader(tmp_path)
    uploader.add_sample(make_rows(range(4)))
    uploader.shutdown()
    with pytest.raises(ConfigError, match=r"out has 1 file not delivered in \S+: continue with"):
        open_uploader(tmp_path)

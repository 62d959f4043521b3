"""Section 7 of `extract_logits.py`: a shard is a fixed part of the job, whoever writes it."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import chat, rows_of
from outputs import Output, digest_ids, fill, finish, open_uploader, run_uploader
from processes import Child
from shard_rows import make_rows, stored

from explore_logits import LogitsError, load_logit_dataset
from extract_logits import ConfigError, HubError, digest_path

# Which conversations a part holds -----------------------------------------------------------------


def test_part_p_holds_the_pth_slice_of_the_selection_in_its_order(
    extract, write_chats, folder, monkeypatch
):
    monkeypatch.setattr("extract_logits.WINDOW_ROWS", 8)  # of two parts each
    rows = rows_of(30, id=[(7 * n) % 30 - 9 for n in range(30)])
    write_chats(rows)
    options = {"index_col": "id", "start_offset": 3, "limit": 23, "upload_every": 5}
    assert extract(**options).passed()["shards"] == 5  # batches run the longest first
    selection = [row["id"] for row in rows[3:26]]
    assert folder.parts() == {p: selection[5 * p : 5 * p + 5] for p in range(5)}
    before = folder.hashes()
    assert before.keys() == {f"data/part-{p:05d}.parquet" for p in range(5)}
    assert extract(**{**options, "limit": 8}, resume=True).code == 2  # which takes nothing away
    assert folder.hashes() == before


def test_a_part_says_what_it_holds_and_who_has_no_row(extract, write_chats, folder, monkeypatch):
    """Who has none is not tried again."""
    rows = rows_of(14)
    rows[3]["messages"] = rows[3]["messages"][:1]
    for number in range(4, 8):  # a whole part
        rows[number]["messages"] = []
    rows[9]["messages"] = chat("z" * 200)
    write_chats(rows)
    job = {"upload_every": 4, "max_seq_len": 100, "top_p_max": 20}
    summary = extract(**job).passed()
    skipped = {"no_assistant": 1, "empty": 4, "too_long": 1}
    assert (summary["rows"], summary["skipped"]) == (8, skipped)
    assert folder.parts() == {0: [0, 1, 2], 1: [], 2: [8, 10, 11], 3: [12, 13]}
    assert [folder.record(p)["skipped"] for p in range(4)] == [
        {"3": "no_assistant"}, dict.fromkeys("4567", "empty"), {"9": "too_long"}, {},
    ]  # fmt: skip
    for number in range(4):
        table, record = folder.table(number), folder.record(number)
        counts = [count for row in table["top_counts"].to_pylist() for count in row]
        ids = range(14)[4 * number : 4 * number + 4]
        wanted = {
            "number": number, "ids": digest_ids(ids), "conversations": len(ids),
            "rows": table.num_rows, "tokens": len(counts), "nucleus": sum(counts),
            "capped": counts.count(20),
        }  # fmt: skip
        assert wanted.items() <= record.items()
        assert 0 < record["actual"] < record["mass"] <= record["tokens"] or not counts
        assert table.schema.names == folder.table(0).schema.names
        settings = json.loads(table.schema.metadata[b"logits.extraction"])
        assert (settings["top_p_max"], settings["rows_per_part"]) == (20, 4)
    before = folder.hashes()
    monkeypatch.setattr("extract_logits.load_teacher", None)  # nobody needs it
    summary = extract(**job, resume=True).passed()
    assert (summary["rows"], summary["new_rows"], summary["skipped"]) == (8, 0, skipped)
    assert folder.hashes() == before


def test_a_size_is_turned_into_rows_once(extract, write_chats, folder):
    write_chats([{"messages": chat(f"{n} " + "z" * (40 + n % 20))} for n in range(90)])
    job = {"max_batch_size": 1, "upload_size_mb": 0.12, "resume": True}
    extract(**job, limit=50).passed()
    rows = folder.json("extraction_config.json")["rows_per_part"]
    first = len(folder.read("data/part-00000.parquet"))
    assert 0.03e6 < first < 0.36e6, f"{rows} rows take {first} bytes"  # of a teacher like no other
    before = folder.hashes()
    assert len(before) > 2
    extract(**job, limit=90, cache_dir="elsewhere").passed()  # where nothing was measured
    assert [len(ids) for ids in folder.parts().values()][:-1] == [rows] * (89 // rows)
    assert dict(list(before.items())[:-1]).items() <= folder.hashes().items()
    before = folder.hashes()
    folder.delete("extraction_config.json", "checkpoint.json")
    extract(**{**job, "upload_size_mb": 0.05}, limit=90).passed()
    assert folder.hashes() == before


# The file -----------------------------------------------------------------------------------------


def test_a_part_has_the_same_bytes_in_whatever_order_its_rows_come(tmp_path):
    chance, found = random.Random(3), []
    for name in ("a", "b", "c"):
        output, ids = Output(tmp_path / name), list(range(40, 60))
        uploader = open_uploader(output, tmp_path / "cache")
        for number in (1, 0):
            uploader.begin_part(number, ids[10 * number : 10 * number + 10])
        chance.shuffle(ids)
        while ids:
            batch = [ids.pop() for _ in range(min(len(ids), chance.randint(1, 6)))]
            uploader.add_sample(make_rows([index for index in batch if index != 47]))
            if 47 in batch:
                uploader.skip(47, "unusable_logits")
        finish(uploader)
        assert output.record(0)["skipped"] == {"47": "unusable_logits"}
        found.append(output.hashes())
    assert found[0] == found[1] == found[2]


def test_part_9000_lies_in_a_folder_of_its_own_and_is_found_there(place, tmp_path):
    for cache, lacking in (("cache", 1), ("elsewhere", 0)):
        uploader = open_uploader(place, tmp_path / cache)
        for number in (8_999, 9_000, 120_000):
            assert fill(uploader, number, [number]) == [number] * lacking
        finish(uploader)
    assert list(place.part_paths().values()) == [
        "data/001/part-09000.parquet", "data/013/part-120000.parquet", "data/part-08999.parquet"
    ]  # fmt: skip


def test_row_groups_are_small_and_pages_are_indexed(folder, tmp_path):
    uploader = open_uploader(folder, tmp_path / "cache")
    for number, tokens in enumerate((5, 900)):
        ids = range(100 * number, 100 * number + 100)
        uploader.begin_part(number, ids)
        uploader.add_sample(make_rows(ids, tokens=tokens))
    finish(uploader)
    file = pq.read_metadata(tmp_path / "out/data/part-00001.parquet")
    for number in range(file.num_row_groups):
        assert file.row_group(number).num_rows * 900 < 4 * 8192
    assert file.row_group(0).column(0).has_offset_index
    assert pq.read_metadata(tmp_path / "out/data/part-00000.parquet").num_row_groups <= 2


# Rows on their way --------------------------------------------------------------------------------


def test_rows_of_no_part_under_way_and_rows_that_came_before_are_ignored(folder, tmp_path):
    uploader = open_uploader(folder, tmp_path / "cache")
    uploader.add_sample(make_rows([2, 3]))
    assert uploader.begin_part(0, range(5)) == [0, 1, 2, 3, 4]
    for ids in ([0, 3, 0, 77], [3, 1, 2], [4]):
        assert not uploader.should_flush()
        uploader.add_sample(make_rows(ids))
    assert uploader.begin_part(0, range(5)) == []
    uploader.add_sample(make_rows([4]))
    assert finish(uploader)["rows"] == 5
    assert folder.parts() == {0: [0, 1, 2, 3, 4]}


def test_pending_rows_go_into_their_part_and_go_away_once_it_is_listed(place, tmp_path):
    for number in range(3):
        uploader = open_uploader(place, tmp_path / "cache")
        left = uploader.begin_part(0, range(10))
        fresh = [index for index in left if index % 3 != 2]
        assert fresh == [0, 1, 3, 4, 6, 7, 9][2 * number :]
        uploader.add_sample(make_rows(fresh[:2]))
        uploader.skip(3 * number + 2, "unusable_logits")
        assert uploader.save_pending_locally() == 2 * (number + 1)
        uploader.shutdown()
    assert [path.name for path in uploader.folder.rglob("*.parquet")] == ["pending-00000.parquet"]
    assert place.part_paths() == {}
    uploader = open_uploader(place, tmp_path / "cache")
    left = uploader.begin_part(0, range(10))
    assert set(left) <= {2, 5, 8, 9}  # it may ask again for what was skipped
    for index in set(left) - {9}:
        uploader.skip(index, "unusable_logits")
    uploader.add_sample(make_rows([9]))
    finish(uploader)
    assert place.parts() == {0: [0, 1, 3, 4, 6, 7, 9]}
    assert place.rows() == stored(place.ids())
    assert place.record(0)["skipped"] == dict.fromkeys("258", "unusable_logits")
    assert not list(uploader.folder.rglob("*.parquet"))


def leave_in_cache(kind: str, output: Output, cache: Path) -> Path:
    """Leave ten rows in the cache as a run does that is stopped at some point; return the file."""
    uploader = open_uploader(output, cache)
    uploader.begin_part(0, range(10 + (kind == "pending")))
    uploader.add_sample(make_rows(range(10)))
    uploader.shutdown()
    (path,) = uploader.folder.rglob("*.parquet")
    if kind == "backup":
        digest, backup = digest_path(path), path.with_name(f"backup_{path.name}")
        digest.rename(digest_path(backup))
        return path.rename(backup)
    return path


@pytest.mark.parametrize("kind", ["pending", "waiting", "backup"])
def test_damage_in_a_cached_file_is_noticed_and_its_rows_are_never_delivered(
    kind, folder, tmp_path
):
    """Flipped bytes anywhere in the pages, which a footer does not tell; and cut files."""
    rows = range(11 if kind == "pending" else 10)
    path = leave_in_cache(kind, folder, tmp_path / "cache")
    whole, digest = path.read_bytes(), digest_path(path).read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    damaged = [whole, whole[:-100], b"", b"PAR1" * 3]
    for at in sorted(random.Random(5).sample(range(4, footer), 5)):
        damaged.append(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
    for number, content in enumerate(damaged):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        digest_path(path).write_bytes(digest)
        summary = run_uploader(folder, tmp_path / "cache", len(rows))
        lost = [index for index in summary["asked"] if index < 10]
        assert lost == (list(range(10)) if number else []), f"damage {number} was not noticed"
        assert summary["undelivered"] == []
        assert folder.rows() == stored(rows)
        shutil.rmtree(folder.name)


@pytest.mark.parametrize("kind", ["pending", "waiting"])
def test_rows_that_wait_for_another_part_of_its_number_are_taken_by_id(kind, folder, tmp_path):
    """Such as when a source without --index-col was exchanged, or the limit raised."""
    leave_in_cache(kind, folder, tmp_path / "cache")
    uploader, ids = open_uploader(folder, tmp_path / "cache"), [*range(5), *range(20, 28)]
    left = uploader.begin_part(0, ids)
    assert set(ids) - set(range(10)) <= set(left) <= set(ids)
    uploader.add_sample(make_rows(left))
    finish(uploader)
    assert folder.parts() == {0: ids}
    assert folder.rows() == stored(ids)


def test_the_state_of_two_outputs_never_mixes(tmp_path, monkeypatch):
    """Nor that of other settings; and an output is the same however its path is spelled."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        leave_in_cache("pending", Output(tmp_path / name), tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*/pending/pending-00000.parquet"))) == 2
    anew = {"settings": {"seed": 43}, "resume": False, "force_restart": True}
    with pytest.raises(ConfigError, match="seed: 42 there, 43 now"):
        open_uploader(Output("./one"), tmp_path / "cache", settings=anew["settings"])
    for name, options, left in (
        ("./three", {}, list(range(11))), ("./one", {}, [10]), (f"{tmp_path}/./one/", {}, [10]),
        ("./one", anew, list(range(11))),
    ):  # fmt: skip
        uploader = open_uploader(Output(name), tmp_path / "cache", **options)
        assert uploader.begin_part(0, range(11)) == left
        uploader.shutdown()


def test_two_live_runs_of_one_worker_cannot_share_a_cache(folder, tmp_path, monkeypatch):
    """Nor can workers of two numbers of workers, which would own the same parts there."""
    monkeypatch.setattr("extract_logits.LOCK_WAIT_S", 0.1)
    uploader = open_uploader(folder, tmp_path / "cache", rank=0, world_size=2)
    for rank, workers in ((0, 2), (1, 3)):
        with pytest.raises(ConfigError, match=r"another process is writing.*--cache-dir"):
            open_uploader(folder, tmp_path / "cache", rank=rank, world_size=workers)
    open_uploader(folder, tmp_path / "other", rank=1, world_size=3).shutdown()
    open_uploader(folder, tmp_path / "cache", rank=1, world_size=2).shutdown()  # another worker
    open_uploader(Output(tmp_path / "b"), tmp_path / "cache").shutdown()  # another output
    uploader.shutdown()
    open_uploader(folder, tmp_path / "cache", rank=0, world_size=3).shutdown()


# Disks --------------------------------------------------------------------------------------------


def test_bytes_are_on_the_disk_before_a_file_gets_its_name(folder, tmp_path, monkeypatch):
    """Also where folders cannot be synced, and on another file system than the cache's."""
    synced: set[int] = set()
    sync, rename = os.fsync, os.replace

    def fsync(file: int) -> None:
        synced.add(os.fstat(file).st_ino)
        if Path(f"/proc/self/fd/{file}").is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(file)

    def replace(source: Path, target: Path) -> None:
        assert os.stat(source).st_ino in synced, f"{source} was renamed before it was synced"
        rename(source, target)

    def link(*_: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    for function in (fsync, replace, link):
        monkeypatch.setattr(os, function.__name__, function)
    run_uploader(folder, tmp_path / "cache", 12)
    assert folder.rows() == stored(range(12))
    assert (tmp_path / "out/data").stat().st_ino in synced


def test_a_full_disk_ends_the_run_and_costs_no_row(folder, tmp_path):
    def work(said: IO[str], limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(HubError, match=r"File too large.*make room"):
            run_uploader(folder, tmp_path / "cache", 30)

    for limit in (3000, 12_000):  # less than a pending file, and less than a part
        assert Child(lambda said, limit=limit: work(said, limit)).finish() == (0, "")
    assert run_uploader(folder, tmp_path / "cache", 30)["rows"] == 30
    assert folder.rows() == stored(range(30))


def test_a_flipped_bit_of_a_part_is_noticed_where_it_is_read(tmp_path):
    # 200 bits before the footer, seed 1; some are in what nobody reads
    output = Output(tmp_path / "out")
    run_uploader(output, tmp_path / "cache", 10)
    path = tmp_path / "out" / output.part_paths()[0]
    sound, right = path.read_bytes(), output.table(0)
    footer = len(sound) - 8 - int.from_bytes(sound[-8:-4], "little")
    noticed = 0
    for bit in np.random.default_rng(1).choice(8 * footer, 200, replace=False).tolist():
        data = bytearray(sound)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            assert load_logit_dataset(tmp_path / "out").take(range(10)).equals(right), bit
        except LogitsError:
            noticed += 1
    assert noticed > 150

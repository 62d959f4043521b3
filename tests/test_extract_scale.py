"""Many workers on one job: division, one output, twins, limits of the Hub."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CHATS, TEACHER, run_script
from loopback_hub import LoopbackHub
from shard_rows import SETTINGS, make_rows, make_schema

import extract_logits
from explore_logits import get_sample, load_logit_dataset
from extract_logits import (
    ExtractionConfig,
    HubError,
    StreamingHFUploader,
    choose_folders,
    deal_by_length,
    decode_ids,
    encode_ids,
    worker_of,
)

REPO = "tester/logits"
Opener = Callable[..., StreamingHFUploader]


@pytest.fixture(params=["folder", "hub"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Where shards go: a folder, or a repository of the loopback Hub; and what reads them."""
    if request.param == "folder":
        folder = tmp_path / "out"
        return SimpleNamespace(
            options={"output": str(folder)},
            tables=lambda: [pq.read_table(p) for p in sorted(folder.glob("data/**/*.parquet"))],
        )
    hub = request.getfixturevalue("hub")
    return SimpleNamespace(
        options={"output": REPO, "endpoint": hub.endpoint, "token": hub.token},
        tables=lambda: [
            pq.read_table(pa.BufferReader(hub.content(REPO, path)))
            for path in hub.files(REPO)
            if path.startswith("data/")
        ],
    )


@pytest.fixture
def open_uploader(output: Any, tmp_path: Path) -> Iterator[Opener]:
    """Open uploaders, 10 rows a shard, each as on a machine of its own."""
    opened: list[StreamingHFUploader] = []

    def open_one(**options: Any) -> StreamingHFUploader:
        uploader = StreamingHFUploader(
            **{
                **output.options,
                "schema": make_schema(SETTINGS),
                "settings": SETTINGS,
                "cache_dir": tmp_path / f"cache-{len(opened)}",
                "upload_every": 10,
                "resume": True,
                **options,
            },
        )
        opened.append(uploader)
        return uploader

    yield open_one
    for uploader in opened:
        uploader.shutdown()


def finish(uploader: StreamingHFUploader, indices: Any) -> dict[str, Any]:
    """Add rows, deliver everything, and return the summary."""
    uploader.load_pending_into_buffer()
    for index in indices:
        uploader.add_sample(make_rows([index]))
        if uploader.should_flush():
            uploader.flush()
    uploader.flush(final=True)
    uploader.shutdown()
    return uploader.summary()


def listed(output: Any) -> Counter[int]:
    """Count the ids in the shards that the output lists, and compare what the rows hold."""
    found: Counter[int] = Counter()
    for table in output.tables():
        ids = table["index"].to_pylist()
        found.update(ids)
        assert table.to_pylist() == make_rows(ids, measured=False).to_pylist()
    return found


# Division -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
def test_dealt_shares_are_equal_in_length_and_cover_the_job_once(world_size: int) -> None:
    rng = np.random.default_rng(0)
    indices = rng.permutation(2000)
    lengths = np.exp(rng.normal(6, 1, 2000)).astype(np.int64)
    workers = deal_by_length(indices, lengths, world_size)
    loads = np.bincount(workers, lengths, world_size)
    assert set(workers.tolist()) == set(range(world_size))
    assert loads.max() - loads.min() <= 2 * lengths.max()
    assert loads.max() - loads.min() < np.ptp(
        np.bincount(worker_of(indices, world_size), lengths, world_size)
    ) or world_size == 1  # fmt: skip
    order = rng.permutation(2000)
    assert np.array_equal(
        deal_by_length(indices[order], lengths[order], world_size), workers[order]
    )


# One output ---------------------------------------------------------------------------------------


def test_a_row_that_another_worker_has_delivered_meanwhile_is_not_delivered_again(
    output: Any, open_uploader: Opener
) -> None:
    two = open_uploader(rank=1, world_size=2)
    three = open_uploader(rank=2, world_size=3)  # begun before the other has delivered anything
    finish(two, range(0, 25))
    summary = finish(three, range(15, 45))
    assert listed(output) == Counter(range(45))
    assert summary["rows"] == 45
    assert not summary["undelivered"]


def test_a_shard_of_which_nothing_is_left_to_deliver_goes_away(
    output: Any, open_uploader: Opener
) -> None:
    one, other = open_uploader(rank=1, world_size=2), open_uploader(rank=2, world_size=3)
    finish(one, range(0, 20))
    assert finish(other, range(0, 20))["undelivered"] == []
    assert listed(output) == Counter(range(20))


def test_rows_kept_for_later_by_a_worker_that_is_gone_are_not_delivered_twice(
    output: Any, open_uploader: Opener, tmp_path: Path
) -> None:
    stopped = open_uploader(rank=0, world_size=2, cache_dir=tmp_path / "kept")
    stopped.add_sample(make_rows(range(5)))
    stopped.shutdown()
    heir = open_uploader(rank=0, world_size=3, cache_dir=tmp_path / "kept")
    finish(open_uploader(rank=1, world_size=3), range(0, 20))  # some of the same, divided by three
    finish(heir, [])
    assert listed(output) == Counter(range(20))


def test_a_second_run_of_the_same_worker_stops_and_the_first_one_goes_on(
    output: Any, open_uploader: Opener
) -> None:
    first, twin = open_uploader(rank=1, world_size=2), open_uploader(rank=1, world_size=2)
    first.add_sample(make_rows(range(10)))
    first.flush()
    finish(first, range(10, 15))
    with pytest.raises(HubError, match="two runs"):
        finish(twin, range(15))
    assert listed(output) == Counter(range(15))


def test_a_job_that_starts_over_does_not_count_the_rows_it_discards(
    output: Any, open_uploader: Opener
) -> None:
    for rank in range(2):
        finish(open_uploader(rank=rank, world_size=2), range(10 * rank, 10 * rank + 10))
    again = [
        open_uploader(rank=rank, world_size=3, resume=False, force_restart=True)
        for rank in range(3)
    ]
    finish(again[2], range(0, 7))
    finish(again[0], range(7, 14))
    finish(again[1], range(14, 20))
    assert listed(output) == Counter(range(20))


def test_the_rows_of_other_workers_are_known_without_reading_their_shards(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    options = {"output": REPO, "endpoint": hub.endpoint, "token": hub.token, "resume": True}
    options |= {"schema": make_schema(SETTINGS), "settings": SETTINGS, "upload_every": 2}
    for rank in range(3):
        cache = tmp_path / f"{rank}"
        worker = StreamingHFUploader(**options, rank=rank, world_size=3, cache_dir=cache)
        finish(worker, range(20 * rank, 20 * rank + 20))
    hub.log.clear()
    late = StreamingHFUploader(**options, rank=3, world_size=4, cache_dir=tmp_path / "late")
    assert late.get_resume_info().done.tolist() == list(range(60))
    late.shutdown()
    assert not [line for line in hub.log if "/data/" in line["path"]]
    assert len([line for line in hub.log if "/checkpoint-" in line["path"]]) <= 2 * 3


def test_ids_survive_packing() -> None:
    for ids in ([], [7], [-5, 3, 2**31 - 1, 0, -(2**31)]):
        assert decode_ids(encode_ids(np.asarray(ids, np.int64))).tolist() == sorted(ids)
    with pytest.raises(ValueError, match="damaged"):
        decode_ids("AAAA")


def test_a_folder_that_cannot_be_locked_is_locked_by_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    locked = []

    def flock(handle: int, _: int) -> None:
        if Path(f"/proc/self/fd/{handle}").resolve().is_dir():
            raise OSError(errno.EBADF, "Bad file descriptor")
        locked.append(handle)

    monkeypatch.setattr(fcntl, "flock", flock)
    destination = extract_logits.FolderDestination(tmp_path)
    destination.commit("one", {"data/part-00000.parquet": b"x"}, ())
    assert len(locked) == 1
    assert set(destination.list_files()) == {"data/part-00000.parquet"}


# Limits of the Hub --------------------------------------------------------------------------------


def test_a_full_folder_is_followed_by_the_next(
    output: Any, open_uploader: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract_logits, "SHARDS_PER_FOLDER", 2)
    finish(open_uploader(), range(0, 30))
    finish(open_uploader(rank=1, world_size=2), range(30, 60))
    finish(open_uploader(), range(60, 75))
    assert listed(output) == Counter(range(75))
    if "endpoint" in output.options:
        return
    folder = Path(output.options["output"])
    per_folder = Counter(path.parent.name for path in folder.rglob("*.parquet"))
    assert per_folder == {"data": 2, "001": 2, "002": 2, "003": 2}
    found = load_logit_dataset(str(folder), streaming=False)
    assert sorted(get_sample(found, i)["index"] for i in range(75)) == list(range(75))
    from datasets import load_dataset

    rows = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "datasets"))
    assert sorted(rows["index"]) == list(range(75))


def test_shards_go_where_there_is_room() -> None:
    names = [f"data/part-w{rank:02d}-00000.parquet" for rank in range(3)]
    most = extract_logits.SHARDS_PER_FOLDER
    files = [f"data/part-{n:05d}.parquet" for n in range(most - 1)] + ["README.md", "x.json"]
    assert list(choose_folders(names, files).values()) == [
        "data/part-w00-00000.parquet",
        "data/001/part-w01-00000.parquet",
        "data/001/part-w02-00000.parquet",
    ]


@pytest.mark.parametrize("workers", [1, 4, 30, 31, 64])
def test_commits_of_all_workers_together_stay_under_the_limit(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(extract_logits.time, "monotonic", lambda: clock[0])
    paces = [extract_logits.CommitPace(workers=workers, rank=rank) for rank in range(workers)]
    times = []
    hours = 12
    for pace in paces:
        clock[0] = 0.0
        while clock[0] < hours * 3600:
            clock[0] += pace.take()
            times.append(clock[0])
    last = hours * 3600 - 1
    times = [t for t in times if t < last] + [last] * workers  # each worker's last commit at once
    starts = sorted(times)
    most = max(sum(start <= t < start + 3600 for t in starts) for start in starts[::7])
    assert most <= 128  # what the Hub allows
    assert len(starts) / hours >= 35  # and still often enough


# The plan of a large job --------------------------------------------------------------------------


def describe(workers: int, **changes: Any) -> dict[str, Any]:
    """Return the shares of a plan of 1e9 stored tokens for the Hub."""
    plan = {"rows": 10**6, "stored_tokens": 10**9, "bytes": 2 * 10**11, "shards": 2000}
    plan |= {"hours": 128.0, **changes}
    options = {"model": "m", "dataset": "d", "output": "user/logits", "plan_price": 2.0}
    return extract_logits.describe_shares(ExtractionConfig(**options), plan, workers)


def test_a_plan_shows_the_whole_job_and_a_share_of_it() -> None:
    found = describe(64)
    assert found["share"] == {
        "rows": 15625, "stored_tokens": 15625000, "bytes": 3125000000, "shards": 32, "hours": 2.0,
    }  # fmt: skip
    assert found["cost"] == 256.0
    # 56 commits an hour are left beside the last ones: 30 + 112 + 64
    assert found["commits"] == 206
    assert describe(1)["commits"] == 2001


@pytest.mark.parametrize(
    ("workers", "changes", "words"),
    [
        (1, {}, []),
        (1, {"shards": 20_000, "hours": 1000.0}, ["3 folders", "gets slow"]),
        (8, {"shards": 200_000, "hours": 1e5}, ["--upload-size-mb", "a repository gets slow"]),
        (8, {"rows": 5 * 10**9}, ["3 outputs"]),
        (64, {}, ["shards a commit"]),
        (256, {"shards": 300}, ["2.1 hours"]),
    ],
)
def test_a_plan_says_which_limits_it_meets(
    workers: int, changes: dict[str, Any], words: list[str]
) -> None:
    limits = describe(workers, **changes)["limits"]
    assert len(limits) == len(words)
    assert all(word in limit for word, limit in zip(words, limits, strict=True))


def test_a_plan_of_given_tokens_at_a_given_rate_says_that_nobody_has_measured_them() -> None:
    given = ["--plan-tokens", "1e12", "--plan-rate", "20000", "--plan-price", "3"]
    workers = ["--rank", "5", "--world-size", "64", "--upload-size-mb", "500"]
    job = ["--model", TEACHER, "--dataset", CHATS, "--index-col", "id", "--limit", 20]
    done = run_script("extract_logits.py", *job, "--output", REPO, "--plan", *given, *workers)
    assert done.code == 0, done.stderr
    plan = done.summary
    assert plan["stored_tokens"] == 10**12
    assert plan["hours"] == pytest.approx(10**12 / 20000 / 3600, rel=1e-6)
    assert plan["share"]["hours"] == pytest.approx(plan["hours"] / 64, rel=1e-3)
    assert plan["cost"] == pytest.approx(3 * plan["hours"], rel=1e-6)
    assert plan["selected_rows"] == 20  # of the whole job, not of a worker
    assert "each of 64" in done.stdout
    assert "nobody has measured" in done.stdout


# The table ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "output"),
    [("3 → 2 → 4 workers, all killed", "Hub"), ("2 and 3 workers at the same time", "folder")],
)
def test_no_row_is_lost_or_doubled_whatever_the_workers_do(job: str, output: str) -> None:
    script = Path(__file__).with_name("scale_table.py")
    command = [sys.executable, str(script), "--seed", "3", "--job", job, "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = json.loads(done.stdout.splitlines()[-1])["lines"]
    assert line["runs"] >= 5
    assert line["kills"] >= (3 if "killed" in job else 0)
    assert [line[name] for name in ("lost", "twice", "different", "unexpected")] == [0, 0, 0, []]

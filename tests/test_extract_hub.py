"""Delivery to the Hub: the real clients against a loopback Hub, faults included."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CHATS, TEACHER, run_script
from loopback_hub import LoopbackHub
from shard_rows import SETTINGS, make_rows, make_schema

import extract_logits
from explore_logits import SCHEMA
from extract_logits import (
    ConfigError,
    HideTokens,
    HubError,
    ResumeInfo,
    StreamingHFUploader,
    make_card,
)

REPO = "tester/logits"
COMMIT = f"POST /api/datasets/{REPO}/commit/"
Opener = Callable[..., StreamingHFUploader]


@pytest.fixture
def open_uploader(hub: LoopbackHub, tmp_path: Path) -> Iterator[Opener]:
    """Open uploaders of `REPO`, 10 rows a shard, and shut them down at the end."""
    opened = []

    def open_one(**options: Any) -> StreamingHFUploader:
        settings = options.pop("settings", SETTINGS)
        uploader = StreamingHFUploader(
            REPO,
            **{
                "schema": make_schema(settings),
                "settings": settings,
                "chat_template": "{{ messages }}",
                "cache_dir": tmp_path / "cache",
                "upload_every": 10,
                "endpoint": hub.endpoint,
                "token": hub.token,
                **options,
            },
        )
        opened.append(uploader)
        return uploader

    yield open_one
    for uploader in opened:
        uploader.shutdown()


def feed(uploader: StreamingHFUploader, start: int, stop: int) -> None:
    """Add rows one by one, and flush as a run does."""
    for index in range(start, stop):
        uploader.add_sample(make_rows([index]))
        if uploader.should_flush():
            uploader.flush()


def finish(uploader: StreamingHFUploader, start: int, stop: int) -> dict[str, Any]:
    """Add rows, deliver everything, and return the summary."""
    feed(uploader, start, stop)
    uploader.flush(final=True)
    uploader.shutdown()
    return uploader.summary()


def listed(hub: LoopbackHub) -> Counter[int]:
    """Count the ids in the shards that the Hub lists."""
    found: Counter[int] = Counter()
    for path in hub.files(REPO):
        if path.startswith("data/"):
            table = pq.read_table(pa.BufferReader(hub.content(REPO, path)))
            found.update(table["index"].to_pylist())
    return found


def requests(hub: LoopbackHub, pattern: str) -> list[dict[str, Any]]:
    """Return the log of the requests that match."""
    return [line for line in hub.log if re.search(pattern, f"{line['method']} {line['path']}")]


def test_each_shard_lands_with_its_checkpoint_in_one_commit(
    hub: LoopbackHub, open_uploader: Opener
) -> None:
    finish(open_uploader(), 0, 25)
    repo = hub.store.get("dataset", REPO)
    for commit in repo.commits.values():
        shards = {path for path in commit.tree if path.startswith("data/")}
        if not shards:
            continue
        checkpoint = json.loads(hub.store.path_of(commit.tree["checkpoint.json"]).read_text())
        assert set(checkpoint["shards"]) == shards
        for name, record in checkpoint["shards"].items():
            assert record["sha256"] == commit.tree[name].lfs
            assert record["bytes"] == commit.tree[name].size
    assert listed(hub) == Counter(range(25))
    assert {"README.md", "extraction_config.json", "chat_template.jinja"} <= hub.files(REPO).keys()


FAULTS: list[dict[str, Any]] = [
    {"status": 408},
    {"status": 409},
    {"status": 412},
    {"status": 429},
    {"status": 429, "headers": {"Retry-After": "1"}},
    {"status": 500},
    {"status": 503, "after": True},
    {"drop": "before"},
    {"drop": "after"},
    {"drop": "body", "drop_after": 10},
    {"drop": "before", "rst": True},
    {"drop": "after", "rst": True},
]


UPLOAD_REQUESTS = ("preupload/", "objects/batch", "PUT /_lfs", "objects/verify", "commit/")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: "-".join(map(str, fault.values())))
def test_a_fault_that_can_pass_costs_no_row_and_doubles_none(
    hub: LoopbackHub, open_uploader: Opener, fault: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract_logits, "read_retry_after", lambda headers, limited: 0.0)
    for number, request_line in enumerate(UPLOAD_REQUESTS):
        hub.fault(request_line, skip=number % 2, **fault)
    summary = finish(open_uploader(), 0, 35)
    assert summary["undelivered"] == []
    assert listed(hub) == Counter(range(35))
    assert all(f.count == 0 for f in hub.faults)


@pytest.mark.parametrize("request_line", ["GET .*/tree/", f"GET /api/datasets/{REPO}$", "resolve/"])
@pytest.mark.parametrize(
    "fault", [{"status": 503}, {"drop": "body", "drop_after": 10, "rst": True}]
)
def test_a_resume_survives_faults_in_every_request_it_makes(
    hub: LoopbackHub, open_uploader: Opener, request_line: str, fault: dict[str, Any]
) -> None:
    finish(open_uploader(), 0, 25)
    hub.fault(request_line, **fault)
    assert open_uploader(resume=True).get_resume_info().done.tolist() == list(range(25))


def test_a_commit_whose_answer_is_lost_is_found_landed(
    hub: LoopbackHub, open_uploader: Opener
) -> None:
    hub.fault(COMMIT, drop="after")
    assert finish(open_uploader(), 0, 10)["rows"] == 10
    assert len(hub.store.get("dataset", REPO).commits) == 2  # the first one and ours


def test_retry_after_is_waited_for(hub: LoopbackHub, open_uploader: Opener) -> None:
    hub.fault(COMMIT, status=429, headers={"Retry-After": "1"})
    finish(open_uploader(), 0, 10)
    first, second = (line["t"] for line in requests(hub, COMMIT))
    assert second - first >= 1


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "hf auth login"), (403, "write"), (404, "--output")]
)
def test_what_no_retry_heals_is_refused_at_once_and_the_rows_stay(
    hub: LoopbackHub, open_uploader: Opener, tmp_path: Path, status: int, remedy: str
) -> None:
    uploader = open_uploader()
    hub.fault("preupload|commit/", status=status, count=99)
    with pytest.raises(HubError, match=remedy):
        finish(uploader, 0, 25)
    uploader.shutdown()
    assert len(requests(hub, "preupload|commit/")) == 1
    assert uploader.summary()["undelivered"]
    kept = make_resume_info(open_uploader, hub).pending.size
    assert kept >= 10
    assert finish_pending(open_uploader(resume=True))["rows"] == kept
    assert sum(listed(hub).values()) == kept


def make_resume_info(open_uploader: Opener, hub: LoopbackHub) -> ResumeInfo:
    """Return what a resumed run finds once the Hub is well again."""
    hub.clear()
    uploader = open_uploader(resume=True)
    info = uploader.get_resume_info()
    uploader.shutdown()
    return info


def finish_pending(uploader: StreamingHFUploader) -> dict[str, Any]:
    """Deliver what earlier runs left."""
    uploader.load_pending_into_buffer()
    uploader.flush(final=True)
    uploader.shutdown()
    return uploader.summary()


def test_a_missing_token_and_a_wrong_one_are_refused_before_the_work(
    hub: LoopbackHub, open_uploader: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN_PATH", "/nonexistent")
    for token in (False, "hf_wrongwrongwrong"):
        with pytest.raises(HubError, match="hf auth login") as caught:
            open_uploader(token=token)
        assert "hf_wrong" not in str(caught.value)


def test_a_repository_that_the_token_may_not_write_is_refused_before_the_work(
    hub: LoopbackHub, open_uploader: Opener
) -> None:
    finish(open_uploader(), 0, 10)
    hub.read_only.add(REPO)
    with pytest.raises(HubError, match="may not write"):
        open_uploader(resume=True)


def test_private_creates_a_private_repository_and_refuses_a_public_one(
    hub: LoopbackHub, open_uploader: Opener, tmp_path: Path
) -> None:
    finish(open_uploader(private=True), 0, 10)
    assert hub.store.get("dataset", REPO).private
    open_uploader(private=True, resume=True).shutdown()
    hub.store.get("dataset", REPO).private = False
    with pytest.raises(ConfigError, match="public"):
        open_uploader(private=True, resume=True)


def test_what_stays_undelivered_becomes_a_backup_that_the_end_and_the_next_run_try(
    hub: LoopbackHub, open_uploader: Opener, tmp_path: Path
) -> None:
    uploader = open_uploader()
    feed(uploader, 0, 5)
    hub.fault(COMMIT, status=503, count=10_000)
    summary = finish(uploader, 5, 25)
    assert summary["rows"] == 0
    assert all("backup_part-" in path for path in summary["undelivered"])
    assert {Path(path).name for path in summary["undelivered"]} == {
        f"backup_part-{number:05d}.parquet" for number in range(3)
    }
    hub.clear()
    hub.fault(COMMIT, status=503, count=7)  # every try of the first delivery
    summary = finish(open_uploader(resume=True), 25, 40)
    assert summary["undelivered"] == []
    assert listed(hub) == Counter(range(40))
    assert not list(tmp_path.glob("cache/**/*.parquet"))


def test_a_backup_whose_rows_another_machine_has_redone_is_dropped(
    hub: LoopbackHub, open_uploader: Opener, tmp_path: Path
) -> None:
    uploader = open_uploader()
    hub.fault(COMMIT, status=503, count=10_000)
    finish(uploader, 0, 25)
    hub.clear()
    finish(open_uploader(cache_dir=tmp_path / "other", resume=True), 5, 30)
    uploader = open_uploader(resume=True)
    assert uploader.get_resume_info().pending.tolist() == [0, 1, 2, 3, 4]
    finish_pending(uploader)
    assert listed(hub) == Counter(range(30))


def test_a_second_run_of_the_same_job_is_noticed_before_it_doubles_a_row(
    hub: LoopbackHub, open_uploader: Opener, tmp_path: Path
) -> None:
    first = open_uploader()
    second = open_uploader(cache_dir=tmp_path / "other", resume=True)
    finish(first, 0, 10)
    with pytest.raises(HubError, match="another run"):
        finish(second, 5, 15)
    assert listed(hub) == Counter(range(10))


def test_a_person_may_edit_the_card_while_the_run_goes_on(
    hub: LoopbackHub, open_uploader: Opener
) -> None:
    uploader = open_uploader()
    finish(uploader, 0, 10)
    card = hub.content(REPO, "README.md").decode()
    uploader = open_uploader(resume=True)
    hub.edit(
        REPO, "README.md", f"{card}\n## Mine\n".replace("tags:", "license: mit\ntags:").encode()
    )
    finish(uploader, 10, 20)
    card = hub.content(REPO, "README.md").decode()
    assert "| conversations | 20 |" in card
    assert card.endswith("\n## Mine\n")
    assert "license: mit" in card
    assert card.count("## Columns") == 1


def test_a_card_that_was_there_before_is_kept_below_the_line() -> None:
    figures = extract_logits.Figures(rows=1, tokens=10)
    kinds: dict[str, Any] = {"figures": figures, "shards": 1, "size_bytes": 2000}
    card = make_card("a/b", SETTINGS, previous="Hello.\n", **kinds)
    assert card.endswith(f"{extract_logits.CARD_LINE}\n\nHello.\n")
    assert make_card("a/b", SETTINGS, previous=card, **kinds) == card
    broken = "---\ntags: [\n---\nHello.\n"
    assert make_card("a/b", SETTINGS, previous=broken, **kinds) == broken


def run_python(code: str, hub: LoopbackHub, tmp_path: Path) -> str:
    """Run code in a process whose Hub is the loopback one, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "PATH": "",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_snippet_of_the_card_runs_and_load_dataset_needs_the_name_alone(
    hub: LoopbackHub, open_uploader: Opener, tmp_path: Path
) -> None:
    finish(open_uploader(), 0, 25)
    card = hub.content(REPO, "README.md").decode()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert snippet
    more = (
        "print(row['index'], probs.sum() > 0)\n"
        f"dataset = load_dataset({REPO!r})\n"
        "print(list(dataset), sorted(dataset['train']['index']), dataset['train'].column_names)"
    )
    printed = run_python(f"{snippet[1]}\n{more}", hub, tmp_path).splitlines()
    assert printed[0].startswith("first token:")
    assert printed[-2:] == ["0 True", f"['train'] {list(range(25))} {SCHEMA.names}"]


def number_rows(rows: pa.Table, start: int) -> pa.Table:
    """Return the rows with ids from `start` on."""
    ids = pa.array(range(start, start + rows.num_rows), pa.int32())
    return rows.set_column(0, rows.schema.field(0), ids)


def test_resume_reads_under_a_megabyte_of_four_shards_of_40_mb(
    hub: LoopbackHub, open_uploader: Opener, tmp_path: Path
) -> None:
    rows = make_rows(range(500), tokens=800)
    uploader = open_uploader(upload_every=500)
    for number in range(4):
        uploader.add_sample(number_rows(rows, 500 * number))
    uploader.flush(final=True)
    uploader.shutdown()
    assert uploader.summary()["bytes"] > 4 * 40e6
    for checkpoint in ("whole", "broken"):
        if checkpoint == "broken":
            hub.edit(REPO, "checkpoint.json", b"{")
        hub.clear()
        uploader = open_uploader(resume=True, cache_dir=tmp_path / checkpoint)
        assert uploader.get_resume_info().done.size == 2000
        sent = sum(line["sent"] for line in hub.log)
        print(f"bytes to resume over 4 shards of 40 MB, checkpoint {checkpoint}: {sent:,}")
        assert sent < 1_000_000


def test_resume_reads_only_two_small_columns_of_a_stranger_s_shards(
    hub: LoopbackHub, open_uploader: Opener, tmp_path: Path
) -> None:
    uploader = open_uploader()
    uploader.create_output()
    uploader.shutdown()
    rows = make_rows(range(200), tokens=500, measured=False)
    pq.write_table(rows, tmp_path / "part.parquet", row_group_size=64)
    data = (tmp_path / "part.parquet").read_bytes()
    hub.edit(REPO, "data/part-00000.parquet", data)
    hub.clear()
    assert open_uploader(resume=True).get_resume_info().done.tolist() == list(range(200))
    assert len(data) > 5e6
    assert sum(line["sent"] for line in hub.log) < 200_000


def test_tokens_are_hidden_in_errors_logs_files_and_cards(
    hub: LoopbackHub,
    open_uploader: Opener,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.handler.addFilter(HideTokens())
    caplog.set_level(logging.DEBUG)
    uploader = open_uploader()
    hub.fault(COMMIT, status=500, message=f"bad {hub.token} and hf_abcDEF123456", count=2)
    finish(uploader, 0, 10)
    hub.fault("preupload", status=403, message=f"no {hub.token} hf_abcDEF123456")
    with pytest.raises(HubError) as caught:
        finish(open_uploader(resume=True), 10, 20)
    assert "***" in str(caught.value)
    texts = [str(caught.value), caplog.text, *(r.getMessage() for r in caplog.records)]
    texts += [hub.content(REPO, path).decode(errors="replace") for path in hub.files(REPO)]
    texts += [p.read_bytes().decode(errors="replace") for p in tmp_path.rglob("*") if p.is_file()]
    assert not [text for text in texts if hub.token in text or "hf_abcDEF" in text]


def test_the_token_is_never_sent_to_the_storage(hub: LoopbackHub, open_uploader: Opener) -> None:
    finish(open_uploader(), 0, 25)
    open_uploader(resume=True)
    fetched = requests(hub, "GET /_lfs")
    assert fetched
    assert not [line for line in fetched if line["auth"]]


def test_a_slow_hub_slows_the_run_instead_of_filling_the_disk(
    hub: LoopbackHub, open_uploader: Opener, tmp_path: Path
) -> None:
    uploader = open_uploader(upload_every=1)
    hub.fault(COMMIT, latency=0.2, count=999)
    most = 0
    for index in range(30):
        uploader.add_sample(make_rows([index]))
        uploader.flush()
        most = max(most, len(list(tmp_path.glob("cache/*/part-*.parquet"))))
    assert 1 < most <= extract_logits.MAX_WAITING_SHARDS + 1
    assert uploader.is_uploading()
    uploader.flush(final=True)
    assert not uploader.is_uploading()
    assert listed(hub) == Counter(range(30))


def test_commits_are_paced_under_the_limit_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(extract_logits.time, "monotonic", lambda: clock[0])
    pace = extract_logits.CommitPace()
    times = []
    for _ in range(1000):
        clock[0] += pace.take()
        times.append(clock[0])
    assert times[extract_logits.COMMIT_BURST - 1] == times[0]
    in_an_hour = [sum(t <= u < t + 3600 for u in times) for t in times[:500]]
    assert max(in_an_hour) <= extract_logits.COMMITS_PER_HOUR + 1


def test_a_run_that_is_told_to_stop_does_not_wait_for_a_hub_that_is_down(
    hub: LoopbackHub, open_uploader: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract_logits, "RETRY_WAITS_S", (60.0,))
    stopping = threading.Event()
    uploader = open_uploader(upload_every=1, stopping=stopping.is_set)
    hub.fault(COMMIT, status=503, count=999)
    threading.Timer(0.5, stopping.set).start()
    started = time.monotonic()
    feed(uploader, 0, 20)
    uploader.save_pending_locally()
    uploader.shutdown()
    assert time.monotonic() - started < 10
    hub.clear()
    finish_pending(open_uploader(resume=True))
    assert listed(hub) == Counter(range(20))


def test_workers_share_a_repository_without_sharing_names(
    hub: LoopbackHub, open_uploader: Opener
) -> None:
    workers = [open_uploader(rank=rank, world_size=3) for rank in range(3)]
    for rank, worker in enumerate(workers):
        feed(worker, rank * 20, rank * 20 + 15)
    for worker in workers:
        worker.flush(final=True)
        worker.shutdown()
    assert {f"data/part-w0{rank}-0000{n}.parquet" for rank in range(3) for n in range(2)} <= set(
        hub.files(REPO)
    )
    assert {f"checkpoint-w0{rank}.json" for rank in range(3)} <= set(hub.files(REPO))
    assert "| conversations | 45 |" in hub.content(REPO, "README.md").decode()
    info = open_uploader(resume=True).get_resume_info()  # as one worker
    assert info.done.size == 45


def test_a_worker_that_starts_late_is_not_taken_for_a_second_job(
    hub: LoopbackHub, open_uploader: Opener
) -> None:
    finish(open_uploader(rank=0, world_size=2), 0, 10)
    finish(open_uploader(rank=1, world_size=2), 10, 20)
    assert listed(hub) == Counter(range(20))
    for options in ({"rank": 1, "world_size": 2}, {"rank": 0, "world_size": 1}):
        with pytest.raises(ConfigError, match="--resume"):
            open_uploader(**options)


def test_force_restart_replaces_the_shards_in_the_first_commit(
    hub: LoopbackHub, open_uploader: Opener
) -> None:
    finish(open_uploader(), 0, 45)
    with pytest.raises(ConfigError, match="--force-restart"):
        open_uploader()
    before = list(hub.store.get("dataset", REPO).commits)
    uploader = open_uploader(force_restart=True, settings={**SETTINGS, "top_p": 0.9})
    hub.fault(COMMIT, drop="after")
    finish(uploader, 100, 115)
    assert listed(hub) == Counter(range(100, 115))
    commits = hub.store.get("dataset", REPO).commits
    first = next(commits[oid] for oid in commits if oid not in before)
    assert [path for path in first.tree if path.startswith("data/")] == ["data/part-00000.parquet"]


def test_a_refused_upload_ends_in_exit_code_4_and_the_next_run_delivers(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    argv = ["--model", TEACHER, "--dataset", CHATS, "--index-col", "id", "--limit", 6]
    argv += ["--upload-every", 2, "--output", REPO, "--cache-dir", tmp_path / "cache", "--resume"]
    env = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0"}
    hub.fault("commit/", status=403, count=99)
    done = run_script("extract_logits.py", *argv, **env)
    assert done.code == 4
    assert "hf auth login" in done.stderr.splitlines()[-1]
    assert list(tmp_path.glob("cache/*/part-*.parquet"))
    hub.clear()
    done = run_script("extract_logits.py", *argv, **env)
    assert done.code == 0, done.stderr
    assert done.summary["rows"] == 6
    assert sum(listed(hub).values()) == 6
    assert hub.token not in done.stdout + done.stderr


def test_a_repository_is_created_once_there_is_something_to_store(
    hub: LoopbackHub, open_uploader: Opener
) -> None:
    open_uploader().shutdown()
    assert not requests(hub, r"POST /api/repos/create")
    uploader = open_uploader()
    uploader.create_output()
    assert hub.files(REPO)
    uploader.shutdown()
    finish(open_uploader(resume=True), 0, 15)
    assert listed(hub) == Counter(range(15))


def test_a_signal_ends_the_waiting_for_a_dead_hub(
    monkeypatch: pytest.MonkeyPatch, open_uploader: Opener
) -> None:
    monkeypatch.setattr(extract_logits, "RETRY_WAITS_S", (60,))
    stopping = threading.Event()
    threading.Timer(1.0, stopping.set).start()
    started = time.monotonic()
    with pytest.raises(extract_logits.OutOfReachError):
        open_uploader(endpoint="http://127.0.0.1:9", stopping=stopping.is_set)
    assert time.monotonic() - started < 20


def test_a_run_that_waits_for_a_dead_hub_ends_with_the_signals_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extract_logits, "RETRY_WAITS_S", (60,))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    argv = ["--model", TEACHER, "--dataset", CHATS, "--output", REPO, "--resume"]
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    assert extract_logits.main([str(arg) for arg in argv]) == 130
    assert json.loads(capsys.readouterr().out) == {"output": REPO, "exit_code": 130}


def test_a_commit_that_comes_between_the_look_and_ours_is_not_overwritten(
    open_uploader: Opener, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(open_uploader(), 100, 110)
    one, other = (open_uploader(cache_dir=tmp_path / n, resume=True) for n in ("one", "other"))
    one.add_sample(make_rows(range(10)))
    real = other._destination.commit

    def commit_after_one(*args: Any) -> None:
        if not one.summary()["rows"] > 10:
            one.flush(final=True)
        real(*args)

    monkeypatch.setattr(other._destination, "commit", commit_after_one)
    other.add_sample(make_rows(range(10, 20)))
    with pytest.raises(HubError, match="written by another run"):
        other.flush(final=True)
    assert listed(hub) == Counter([*range(10), *range(100, 110)])

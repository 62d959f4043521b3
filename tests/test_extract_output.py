"""Section 8 of `extract_logits.py`: delivery to a folder and to a loopback Hub, faults included."""

from __future__ import annotations

import functools
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Extract, Write, rows_of
from loopback_hub import LoopbackHub
from outputs import Output, digest_ids, fill, fill_parts, finish, open_uploader, run_uploader
from processes import run_code
from shard_rows import SETTINGS, make_row, make_rows, stored

import extract_logits
from explore_logits import SCHEMA
from extract_logits import ConfigError, HubError

REPO = "tester/logits"
COMMIT = f"POST /api/datasets/{REPO}/commit/"
OVER = {"resume": False, "force_restart": True, "settings": {"top_p": 0.9}}


@pytest.fixture
def repo(hub: LoopbackHub) -> Output:
    return Output(REPO, hub)


def requests(hub: LoopbackHub, pattern: str) -> list[dict[str, Any]]:
    """Return the log of the requests that match."""
    return [line for line in hub.log if re.search(pattern, f"{line['method']} {line['path']}")]


def run_workers(output: Output, cache: Path, workers: int, parts: int = 2, **options: Any) -> None:
    """Let workers write parts of 10 rows one after another, each into a cache of its own."""
    for rank in range(workers):
        share = {"rank": rank, "world_size": workers, **options}
        uploader = open_uploader(output, cache / f"{rank}", **share)
        for number in range(rank, parts, workers):
            fill(uploader, number)
        finish(uploader)


# What lands ---------------------------------------------------------------------------------------


def test_an_output_holds_parts_checkpoint_settings_template_and_card(place, tmp_path):
    """On the Hub each part lands together with the checkpoint that names it."""
    summary = run_uploader(place, tmp_path / "cache", 45)
    sizes = [len(place.read(path)) for path in place.part_paths().values()]
    assert place.files() == {
        "README.md", "chat_template.jinja", "checkpoint.json", "extraction_config.json",
        *(f"data/part-0000{n}.parquet" for n in range(5)),
    }  # fmt: skip
    assert place.rows() == stored(range(45))
    assert (summary["rows"], summary["shards"], summary["undelivered"]) == (45, 5, [])
    assert SETTINGS.items() <= place.json("extraction_config.json").items()
    assert place.read("chat_template.jinja").decode().strip() == "{{ messages }}"
    columns = place.json("checkpoint.json")["parts"]
    assert columns["number"] == [0, 1, 2, 3, 4]
    assert columns["rows"] == columns["conversations"] == [10, 10, 10, 10, 5]
    assert columns["ids"] == [digest_ids(ids) for ids in place.parts().values()]
    assert (columns["bytes"], summary["bytes"]) == (sizes, sum(sizes))
    assert not list((tmp_path / "cache").rglob("*.parquet"))
    store = place.hub and place.hub.store
    for commit in store.get("dataset", REPO).commits.values() if store else ():
        if parts := [path for path in commit.tree if path.startswith("data/")]:
            text = store.path_of(commit.tree["checkpoint.json"]).read_text()
            assert len(json.loads(text)["parts"]["number"]) == len(parts)
            assert {"README.md", "extraction_config.json"} <= commit.tree.keys()


def test_a_repository_is_created_once_there_is_something_to_store(repo, tmp_path):
    open_uploader(repo, tmp_path / "cache", private=True).shutdown()
    assert not requests(repo.hub, r"POST /api/repos/create")
    run_uploader(repo, tmp_path / "cache", 15, private=True)
    assert repo.hub.store.get("dataset", REPO).private
    assert repo.rows() == stored(range(15))
    repo.hub.store.get("dataset", REPO).private = False
    with pytest.raises(ConfigError, match="public"):
        open_uploader(repo, tmp_path / "cache", private=True)


@pytest.mark.parametrize("name", ["nothing-such", "user/..", "user/x--y", "üser/näme"])
def test_an_output_that_is_neither_folder_nor_repository_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        open_uploader(Output(name), tmp_path / "cache")


# Resume -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "checkpoint", ["missing", "broken", "old", "missing, part cut", "whole, part cut"]
)
def test_resume_from_an_empty_cache_knows_what_is_done(checkpoint, place, tmp_path):
    run_uploader(place, tmp_path / "cache", 10)
    older = place.read("checkpoint.json")
    run_uploader(place, tmp_path / "cache", 25)
    whole, hashes = place.json("checkpoint.json"), place.hashes()
    if checkpoint in ("broken", "old"):
        place.write("checkpoint.json", older if checkpoint == "old" else b"null")
    elif "missing" in checkpoint:
        place.delete("checkpoint.json")
    if is_cut := "cut" in checkpoint:
        place.write("data/part-00001.parquet", place.read("data/part-00001.parquet")[:-50])
    asked = run_uploader(place, tmp_path / "elsewhere", 25)["asked"]
    assert asked == (list(range(10, 20)) if is_cut else [])
    assert place.hashes() == hashes
    asked = run_uploader(place, tmp_path / "there", 31)["asked"]
    assert asked == list(range(20, 31))  # the last part is a longer one now
    assert place.rows() == stored(range(31))
    assert dict(list(hashes.items())[:2]).items() <= place.hashes().items()
    place.delete("data/part-00002.parquet", "data/part-00003.parquet")
    run_uploader(place, tmp_path / "elsewhere", 25)
    assert place.json("checkpoint.json") == whole
    assert place.hashes() == hashes


def test_an_output_with_parts_needs_resume_or_force_restart(place, tmp_path):
    """But a worker that starts late is not taken for a second job."""
    run_workers(place, tmp_path / "cache", 2, resume=False)
    assert place.rows() == stored(range(20))
    assert {"checkpoint-w00.json", "checkpoint-w01.json"} <= place.files()
    assert "| conversations | 20 |" in place.read("README.md").decode()
    for options in ({}, {"rank": 1, "world_size": 2}):
        with pytest.raises(ConfigError, match=r"--resume.*--force-restart"):
            open_uploader(place, tmp_path / "late", **options, resume=False)
    uploader = open_uploader(place, tmp_path / "cache", **OVER)
    if place.hub:
        place.hub.fault(COMMIT, status=503, after=True)  # of that which removes the old parts
    assert fill(uploader, 0, range(100, 110)) == list(range(100, 110))
    assert finish(uploader)["rows"] == 10
    assert place.parts() == {0: list(range(100, 110))}
    assert [path for path in place.files() if "checkpoint" in path] == ["checkpoint.json"]
    assert place.json("checkpoint.json")["parts"]["number"] == [0]
    assert place.json("extraction_config.json")["top_p"] == 0.9


def test_workers_that_start_over_leave_nothing_old_and_all_of_each_other(place, tmp_path):
    run_workers(place, tmp_path / "cache", 4, parts=7)
    new = {"settings": OVER["settings"], "world_size": 3}
    workers = [open_uploader(place, tmp_path / f"{n}", rank=n, **OVER | new) for n in range(3)]
    workers[2].shutdown()  # before it removes its own of the old job
    for rank in (1, 0):
        fill(workers[rank], rank)
        finish(workers[rank])
    assert list(place.part_paths()) == [0, 1, 2, 5]
    place.write("data/part-00011.parquet", place.read("data/part-00000.parquet"))
    third = open_uploader(place, tmp_path / "2", rank=2, **new)
    assert fill(third, 2) == list(range(20, 30))
    third.discard_strays()
    finish(third)
    assert place.parts() == {n: list(range(10 * n, 10 * n + 10)) for n in range(3)}
    names = {path for path in place.files() if path.startswith("checkpoint")}
    assert names == {f"checkpoint-w0{n}.json" for n in range(3)}
    assert "| conversations | 30 |" in place.read("README.md").decode()


def test_other_settings_are_refused_with_their_differences(place, tmp_path):
    """Also those that are not of the parts; a part of other conversations is not done."""
    run_uploader(place, tmp_path / "cache", 20)
    before, longer = place.hashes(), {"rows_per_part": 20}
    with pytest.raises(ConfigError, match=r"top_p.*0\.98.*0\.9"):
        open_uploader(place, tmp_path / "elsewhere", settings={"top_p": 0.9})
    changed = {**place.json("extraction_config.json"), **longer}
    place.write("extraction_config.json", json.dumps(changed).encode())
    with pytest.raises(ConfigError, match="are of another job than extraction_config"):
        open_uploader(place, tmp_path / "cache", settings=longer)
    place.delete("extraction_config.json", "checkpoint.json")  # the parts hold them, too
    with pytest.raises(ConfigError, match="rows_per_part"):
        open_uploader(place, tmp_path / "cache", settings=longer)
    versions = {"versions": {"torch": "3"}}  # which are not of the job
    assert run_uploader(place, tmp_path / "cache", 20, settings=versions)["asked"] == []
    assert place.hashes() == before
    uploader = open_uploader(place, tmp_path / "there")
    swapped = [*range(10, 19), 300]
    assert fill(uploader, 1, swapped) == swapped
    finish(uploader)
    assert place.parts() == {0: list(range(10)), 1: swapped}


def test_no_code_of_strangers_runs_because_an_output_says_so(folder, tmp_path):
    """The other options that it records are taken, but for those that are given."""
    options = {"model": "m", "dataset": "d", "trust_remote_code": True, "cache_dir": "/x"}
    kinds = {"streaming": True, "top_p": 0.9, "batch_thresholds": {"512": 8}, "seed": 7, "limit": 7}
    run_uploader(folder, tmp_path / "cache", 10, settings={"options": options | kinds})
    config = extract_logits.parse_args(["--output", folder.name, "--resume", "--limit", "9"])
    assert (config.trust_remote_code, config.cache_dir) == (False, ".logit_extraction_cache")
    taken = {**kinds, "batch_thresholds": {512: 8}, "limit": 9}
    assert {name: getattr(config, name) for name in taken} == taken


def test_resume_reads_a_listing_the_settings_and_the_checkpoints_alone(repo, tmp_path):
    run_workers(repo, tmp_path / "cache", 3, parts=9)
    repo.hub.clear()
    uploader = open_uploader(repo, tmp_path / "late", rank=3, world_size=4)
    assert sorted(uploader.get_resume_info()["parts"]) == list(range(9))
    uploader.shutdown()
    assert not requests(repo.hub, "/data/|GET /_lfs")
    assert len(repo.hub.log) <= 14


def test_without_a_checkpoint_resume_reads_footers_without_a_token_and_no_rows(repo, tmp_path):
    uploader = open_uploader(repo, tmp_path / "cache")
    fill(uploader, 0)
    uploader.begin_part(1, [300])
    uploader.add_sample(make_rows([300], tokens=60_000))
    finish(uploader)
    assert len(repo.read("data/part-00001.parquet")) > 5e6
    repo.delete("checkpoint.json")
    repo.hub.clear()
    uploader = open_uploader(repo, tmp_path / "other")
    assert uploader.begin_part(0, range(10)) == uploader.begin_part(1, [300]) == []
    uploader.shutdown()
    assert sum(line["sent"] for line in repo.hub.log) < 500_000
    fetched = requests(repo.hub, "GET /_lfs")  # from the storage, which gets no token
    assert fetched
    assert not [line for line in fetched if line["auth"]]


# Faults -------------------------------------------------------------------------------------------


FAULTS: list[dict[str, Any]] = [
    *({"status": status} for status in (408, 409, 412, 425, 500)),
    {"status": 429, "headers": {"Retry-After": "0"}}, {"status": 503, "after": True},
    {"drop": "body", "drop_after": 10}, {"drop": "before"}, {"drop": "after"},
]  # fmt: skip
UPLOAD_REQUESTS = ("preupload/", "objects/batch", "PUT /_lfs", "objects/verify", "commit/")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: "-".join(map(str, fault.values())))
def test_a_fault_that_can_pass_costs_no_row_and_doubles_none(repo, tmp_path, fault):
    for number, request_line in enumerate(UPLOAD_REQUESTS):
        repo.hub.fault(request_line, skip=number % 2, **fault)
    assert run_uploader(repo, tmp_path / "cache", 35)["undelivered"] == []
    assert repo.rows() == stored(range(35))
    assert all(met.count == 0 for met in repo.hub.faults)
    repo.hub.clear()
    for request_line in ("GET .*/tree/", f"GET /api/datasets/{REPO}$", "resolve/"):
        repo.hub.fault(request_line, **fault)
    assert len(open_uploader(repo, tmp_path / "other").get_resume_info()["parts"]) == 4


@pytest.mark.parametrize(
    ("header", "value", "least"),
    [("Retry-After", "300", 300), ("Retry-After", "99999999", 60), ("Retry-After", "-5", 60),
     ("RateLimit", '"api";r=0;t=99999999', 60)],
)  # fmt: skip
def test_a_run_waits_as_told_but_no_hours(header, value, least, monkeypatch):
    def request() -> None:
        response = SimpleNamespace(status_code=429, headers={header.lower(): value, header: value})
        raise extract_logits.explain_refusal(response, "too many requests", REPO)

    pauses: list[float] = []
    monkeypatch.setattr(extract_logits, "bounded", lambda request, *_: request())
    monkeypatch.setattr(extract_logits, "wait_until", lambda _, limit_s: pauses.append(limit_s))
    with pytest.raises(HubError, match="--resume"):
        extract_logits.retry(request)
    assert least <= min(pauses)
    assert max(pauses) <= 900


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "hf auth login"), (403, "write"), (404, "--output")]
)
def test_what_no_retry_heals_is_refused_at_once_and_the_rows_stay(repo, tmp_path, status, remedy):
    uploader = open_uploader(repo, tmp_path / "cache")
    repo.hub.fault("preupload|commit/", status=status, count=99)
    with pytest.raises(HubError, match=remedy):  # noqa: PT012
        fill_parts(uploader, 15)
        uploader.flush(final=True)
    uploader.shutdown()
    assert len(requests(repo.hub, "preupload|commit/")) <= 2  # of parts already under way
    repo.hub.clear()
    assert set(run_uploader(repo, tmp_path / "cache", 15)["asked"]) <= set(range(10, 15))
    assert repo.rows() == stored(range(15))
    repo.hub.fault("auth-check/write", status=status)  # a token that may not write
    with pytest.raises(HubError, match=remedy):
        open_uploader(repo, tmp_path / "cache")


def test_what_stays_undelivered_becomes_a_backup_that_the_end_and_the_next_run_try(repo, tmp_path):
    uploader = open_uploader(repo, tmp_path / "cache")
    uploader.settle({"weights": "float32"})
    repo.hub.fault(COMMIT, status=503, count=10_000)
    fill_parts(uploader, 25)
    summary = finish(uploader)
    assert summary["rows"] == 0
    assert sorted(Path(path).name for path in summary["undelivered"]) == [
        f"backup_part-{number:05d}.parquet" for number in range(3)
    ]
    repo.hub.clear()
    repo.hub.fault(COMMIT, status=503, count=7)  # every try of the first delivery
    summary = run_uploader(repo, tmp_path / "cache", 40)  # without a teacher
    assert (summary["asked"], summary["undelivered"]) == (list(range(20, 40)), [])
    assert repo.rows() == stored(range(40))
    assert not list(tmp_path.glob("cache/**/*.parquet"))
    with pytest.raises(ConfigError, match="weights"):  # what ran is recorded
        open_uploader(repo, tmp_path / "there").settle({"weights": "int8"})


def test_a_backup_of_a_lower_limit_never_takes_the_place_of_a_longer_part(repo, tmp_path):
    repo.hub.fault(COMMIT, status=503, count=10_000)
    assert len(run_uploader(repo, tmp_path / "cache", 25)["undelivered"]) == 3
    repo.hub.clear()
    run_uploader(repo, tmp_path / "elsewhere", 28)
    run_uploader(repo, tmp_path / "cache", 28)
    assert repo.rows() == stored(range(28))


def test_a_listing_that_is_stale_after_a_commit_loses_and_doubles_nothing(repo, tmp_path):
    listing = rf"GET /api/datasets/{REPO}(/tree|/revision|\?|$)"
    uploader = open_uploader(repo, tmp_path / "cache")
    repo.hub.fault(listing, stale=True, count=3)
    fill_parts(uploader, 20)
    assert finish(uploader)["undelivered"] == []
    before = repo.hashes()
    repo.hub.clear()
    repo.hub.fault(listing, stale=True, count=2)
    assert run_uploader(repo, tmp_path / "other", 20)["undelivered"] == []
    assert repo.hashes() == before
    assert repo.rows() == stored(range(20))


@pytest.fixture
def job(extract: Extract, write_chats: Write, repo: Output) -> Extract:
    """Run `main` over 12 conversations into three parts of the repository."""
    write_chats(rows_of(12))
    return functools.partial(extract, output=REPO, upload_every=4, resume=True)


def test_what_the_hub_did_not_take_is_exit_code_4_and_the_next_run_delivers(job, repo, monkeypatch):
    with monkeypatch.context() as away:
        away.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        done = job()
    assert (done.code, done.summary["output"], done.summary["exit_code"]) == (4, REPO, 4)
    assert done.summary["error"] in done.stderr.strip().splitlines()[-1]
    repo.hub.fault("commit/", status=503, count=10**6)
    done = job()
    assert (done.code, done.summary["exit_code"]) == (4, 4)
    kept = [Path(path) for path in done.summary["undelivered"]]
    assert kept
    assert all(path.name.startswith("backup_") and path.exists() for path in kept)
    repo.hub.clear()
    assert job().passed()["rows"] == 12
    assert repo.ids() == list(range(12))


# Secrets and cards --------------------------------------------------------------------------------


def test_tokens_are_hidden_in_errors_logs_files_and_cards(job, repo, tmp_path, monkeypatch):
    secrets = (repo.hub.token, "hf_abcDEF123456abcDEF")
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    repo.hub.fault("commit/", status=500, message=f"bad {' '.join(secrets)}", count=2)
    first = job()
    repo.hub.fault("preupload", status=403, message=f"Authorization: Bearer {' '.join(secrets)}")
    second = job(output="tester/other", limit=5)
    assert (first.code, second.code) == (0, 4), first.stderr
    assert "***" in second.stderr
    texts = [first.stdout, first.stderr, second.stdout, second.stderr]
    texts += [repo.read(path).decode(errors="replace") for path in repo.files()]
    texts += [p.read_bytes().decode(errors="replace") for p in tmp_path.rglob("*") if p.is_file()]
    assert not [text for text in texts if any(secret in text for secret in secrets)]


@pytest.mark.parametrize("before", ["<!-- mine -->\n", "---\ntags: [\n---\nHello.\n"])
def test_a_person_may_edit_the_card_while_the_run_goes_on(place, tmp_path, before):
    """And a card that was there before the run is kept, whole where its header is none."""
    if place.hub:
        place.hub.store.create("dataset", REPO, private=False)
    place.write("README.md", before.encode())
    uploader = open_uploader(place, tmp_path / "cache")
    fill_parts(uploader, 20)
    uploader.flush()
    uploader.delivery.result()
    uploader.shutdown()  # before the card tells it
    run_uploader(place, tmp_path / "cache", 20)
    uploader = open_uploader(place, tmp_path / "there")  # knows these rows by the checkpoint alone
    card = place.read("README.md").decode()
    assert card.endswith(before)
    assert ("| conversations | 20 |" in card) == ("mine" in before)
    edited = f"{card}\n## Mine\n".replace("tags:", "license: mit\ntags:", 1)
    place.write("README.md", edited.encode())
    fill_parts(uploader, 24)
    finish(uploader)
    card = place.read("README.md").decode()
    if "Hello" in before:  # a header that cannot be read
        assert card == edited
        return
    assert card.endswith(f"{before}\n## Mine\n")
    assert "license: mit" in card
    assert card.count("## Columns") == 1
    rows = [make_row(index) for index in range(24)]
    tokens = sum(row["num_tokens"] for row in rows)
    counts = [int(count) for row in rows for count in row["top_counts"]]
    for line in (
        "conversations | 24", f"tokens | {tokens:,}",
        f"mean nucleus | {sum(counts) / tokens:.1f} tokens",
        f"nuclei of the largest size allowed | {counts.count(SETTINGS['top_p_max']) / tokens:.2%}",
        "probability covered by the nucleus | 0.9900 on average",
        "probability of the actual token | 0.5000 on average",
    ):  # fmt: skip
        assert f"| {line} |" in card


def test_names_from_strangers_stay_names_on_the_card(folder, tmp_path):
    evil, cards = f"x\n# Title\n{extract_logits.CARD_LINE}\n<img src=//evil>\n```\n---", []
    for rows in (10, 20, 30):
        run_uploader(folder, tmp_path / "cache", rows, settings={"dataset": evil, "model": evil})
        cards.append(folder.read("README.md").decode())
        assert f"| conversations | {rows} |" in cards[-1]
        assert "<img" not in cards[-1].split("\n---\n", 1)[1]
        assert "\n# Title" not in cards[-1]
    assert len(cards[2]) - len(cards[0]) < 60  # figures, not the card again


def test_the_snippet_of_the_card_runs_and_load_dataset_needs_the_name_alone(repo, tmp_path):
    uploader = open_uploader(repo, tmp_path / "cache")
    uploader.begin_part(0, [100])  # a part without rows comes first
    uploader.skip(100, "empty")
    for number in (1, 2):
        fill(uploader, number, range(10 * number - 10, 10 * number))
    finish(uploader)
    snippet = re.search(r"```python\n(.*?)```", repo.read("README.md").decode(), re.DOTALL)
    assert snippet
    code = (
        f"{snippet[1]}\nprint(row['index'], probs.sum() > 0)\n"
        f"dataset = load_dataset({REPO!r})\n"
        "print(list(dataset), sorted(dataset['train']['index']), dataset['train'].column_names)"
    )
    env = {"HF_ENDPOINT": repo.hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""}
    done = run_code(code, env={**env, "HF_HUB_OFFLINE": "0"}, cwd=tmp_path)
    loaded = f"['train'] {list(range(20))} {SCHEMA.names}"
    assert done.stdout.splitlines()[-2:] == ["0 True", loaded]

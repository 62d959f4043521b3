"""compute_lengths: the counts are extraction's, whatever the processes; output, Hub, exit codes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import CHATS, TEACHER, Finished, chat, rows_of, run_script
from huggingface_hub import HfApi
from loopback_hub import LoopbackHub

import compute_lengths
import explore_logits as explore
from compute_lengths import (
    LengthsConfig,
    LengthsError,
    MeasuredSource,
    collect,
    find_percentiles,
    format_histogram,
    get_transform_fn,
    main,
    measure_source,
    push_lengths,
    write_lengths,
)
from explore_logits import ConversationColumns, ConversationEncoder, open_conversations, open_source

Measure, WriteChats = Callable[..., Finished], Callable[[list[Any]], Path]
COLUMNS = ConversationColumns(messages="messages", index="id")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` caches inside the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def expected() -> dict[int, tuple[int, int]]:
    """Lengths and tokens of the embedded conversations by id, counted one by one."""
    encoder, found = make_encoder(), {}
    for line in CHATS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        encoded = encoder.encode(row)
        found[row["id"]] = (encoded.input_ids.size, encoded.token_positions.size)
    return found


def make_config(**options: Any) -> LengthsConfig:
    """Return a configuration for the embedded teacher and conversations."""
    return LengthsConfig(**{"model": str(TEACHER), "dataset": str(CHATS), **options})


def make_encoder(columns: ConversationColumns = COLUMNS) -> ConversationEncoder:
    """Return an encoder for the embedded teacher."""
    tokenizer = explore.load_tokenizer(str(TEACHER))
    return ConversationEncoder(tokenizer, explore.load_chat_template(None, tokenizer), columns)


def as_dict(path: Path) -> dict[int, tuple[int, int]]:
    """Return the content of a lengths file by index."""
    table = pq.read_table(path).to_pydict()
    pairs = zip(table["length"], table["num_tokens"], strict=True)
    return dict(zip(table["index"], pairs, strict=True))


@pytest.fixture
def measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Measure:
    """Run `main` in this process: the embedded teacher and conversations, into ./lengths."""

    def run(*options: object, dataset: object = CHATS) -> Finished:
        words = ["--model", TEACHER, "--dataset", dataset, "--output-dir", tmp_path / "lengths"]
        capsys.readouterr()
        code = main([str(word) for word in (*words, "--num-proc", 1, *options)])
        return Finished(code, *capsys.readouterr())

    return run


# As a user runs it --------------------------------------------------------------------------------


def test_the_counts_are_what_extraction_would_take_and_are_reported(
    tmp_path: Path, expected: dict[int, tuple[int, int]], measure: Measure
) -> None:
    done = measure("--index-col", "id")
    assert done.code == 0
    assert as_dict(tmp_path / "lengths/lengths.parquet") == expected
    totals = np.sum(list(expected.values()), axis=0).tolist()
    summary = done.summary
    assert [summary["total_length"], summary["total_num_tokens"]] == totals
    assert (summary["rows"], summary["usable"], summary["skipped"]) == (400, 400, {})
    assert "share up to here" in done.stdout


@pytest.mark.parametrize("streaming", [False, True])
def test_many_processes_give_the_same_counts_in_the_same_order(
    streaming: bool, expected: dict[int, tuple[int, int]]
) -> None:
    source = open_source(str(CHATS), streaming=streaming)
    batches = list(measure_source(source, make_encoder(), batch_size=70, workers=2))
    assert [len(batch["index"]) for batch in batches] == [70] * 5 + [50]
    measured = collect(batches)
    pairs = zip(measured.length.tolist(), measured.num_tokens.tolist(), strict=True)
    assert dict(zip(measured.index.tolist(), pairs, strict=True)) == expected
    assert measured.index.tolist() == list(expected)


def test_rows_of_a_stream_without_ids_have_their_numbers(write_chats: WriteChats) -> None:
    source = open_source(str(write_chats(rows_of(7))), streaming=True)
    encoder = make_encoder(ConversationColumns(messages="messages"))
    batches = measure_source(source, encoder, batch_size=2, workers=1)
    assert [index for batch in batches for index in batch["index"]] == list(range(7))


def test_the_file_says_what_it_was_measured_with(tmp_path: Path, measure: Measure) -> None:
    assert measure("--filename", "l.parquet", "--include-end").code == 0
    path = tmp_path / "lengths/l.parquet"
    lengths = explore.read_lengths(str(path))
    template = (TEACHER / "chat_template.jinja").read_text(encoding="utf-8")
    assert lengths.index.tolist() == list(range(400))
    assert lengths.settings is not None
    assert {name: value for name, value in lengths.settings.items() if value} == {
        "model": str(TEACHER), "dataset": str(CHATS), "split": "train", "include_end": True,
        "messages_col": "messages", "turns": "all",
        "chat_template_sha256": explore.hash_template(template),
        "dataset_revision": explore.source_revision(str(CHATS)),
        "model_revision": explore.source_revision(str(TEACHER)),
    }  # fmt: skip
    assert pq.read_schema(path).remove_metadata() == explore.LENGTHS_SCHEMA.remove_metadata()
    assert [file.name for file in path.parent.iterdir()] == ["l.parquet"]


def test_rows_that_cannot_be_used_stay_with_zero_and_are_counted(
    write_chats: WriteChats, tmp_path: Path, measure: Measure, caplog: pytest.LogCaptureFixture
) -> None:
    said = chat("Hello.")
    chats = (said, None, [], said[:1], said, [{"role": "assistant"}])
    done = measure(dataset=write_chats([{"messages": messages} for messages in chats]))
    assert done.code == 0
    assert done.summary["skipped"] == {"null": 2, "empty": 1, "no_assistant": 1}
    assert (done.summary["rows"], done.summary["usable"]) == (6, 2)
    found = as_dict(tmp_path / "lengths/lengths.parquet")
    assert [index for index, counts in found.items() if counts == (0, 0)] == [1, 2, 3, 5]
    assert found[0] == found[4]
    assert "index 1 cannot be used (null)" in caplog.text


def test_bad_input_ends_with_code_2_and_one_line(
    measure: Measure, caplog: pytest.LogCaptureFixture
) -> None:
    for options, message in (
        ("--split dev", "it has train"),
        ("--messages-col talk", "the dataset has id"),
        ("--model ./nowhere", "nowhere"),
        ("--revision main", "has no revisions"),
        ("--output-repo a/b", "--push-to-hub"),
        ("--text-col subject --turns last", "--turns: --text-col uses no chat template"),
        ('--template-kwargs {"tools":1}', "'tools' is no argument"),
        ("--filename a/b.parquet", "--filename"),
        (f"--output-dir {CHATS}", "cannot write"),
    ):
        assert measure(*options.split()).code == 2
        last = caplog.records[-1].getMessage()
        assert message in last
        assert "\n" not in last


def test_output_is_a_folder_or_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    for place, repo in (("./new", None), ("there", None), ("tester/lengths", "tester/lengths")):
        config = make_config(output=place)
        assert (config.output_repo, config.push_to_hub) == (repo, repo is not None)
        assert config.output_dir == ("data/lengths" if repo else place)


def test_rows_that_give_no_lengths_leave_no_file(
    write_chats: WriteChats, tmp_path: Path, measure: Measure, caplog: pytest.LogCaptureFixture
) -> None:
    for ids, messages, message in (
        ((4, 5, 4), chat("Hello."), "index 4 occurs twice"),
        ((0, 1, 2), None, "no conversation can be used: 3 null"),
    ):
        rows = [{"id": n, "messages": messages} for n in ids]
        assert measure("--index-col", "id", dataset=write_chats(rows)).code == 2
        assert message in caplog.text
        assert not list(tmp_path.glob("lengths/*"))


# Parts --------------------------------------------------------------------------------------------


def test_the_transform_maps_a_dataset(expected: dict[int, tuple[int, int]]) -> None:
    source = open_source(str(CHATS)).select(range(40))
    how: Any = {"batched": True, "with_indices": True, "remove_columns": source.column_names}
    mapped = source.map(get_transform_fn(make_encoder()), batch_size=16, **how)
    found = {row["index"]: (row["length"], row["num_tokens"]) for row in mapped}
    assert found == {index: expected[index] for index in source["id"]}


def test_measuring_keeps_every_row_and_says_why_some_cannot_be_used() -> None:
    said = chat("So.", "Why?")
    rows = [{"id": 70 + n, "messages": m} for n, m in enumerate((said, None, said[:1]))]
    encoded = make_encoder().encode(rows[0])
    batch = {name: [row[name] for row in rows] for name in rows[0]}
    measured = get_transform_fn(make_encoder())(batch, [500, 501, 502])
    assert measured["index"] == [70, 71, 72]
    assert measured["length"] == [encoded.input_ids.size, 0, 0]
    assert measured["num_tokens"] == [encoded.token_positions.size, 0, 0]
    assert measured["reason"] == [None, "null", "no_assistant"]


def test_rows_of_other_columns_are_measured_too(write_chats: WriteChats) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    path = write_chats([{"messages": chat("So.")}, {"messages": chat("So."), "tools": tools}])
    for streaming in (False, True):
        source, encoder = open_conversations(make_config(dataset=str(path), streaming=streaming))
        (batch,) = measure_source(source, encoder, batch_size=9, workers=1)
        assert batch["reason"] == [None, None]
        assert batch["length"][0] < batch["length"][1]


def test_a_system_column_that_nobody_asked_for_is_not_left_out_in_silence(
    write_chats: WriteChats, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"system": "Be brief.", "question": "Why?", "answer": "So.", "history": []}
    path = str(write_chats([row]))
    open_conversations(make_config(dataset=path, system_col="system"))
    assert not caplog.records
    with caplog.at_level("INFO"):
        open_conversations(make_config(dataset=path))
    assert "--system-col system uses it" in caplog.text
    assert "read without the columns system, history" in caplog.text


def test_what_a_template_lacks_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    explore.warn_once.cache_clear()
    (path := tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    open_conversations(make_config(chat_template=str(path), template_kwargs={"enable": True}))
    for hidden in ("an end of the assistant's turn", "the argument 'enable'"):
        assert f"the chat template does not show {hidden}" in caplog.text


class Fatal:
    """Kills the process that it is unpickled in."""

    def __reduce__(self) -> Any:
        return os._exit, (9,)


def test_a_worker_that_dies_is_an_error_with_a_remedy() -> None:
    source, encoder = open_source(str(CHATS)), ConversationEncoder(Fatal(), "", COLUMNS)
    with pytest.raises(LengthsError, match="--num-proc"):
        list(measure_source(source, encoder, batch_size=100, workers=2))


def test_the_output_is_a_folder_or_a_repository_as_for_the_extractor(tmp_path: Path) -> None:
    for output, *told in (
        (str(tmp_path), str(tmp_path), None, False), ("./new", "./new", None, False),
        ("user/lengths", "data/lengths", "user/lengths", True),
    ):  # fmt: skip
        config = compute_lengths.LengthsConfig(model="m", dataset="d", output=output)
        assert [config.output_dir, config.output_repo, config.push_to_hub] == told
    with pytest.raises(compute_lengths.ConfigError, match="--output excludes --output-dir"):
        compute_lengths.LengthsConfig(model="m", dataset="d", output="./new", output_dir="y")


def test_percentiles_are_values_that_occur() -> None:
    found = find_percentiles(np.array([5, 1, 9, 9, 3], np.int32))
    assert [found[name] for name in ("p1", "p25", "p50", "p100")] == [1, 3, 5, 9]


def test_the_histogram_counts_every_value_once() -> None:
    values = np.array([1, 2, 3, 4, 7, 8, 1000, 1023, 1024], np.int32)
    lines = format_histogram(values).replace(",", "").splitlines()
    bins = [[int(part) for part in re.findall(r"\d+", line)[:3]] for line in lines]
    for low, high, count in bins:
        assert count == np.sum((values >= low) & (values <= high))
    assert sum(count for *_, count in bins) == values.size
    assert lines[-1].endswith("100.00%")


# The Hub ------------------------------------------------------------------------------------------


@pytest.fixture
def push(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Write a small lengths file and push it; the tries do not wait."""

    def run() -> Path:
        measured = MeasuredSource(*np.array([[0, 1], [10, 20], [3, 4]], np.int32), {})
        config = make_config(output_repo="tester/lengths", push_to_hub=True, private=True)
        settings = compute_lengths.describe_measure(config, make_encoder())
        path = tmp_path / "lengths.parquet"
        write_lengths(measured, settings, path)
        push_lengths(config, measured, settings, path)
        return path

    monkeypatch.setattr(compute_lengths.time, "sleep", lambda _: None)
    return run


def test_a_push_lands_in_one_commit_with_a_card(hub: LoopbackHub, push: Callable[[], Path]) -> None:
    path = push()
    assert hub.content("tester/lengths", "data/lengths.parquet") == path.read_bytes()
    assert "path: data/lengths.parquet" in hub.content("tester/lengths", "README.md").decode()
    assert sum("/commit/" in line["path"] for line in hub.log) == 1


def test_a_push_is_tried_again_when_the_hub_is_in_trouble(
    hub: LoopbackHub, push: Callable[[], Path]
) -> None:
    hub.fault("POST .*/commit/", status=503, count=2)
    push()
    assert "data/lengths.parquet" in hub.files("tester/lengths")


@pytest.mark.parametrize("status", [403, 503])
def test_a_push_that_the_hub_does_not_take_keeps_the_file_and_says_where(
    status: int, hub: LoopbackHub, push: Callable[[], Path], tmp_path: Path
) -> None:
    hub.fault("POST .*/commit/", status=status, count=99)
    with pytest.raises(LengthsError, match=r"kept as .*lengths\.parquet"):
        push()
    assert (tmp_path / "lengths.parquet").exists()


def test_a_hub_dataset_is_measured_and_pushed_from_the_command_line(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    api = HfApi()
    api.create_repo("tester/chats", repo_type="dataset")
    some = b"".join(CHATS.read_bytes().splitlines(keepends=True)[:40])
    where = {"path_in_repo": "train.jsonl", "repo_id": "tester/chats", "repo_type": "dataset"}
    api.upload_file(path_or_fileobj=some, **where)
    done = run_script(
        "compute_lengths.py", "--model", TEACHER, "--dataset", "tester/chats", "--num-proc", 1,
        "--output-dir", tmp_path, "--output-repo", "tester/lengths", "--push-to-hub",
        HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"),
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert (done.summary["repo"], done.summary["rows"]) == ("tester/lengths", 40)
    lengths = explore.read_lengths(str(tmp_path / "lengths.parquet"))
    assert lengths.settings["dataset_revision"] == api.dataset_info("tester/chats").sha
    there = hub.content("tester/lengths", "data/lengths.parquet")
    assert there == (tmp_path / "lengths.parquet").read_bytes()

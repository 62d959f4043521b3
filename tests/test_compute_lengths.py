"""compute_lengths: the counts are extraction's, whatever the processes; output, Hub, exit codes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import CHATS, TEACHER, Finished, chat

import compute_lengths
import explore_logits as explore
from compute_lengths import get_transform_fn, measure_source
from explore_logits import ConversationColumns, ConversationEncoder, open_source

COLUMNS = ConversationColumns(messages="messages", index="id")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` caches inside the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def expected(chats) -> dict[int, tuple[int, int]]:
    """Lengths and tokens of the embedded conversations by id, counted one by one."""
    encoder = make_encoder()
    found = {row["id"]: encoder.encode(row) for row in chats}
    return {n: (made.input_ids.size, made.token_positions.size) for n, made in found.items()}


def make_encoder() -> ConversationEncoder:
    tokenizer = explore.load_tokenizer(str(TEACHER))
    return ConversationEncoder(tokenizer, explore.load_chat_template(None, tokenizer), COLUMNS)


def by_index(measured: Any) -> dict[int, tuple[int, int]]:
    """Return lengths and tokens by index, in the order of the rows."""
    pairs = zip(measured.length.tolist(), measured.num_tokens.tolist(), strict=True)
    return dict(zip(measured.index.tolist(), pairs, strict=True))


@pytest.fixture
def measure(tmp_path, capsys) -> Callable[..., Finished]:
    """Run `main` in this process: the embedded teacher and conversations, into ./lengths."""

    def run(*options: object, dataset: object = CHATS) -> Finished:
        words = ["--model", TEACHER, "--dataset", dataset, "--output-dir", tmp_path / "lengths"]
        capsys.readouterr()
        code = compute_lengths.main([str(word) for word in (*words, "--num-proc", 1, *options)])
        return Finished(code, *capsys.readouterr())

    return run


# As a user runs it --------------------------------------------------------------------------------


def test_the_counts_are_what_extraction_would_take_and_are_reported(tmp_path, expected, measure):
    done = measure("--index-col", "id")
    assert done.code == 0
    assert by_index(explore.read_lengths(str(tmp_path / "lengths/lengths.parquet"))) == expected
    totals = np.sum(list(expected.values()), axis=0).tolist()
    summary = done.summary
    assert [summary["total_length"], summary["total_num_tokens"]] == totals
    assert (summary["rows"], summary["usable"], summary["skipped"]) == (400, 400, {})
    assert "share up to here" in done.stdout


@pytest.mark.parametrize("streaming", [False, True])
def test_many_processes_give_the_same_counts_in_the_same_order(streaming, expected):
    source = open_source(str(CHATS), streaming=streaming)
    batches = list(measure_source(source, make_encoder(), batch_size=70, workers=2))
    assert [len(batch["index"]) for batch in batches] == [70] * 5 + [50]
    assert list(by_index(compute_lengths.collect(batches)).items()) == list(expected.items())


@pytest.mark.parametrize("how", [(), ("--streaming", "--batch-size", "90")], ids=str)
def test_the_file_says_what_it_was_measured_with(how, tmp_path, measure):
    assert measure("--filename", "l.parquet", "--include-end", *how).code == 0
    path = tmp_path / "lengths/l.parquet"
    lengths = explore.read_lengths(str(path))
    template = (TEACHER / "chat_template.jinja").read_text(encoding="utf-8")
    assert lengths.index.tolist() == list(range(400))  # rows without ids have their numbers
    assert {name: value for name, value in lengths.settings.items() if value} == {
        "model": str(TEACHER), "dataset": str(CHATS), "split": "train", "include_end": True,
        "messages_col": "messages", "turns": "all",
        "chat_template_sha256": explore.hash_template(template),
        "dataset_revision": explore.source_revision(str(CHATS)),
        "model_revision": explore.source_revision(str(TEACHER)),
    }  # fmt: skip
    assert pq.read_schema(path).remove_metadata() == explore.LENGTHS_SCHEMA.remove_metadata()
    assert [file.name for file in path.parent.iterdir()] == ["l.parquet"]


def test_rows_that_cannot_be_used_stay_with_zero_and_are_counted(write_chats, measure):
    said = chat("Hello.")
    chats = (said, None, [], said[:1], said, [{"role": "assistant"}])
    done = measure(dataset=write_chats([{"messages": messages} for messages in chats]))
    assert done.code == 0
    assert done.summary["skipped"] == {"null": 2, "empty": 1, "no_assistant": 1}
    assert (done.summary["rows"], done.summary["usable"]) == (6, 2)
    found = by_index(explore.read_lengths(done.summary["output"]))
    assert [index for index, counts in found.items() if counts == (0, 0)] == [1, 2, 3, 5]
    assert found[0] == found[4]


@pytest.mark.parametrize(
    ("ids", "messages", "said"),
    [([4, 5, 4], chat("Hello."), "index 4 occurs twice"),
     ([0, 1, 2], None, "no conversation can be used: 3 null")],
)  # fmt: skip
def test_bad_input_ends_with_code_2_and_no_file(
    ids, messages, said, measure, write_chats, tmp_path, caplog
):
    rows = [{"id": index, "messages": messages} for index in ids]
    assert measure("--index-col", "id", dataset=write_chats(rows)).code == 2
    assert said in caplog.records[-1].getMessage()
    assert not list(tmp_path.glob("lengths/*"))


# Parts --------------------------------------------------------------------------------------------


def test_the_transform_maps_a_dataset_and_says_why_rows_cannot_be_used(chats, expected):
    said = chats[0]["messages"]
    rows = [{"id": 71, "messages": None}, {"id": 72, "messages": said[:1]}, *chats[:40]]
    source = datasets.Dataset.from_list(rows)
    how: Any = {"batched": True, "with_indices": True, "remove_columns": source.column_names}
    mapped = source.map(get_transform_fn(make_encoder()), batch_size=16, **how)
    wanted = {row["id"]: expected.get(row["id"], (0, 0)) for row in rows}
    found = [(row["index"], (row["length"], row["num_tokens"])) for row in mapped]
    assert found == list(wanted.items())
    assert list(mapped["reason"]) == ["null", "no_assistant"] + [None] * 40


def test_percentiles_are_values_that_occur():
    found = compute_lengths.find_percentiles(np.array([5, 1, 9, 9, 3], np.int32))
    assert [found[name] for name in ("p1", "p25", "p50", "p100")] == [1, 3, 5, 9]


def test_the_histogram_counts_every_value_once():
    values = np.array([1, 2, 3, 4, 7, 8, 1000, 1023, 1024], np.int32)
    lines = compute_lengths.format_histogram(values).replace(",", "").splitlines()
    bins = [[int(part) for part in re.findall(r"\d+", line)[:3]] for line in lines]
    for low, high, count in bins:
        assert count == np.sum((values >= low) & (values <= high))
    assert sum(count for *_, count in bins) == values.size
    assert lines[-1].endswith("100.00%")


# The Hub ------------------------------------------------------------------------------------------


@pytest.fixture
def push(hub, measure, write_chats, monkeypatch) -> Callable[[], Finished]:
    """Measure one conversation and push its lengths; the tries do not wait."""
    monkeypatch.setattr(compute_lengths.time, "sleep", lambda _: None)
    words = "--push-to-hub", "--private", "--output-repo", "tester/lengths"
    return lambda: measure(*words, dataset=write_chats([{"messages": chat("Hello.")}]))


@pytest.mark.parametrize("failures", [0, 2])
def test_a_push_lands_in_one_commit_with_a_card_and_is_tried_again(failures, hub, push):
    hub.fault("POST .*/commit/", status=503, count=failures)
    path = Path(push().summary["output"])
    assert hub.content("tester/lengths", "data/lengths.parquet") == path.read_bytes()
    assert "path: data/lengths.parquet" in hub.content("tester/lengths", "README.md").decode()
    assert sum("/commit/" in line["path"] for line in hub.log) == 1 + failures


@pytest.mark.parametrize("status", [403, 503])
def test_a_push_that_the_hub_refuses_keeps_the_file_and_says_where(status, hub, push, caplog):
    hub.fault("POST .*/commit/", status=status, count=99)
    assert push().code == 2
    assert Path(re.search(r"kept as (.*lengths\.parquet)", caplog.text)[1]).exists()


def test_lengths_are_those_of_the_data_that_is_recorded(measure, write_chats, monkeypatch, caplog):
    path, collect = write_chats([{"messages": chat("word " * 80)}]), compute_lengths.collect

    def collect_late(*args: Any, **options: Any) -> Any:
        write_chats([{"messages": chat("short")}])
        return collect(*args, **options)

    monkeypatch.setattr(compute_lengths, "collect", collect_late)
    assert measure(dataset=path).code == 2
    assert "the dataset has changed while it was measured" in caplog.text
    assert measure(dataset=path).code == 0

"""Opening chat datasets: every kind of file, columns, ids, and errors that name the remedy."""

import contextlib
import gzip
import io
import itertools
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_shapes import TOOLS
from conftest import ROOT
from processes import run_code

import explore_logits as explore
from explore_logits import ConversationColumns, SourceError, Stream, open_source, read_conversation

MESSAGES = ConversationColumns(messages="messages")
QUESTION, ANSWER = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]
PLAIN_ROWS = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(5)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` caches inside the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Write a file of the kind that its name ends in."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=500)
        return path
    if path.suffix == ".saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
        return path
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".csv":
        text = "".join(",".join(cells) + "\r\n" for cells in (rows[0], *map(dict.values, rows)))
    elif path.suffix == ".json":
        text = json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


STREAMED = pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])


@STREAMED
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet", "saved"])
def test_every_kind_of_file_gives_its_rows(kind, streaming, tmp_path):
    path = write_rows(tmp_path / f"rows.{kind}", PLAIN_ROWS)
    if path.suffix in (".jsonl", ".json", ".csv"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # no part of the data
    source = open_source(str(path), streaming=streaming)
    assert isinstance(source, Stream if streaming else datasets.Dataset)
    assert explore.source_columns(source) == ["question", "answer"]
    assert list(source) == PLAIN_ROWS
    for options, message in (
        ({"split": "dev"}, r"no split 'dev'; it has train \(--split\)"),
        ({"subset": "x"}, "it has no --subset x"),
        ({"split": "train+test"}, "a stream is not sliced|has no split .*; it has train"),
    ):
        with pytest.raises(SourceError, match=message):
            open_source(str(path), streaming=streaming, **options)
    if not streaming:  # a table may be sliced
        sliced = [*PLAIN_ROWS[3:], PLAIN_ROWS[0]]
        assert list(open_source(str(path), split="train[3:]+train[:1]")) == sliced


@STREAMED
def test_cells_of_csv_files_are_as_they_are_written(streaming, tmp_path):
    (tmp_path / "a.csv").write_text('id,question,answer\n10,007,1.50\n-2,"a\n""b""",NA\n\n')
    (tmp_path / "b.csv").write_text(f"id,question,answer\n3,1e5,\n4,True,{'z' * 200_000}\n5,None\n")
    source = open_source(str(tmp_path), streaming=streaming, integers=("id", None))
    assert [tuple(row.values()) for row in source] == [
        (10, "007", "1.50"), (-2, 'a\n"b"', "NA"), (3, "1e5", None), (4, "True", "z" * 200_000),
        (5, "None", None),
    ]  # fmt: skip


@STREAMED
def test_a_folder_of_files_or_tables_is_one_dataset(streaming, tmp_path, monkeypatch):
    (files := tmp_path / "files").mkdir()
    write_rows(files / "train-00000.parquet", PLAIN_ROWS[:2])
    write_rows(files / "train-00001.parquet", PLAIN_ROWS[2:])
    none = pq.read_table(write_rows(files / "test-00000.parquet", PLAIN_ROWS[:1])).slice(1)
    pq.write_table(none, files / "train-00002.parquet")  # a shard that a filter left nothing of
    splits = {"train": PLAIN_ROWS, "test": PLAIN_ROWS[:1]}
    saved = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    monkeypatch.chdir(files)
    for folder, (split, rows) in itertools.product((".", "../saved"), splits.items()):
        assert list(open_source(folder, split=split, streaming=streaming)) == rows


@STREAMED
def test_columns_may_be_left_out_of_rows_and_change_their_kind(streaming, tmp_path):
    rows: list[Any] = [{"score": 1, "note": "x"} for _ in range(3)]
    rows += [{"score": 1.5, "note": None, "late": [{"a": None}]}, {"score": None, "note": 3}]
    write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "b.jsonl", rows[::-1])
    source = open_source(str(tmp_path), streaming=streaming)
    names = explore.source_columns(source)
    assert names == ["score", "note", "late"]
    wanted = [[row.get(name) for name in names] for row in rows + rows[::-1]]
    assert [[row.get(name) for name in names] for row in source] == wanted


def test_files_of_another_kind_are_not_left_out_in_silence(tmp_path, caplog):
    """But a .json file may be about the others."""
    (folder := tmp_path / "chats").mkdir()
    write_rows(folder / "a.csv", PLAIN_ROWS)
    for name in ("b.csv", "stats.json", "c.parquet"):
        assert not caplog.records
        write_rows(folder / name, PLAIN_ROWS)
        assert len(open_source(str(folder))) == 10
    assert "its .parquet files are not read" in caplog.text


def table(answer: str) -> bytes:
    """Return a Parquet file of 500 such answers."""
    data = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"question": "q", "answer": answer}] * 500), data)
    return data.getvalue()


TABLE = table("word " * 50)
LINE = json.dumps(PLAIN_ROWS[0]).encode() + b"\n"
RANDOM = b"".join(b'{"x": %d}\n' % (n * 7919 % 99991) for n in range(4000))
# files of a source, what is said of it: one for each reader and each fault that it can meet
DAMAGED = {
    "cut": ({"r.jsonl.gz": gzip.compress(RANDOM)[:9000]}, r"r\.jsonl\.gz', line \d+: .*damaged"),
    "no object": ({"r.jsonl": LINE + b"\n\n" + b"[1, 2]\n" + LINE}, "line 4: .*not an object"),
    "bad line in a folder": ({"r/a.jsonl": LINE, "r/b.jsonl": LINE + b"?"}, r"b\.jsonl', line 2:"),
    "an open quote": ({"r.csv": b'a,b\n1,2\n1,"2'}, "line 3: not CSV"),
    "a cell too many": ({"r.csv": b'a,b\n1,"2\n3"\n1,2,3\n'}, "line 4: not CSV .3 cells"),
    "columns twice": ({"r.csv": b"a,a\n1,2\n"}, "line 2: not CSV .2 cells under 1 different"),
    "Latin-1": ({"r.jsonl": LINE + b'{"question": "\xe9"}\n'}, r"line 2: .*Latin-1"),
    "other columns": ({"r/a.jsonl": LINE, "r/b.jsonl": b'{"question": "a", "reply": "b"}\n'},
                      r"b\.jsonl' and a\.jsonl have different columns \(answer, reply\)"),
    "damage in a folder": ({"r/a.parquet": TABLE, "r/b.parquet": bytes(80).join(
        (TABLE[:40], TABLE[120:]))}, r"r/b\.parquet' cannot be read"),
    "pictures": ({"r/a.jpg": b"x", "r/metadata.jsonl": LINE}, "most of its files are no"),
    "a header alone": ({"h.csv": b"a,b\n"}, "has no rows"),
    "a pattern": ({"r*/r.jsonl": LINE}, "rename it"),
}  # fmt: skip


@STREAMED
@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_named_with_file_and_place(name, streaming, tmp_path):
    files, message = DAMAGED[name]
    for file, data in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(data)
    with pytest.raises(SourceError, match=message) as caught:
        list(open_source(str(tmp_path / next(iter(files)).split("/")[0]), streaming=streaming))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_of_one_relative_name_size_and_time_are_told_apart(kind, tmp_path, monkeypatch):
    for name, again in (("a", "b"), ("b", "c")):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        for said in (name, again):
            path = write_rows(Path(f"r.{kind}"), [{"text": said}])
            os.utime(path, (1, 1))
            assert list(open_source(str(path))) == [{"text": said}]


NUMBERS = [0.13436424411240122, 5e-324, 1.7976931348623157e308, 1e18, 2**70, -0.0, math.inf]


@STREAMED
def test_json_is_what_was_written_to_the_last_digit_and_half_a_character(streaming, tmp_path):
    """And a text of many digits leaves the list that it is in a list."""
    said = [{"role": "user", "content": "12345678901234567890"}]
    rows = [{"prompt": said, "completion": n, "tools": [{"x": n}]} for n in NUMBERS]
    rows.append({"prompt": "half \ud800 a pair", "completion": "b", "tools": []})
    source = open_source(str(write_rows(tmp_path / "r.jsonl", rows)), streaming=streaming)
    assert list(map(repr, source)) == list(map(repr, rows))


@STREAMED
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_name_is_no_pattern_and_no_address(kind, streaming, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["r?", "r1", "r[1]", *(["file:r", "r::1"] if kind == "jsonl" else [])]
    for name in names:
        write_rows(tmp_path / f"plain.{kind}", [{"text": name}]).replace(f"{name}.{kind}")
    for name in names:
        assert list(open_source(f"{name}.{kind}", streaming=streaming)) == [{"text": name}]


# Nulls and shapes ---------------------------------------------------------------------------------


def with_call(arguments: dict[str, Any], **tool: str | None) -> dict[str, Any]:
    """Return a row that calls a tool, and its tools."""
    said = {"role": "assistant", "tool_calls": [{"function": {"arguments": arguments}}]}
    return {"messages": [*QUESTION, said], "tools": [{"type": "function", **tool}]}


WITH_CALLS = [with_call({"a": 1, "unit": None}, default=None), with_call({"b": "x"}, name="g")]


@STREAMED
@pytest.mark.parametrize("kind", ["texts", "lines", "Json", "structs"])
def test_nulls_of_the_data_stay_and_those_of_arrow_go(kind, streaming, tmp_path):
    """In a struct nobody can tell them apart: Arrow's are many, the data's few."""
    path = tmp_path / ("r.jsonl" if kind == "lines" else "r.parquet")
    if kind == "Json":
        kinds = datasets.Features(dict.fromkeys(WITH_CALLS[0], datasets.List(datasets.Json())))
        datasets.Dataset.from_list(WITH_CALLS, features=kinds).to_parquet(path)
    else:
        texts = [{name: json.dumps(value) for name, value in row.items()} for row in WITH_CALLS]
        write_rows(path, texts if kind == "texts" else WITH_CALLS)
    source = open_source(str(path), streaming=streaming)
    features = explore.ConversationEncoder(None, "", MESSAGES).for_source(source).features
    read = [read_conversation(row, MESSAGES, features) for row in source]
    wanted = [with_call({"a": 1}), WITH_CALLS[1]] if kind == "structs" else WITH_CALLS
    assert [{"messages": chat.messages, "tools": chat.tools} for chat in read] == wanted


@pytest.mark.parametrize(
    "row",
    [{"prompt": "q", "completion": "a"}, {"prompt": "q", "chosen": "a", "rejected": "b"},
     {"prompt": QUESTION, "completion": ANSWER}, {"prompt": "q", "completion": ANSWER},
     {"instruction": "q", "input": " ", "output": "a"},
     {"instruction": "q", "context": "1, 2", "response": "a"},  # Dolly's names; above, Alpaca's
     {"prompt": "q", "chosen": QUESTION + ANSWER, "rejected": QUESTION}],
    ids=str,
)  # fmt: skip
def test_a_question_and_its_answer_come_in_many_shapes(row):
    columns, about = explore.resolve_columns(row), f"q\n\n{row.get('context')}"
    asked = [{"role": "user", "content": about}] if "context" in row else QUESTION
    assert read_conversation(row, columns).messages == asked + ANSWER
    assert ConversationColumns.of(columns.settings()) == columns


def test_a_system_column_comes_before_messages_too():
    columns = ConversationColumns(messages="messages", system="system")
    both = [{"role": "system", "content": "be brief"}, *QUESTION]
    for system, messages, wanted in (
        ("be brief", QUESTION, both), ("be brief", both, both), (None, QUESTION, QUESTION)
    ):  # fmt: skip
        row = {"system": system, "messages": messages}
        assert read_conversation(row, columns).messages == wanted
    with pytest.raises(explore.ConversationError, match="--system-col"):
        read_conversation({"system": "talk", "messages": both}, columns)


# Columns and ids ----------------------------------------------------------------------------------


def test_columns_are_found():
    asked = {"user_col": "q", "assistant_col": "a", "system_col": "s", "index_col": "i"}
    for names, options, expected in (
        ("conversations messages", {}, {"messages": "messages"}),
        ("a chat", {"messages_col": "chat"}, {"messages": "chat"}),
        ("question answer", {}, {"user": "question", "assistant": "answer"}),
        ("q a s i messages", asked, {"user": "q", "assistant": "a", "system": "s", "index": "i"}),
    ):
        found = explore.resolve_columns(names.split(), **options)
        assert found == ConversationColumns(**expected)


def test_every_column_that_is_named_is_used_or_refused():
    pair = {"user_col": "q", "assistant_col": "a"}
    for options, said in (
        ({"text_col": "a", "messages_col": "messages"}, "--text-col.*--messages-col"),
        ({**pair, "messages_col": "messages"}, "--user-col"),
        ({"text_col": "a", "system_col": "q"}, "--system-col.*--text-col"),
        *(({**pair, f"{name}_col": "typo"}, f"--{name}-col.*'typo'|'typo'.*--{name}-col")
          for name in ("user", "messages", "system", "index", "text")),
        ({}, "--messages-col.*the dataset has q, a, talk"),
    ):  # fmt: skip
        with pytest.raises(SourceError, match=said):
            explore.resolve_columns(["q", "a", "messages" if options else "talk"], **options)


def test_the_id_is_the_row_number_or_the_integer_of_the_column():
    by_column = ConversationColumns(messages="m", index="id")
    assert explore.source_id({"id": 3}, 12, ConversationColumns(messages="m")) == 12
    assert explore.source_id({"id": np.int64(4)}, 12, by_column) == 4
    for value in ("3", 3.0, None, True, 2**31, -(2**31) - 1, 2**70):
        with pytest.raises(SourceError, match=r"row 12.*leave --index-col out"):
            explore.source_id({"id": value}, 12, by_column)


def test_the_revision_of_a_local_source_changes_with_its_content(tmp_path):
    path, data = tmp_path / "r.jsonl", bytearray(random.Random(3).randbytes(5_000_000))
    path.write_bytes(data)
    first = explore.source_revision(str(path))
    assert first == explore.source_revision(str(path))
    data[2_400_017] ^= 1  # one bit, far from both ends
    path.write_bytes(data)
    others = {explore.source_revision(str(place)) for place in (path, tmp_path)}
    assert len({first, None} | others) == 4
    (tmp_path / ".taken_at").write_text("of this machine")
    assert explore.source_revision(str(tmp_path)) in others


def test_lengths_are_read_or_refused_where_they_cannot_be_joined(tmp_path):
    path, kept = tmp_path / "l.parquet", {explore.METADATA_LENGTHS: b'{"model": "m"}'}
    for columns, message in (
        ({"length": [10, 20], "index": [3, 1]}, ""),
        ({"index": [1, 1], "length": [2, 3]}, "occurs twice"),
        ({"index": [1, 2]}, "no column length"), ({"index": [1, None], "length": [2, 3]}, "null"),
        ({"index": [1.9, 2.0], "length": [2, 3]}, "'index' holds double"),
    ):  # fmt: skip
        pq.write_table(pa.table(columns).replace_schema_metadata(kept), path)
        if message:
            with pytest.raises(SourceError, match=message):
                explore.read_lengths(str(path))
            continue
        found = explore.read_lengths(str(tmp_path))
        assert (found.index.tolist(), found.length.tolist()) == ([3, 1], [10, 20])
        assert (found.num_tokens, found.settings) == (None, {"model": "m"})


WATCH = """
import resource, sys
from explore_logits import open_source
for path in sys.argv[1:]:
    assert sum(1 for _ in open_source(path, streaming=True)) > 0
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_stays_flat_while_a_stream_grows_tenfold(tmp_path):
    """The larger files decode to 80 MB more than the smaller ones; 30 MB are allowed."""
    row = {"messages": [{"role": "user", "content": "word " * 800}] * 2}
    names = [(count, kind) for count in (1_000, 10_000) for kind in ("jsonl", "parquet")]
    paths = [write_rows(tmp_path / f"{count}.{kind}", [row] * count) for count, kind in names]
    done = run_code(WATCH, *paths, cwd=ROOT)
    _, small, lines, parquet = map(int, done.stdout.split())
    assert lines - small < 30, f"peak memory grew from {small} to {lines} MB (JSON lines)"
    assert parquet - lines < 30, f"peak memory grew from {lines} to {parquet} MB (Parquet)"


# What was left out, or read as something else -----------------------------------------------------

CSV = 'id,question,answer\n1,"a\n\ufeffb",02139\n2,q,NA\n3,q,TRUE\n4,q,\n'


def put(hub: Any, repo: str, **files: str | bytes) -> str:
    """Make a commit of a dataset on the Hub, and return its id."""
    api = huggingface_hub.HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo(repo, repo_type="dataset", exist_ok=True)
    data = {
        n.replace("_", "."): t if isinstance(t, bytes) else t.encode() for n, t in files.items()
    }
    add = [huggingface_hub.CommitOperationAdd(*file) for file in data.items()]
    made = api.create_commit(repo, add, commit_message="add", repo_type="dataset")
    return str(made.oid)


@pytest.fixture
def near(hub, tmp_path, monkeypatch):
    """A Hub with a cache of this test's; `near(False)` puts the Hub out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    def set_near(value: bool) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", not value)

    return set_near


@STREAMED
def test_files_on_the_hub_are_read_as_they_are_here(streaming, near, hub, tmp_path):
    rows = [{"id": 2**40 + n, "answer": [{"budget": x, "on": "2024-01-01"}]}
            for n, x in enumerate(NUMBERS)]  # fmt: skip
    for kind, text in (("csv", CSV), ("jsonl", "".join(json.dumps(row) + "\n" for row in rows))):
        (tmp_path / f"train.{kind}").write_text(text)
        commit = put(hub, f"u/{kind}", **{f"train_{kind}": text, f"test_{kind}": text})
        how = {"integers": ["id"], "streaming": streaming}
        here = list(open_source(str(tmp_path / f"train.{kind}"), **how))
        for revision in (None, commit):
            found = list(open_source(f"u/{kind}", revision=revision, **how))
            assert list(map(repr, found)) == list(map(repr, here))
        if not streaming:
            found = list(open_source(f"u/{kind}", split="train+test", integers=["id"]))
            assert list(map(repr, found)) == list(map(repr, here)) * 2
    near(False)
    if streaming:  # which leaves no table behind
        with pytest.raises(SourceError, match="cache"):
            open_source("u/jsonl")
    else:
        found = open_source("u/jsonl", split="train[:2]", integers=["id"])
        assert list(map(repr, found)) == list(map(repr, here[:2]))
    with pytest.raises(SourceError, match="has no split 'dev'; it has train, test"):
        open_source("u/csv", split="dev")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("by", ["this script", "load_dataset"])
def test_of_a_hub_out_of_reach_the_commit_that_is_meant_is_read_or_none(kind, by, near, hub):
    commits = []
    for answer in ("one", "two"):
        data = table(answer) if kind == "parquet" else f'{{"answer": "{answer}"}}'
        near(True)
        commits.append(put(hub, "u/qa", **{f"train_{kind}": data}))
        if by == "load_dataset":
            datasets.load_dataset("u/qa")
        else:
            open_source("u/qa")
        near(False)
        assert explore.source_revision("u/qa") == commits[-1]
        for revision in (None, commits[-1]):
            assert open_source("u/qa", revision=revision)[0]["answer"] == answer
    if (kind, by) == ("jsonl", "this script"):
        assert open_source("u/qa", revision=commits[0])[0]["answer"] == "one"
    else:
        with pytest.raises(SourceError, match=f"cache here holds commit {commits[1]}"):
            open_source("u/qa", revision=commits[0])


def test_what_was_read_by_its_commit_is_read_when_the_hub_is_out_of_reach(near, hub):
    """By a README.md, too, which says how a file is to be read: then `datasets` reads it."""
    options = "---\nconfigs:\n- {config_name: a, data_files: r.csv, sep: ';'}\n---\n"
    for files in ({"r_csv": "answer\n007\n"}, {"r_csv": "x;answer\n1;a\n", "README_md": options}):
        near(True)
        put(hub, "u/qa", **files)
        commit = explore.source_revision("u/qa")
        there = list(open_source("u/qa", revision=commit))
        near(False)
        assert explore.source_revision("u/qa") == commit
        assert list(open_source("u/qa", revision=commit)) == there
        assert [*there[0]] == (["x", "answer"] if "README_md" in files else ["answer"])


def test_files_of_no_split_are_named(tmp_path, caplog):
    for name in ("algebra", "train-tickets", "b/cooking"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / f"{name}.jsonl", PLAIN_ROWS)
    (tmp_path / "more").symlink_to(tmp_path / "b")
    assert len(open_source(str(tmp_path))) == 5
    assert "3 files" in caplog.text
    assert "algebra.jsonl, b/cooking.jsonl, more" in caplog.text
    caplog.clear()
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- {config_name: a, data_files: '*.jsonl'}\n---"
    )
    assert len(open_source(str(tmp_path))) == 10
    assert not caplog.records
    (tmp_path / "README.md").unlink()
    (tmp_path / "train-tickets.jsonl").unlink()
    assert len(open_source(str(tmp_path / "more"))) == 5
    assert not caplog.records


@pytest.mark.parametrize("form", ["torch", "arrow", "pandas"])
def test_a_saved_dataset_is_read_without_the_format_it_was_given(form, tmp_path):
    rows = [{"messages": [*QUESTION, {**ANSWER[0], "weight": 1.0}], "n": 3}]
    made = datasets.Dataset.from_list(rows).with_format(form, columns=["n"])
    made.save_to_disk(tmp_path / "a")
    datasets.DatasetDict(train=made).save_to_disk(tmp_path / "b")
    for name in "ab":
        revision = explore.source_revision(str(tmp_path / name))
        assert read_conversation(open_source(str(tmp_path / name))[0], MESSAGES).messages
        open_source(str(tmp_path / name)).filter(lambda row: row["n"] > 3)  # leaves a cache there
        assert any(tmp_path.rglob(f"{name}/**/cache-*"))
        assert explore.source_revision(str(tmp_path / name)) == revision


@STREAMED
def test_parquet_files_whose_columns_hold_something_else_are_refused(streaming, tmp_path):
    """Their width may differ, nulls and keys may be missing."""
    number, text = pa.array([1]), pa.array(["007"])
    lists = [pa.array([[{"a": 1}]]), pa.array([[{"a": "1"}]])]
    lists += [pa.array([[{"a": 1.5}]]), pa.array([[{"a": None}]])]
    alike = [(number, number.cast("int8")), (text, text.cast("large_string")), (lists[3], lists[0]),
             (pa.nulls(1), text), (number, number.cast("float64")), (text, pa.nulls(1, "float64")),
             (pa.nulls(1, "float64"), text), (pa.nulls(1), text.dictionary_encode())]  # fmt: skip
    other = [(number, text), (text, number), *itertools.combinations(lists[:3], 2)]
    for pairs, fine in ((alike, True), (other, False)):
        for n, pair in enumerate(pairs):
            (folder := tmp_path / f"{fine}{n}").mkdir()
            for name, column in zip("ab", pair, strict=True):
                pq.write_table(pa.table({"x": column}), folder / f"{name}.parquet")
            with contextlib.nullcontext() if fine else pytest.raises(SourceError, match="column x"):
                found = open_source(str(folder), streaming=streaming)
                assert [row["x"] for row in found] == [each for c in pair for each in c.to_pylist()]


def test_a_prompt_goes_only_where_the_answer_repeats_it():
    system, call = {"role": "system", "content": "s"}, {"function": {"name": "f"}}
    asked = [*QUESTION, {"role": "assistant", "tool_calls": [call]}]
    told = [{"role": "tool", "content": "5"}, *ANSWER]
    talk = QUESTION + ANSWER
    for prompt, answer, whole in (
        (asked, told, asked + told),
        ([system, *QUESTION], talk, [system, *talk]),
        ([system], talk, [system, *talk]),
        ([system, *QUESTION], [system, *talk], [system, *talk]),
        (QUESTION, [system, *talk], [system, *talk]),
        (talk, [{"role": "user", "content": "more"}, *ANSWER],
         [*talk, {"role": "user", "content": "more"}, *ANSWER]),
        ("q", talk, talk), (None, talk, talk), ([{"role": "user", "content": "q "}], talk, talk),
        ([{"role": "user", "content": "Say: q"}], talk, talk), (talk, talk[:1] + told[1:], talk),
        ([*asked, *told, *QUESTION], talk, [*asked, *told, *talk]), ([*talk, system], talk, talk),
    ):  # fmt: skip
        row = {"prompt": prompt, "completion": answer}
        assert read_conversation(row, explore.resolve_columns(row)).messages == whole


@STREAMED
def test_the_kind_of_a_file_is_in_the_end_of_its_name(streaming, tmp_path):
    """And what a conversation may lack, one file of several may lack."""
    (folder := tmp_path / "shards.csv").mkdir()
    write_rows(folder / "a.csv.jsonl", PLAIN_ROWS)
    write_rows(folder / "b.jsonl", [{**PLAIN_ROWS[0], "tools": TOOLS}])
    assert len(list(open_source(str(folder), streaming=streaming))) == 6


@STREAMED
def test_zstd_is_read_in_all_its_frames_and_not_beyond_a_cut(streaming, tmp_path):
    frames = [pa.compress(part, "zstd", asbytes=True) for part in (LINE, LINE[:9], LINE[9:], TABLE)]
    (path := tmp_path / "r.jsonl.zst").write_bytes(b"".join(frames[:3]))
    assert list(open_source(str(path), streaming=streaming)) == PLAIN_ROWS[:1] * 2
    path.write_bytes(frames[0] + frames[3][:9])
    with pytest.raises(SourceError, match=r"zst', line \d: .*damaged"):
        list(open_source(str(path), streaming=streaming))

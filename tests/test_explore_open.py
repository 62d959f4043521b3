"""Opening outputs: any row at once, from any kind of dataset, and nothing that should not be."""

from __future__ import annotations

import functools
import io
import json
import os
import resource
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CHATS, ROOT, TEACHER
from fsspec.implementations.local import LocalFileSystem
from loopback_hub import LoopbackHub
from small_output import SETTINGS, random_rows, rows_to_table, write_output, write_parts

import explore_logits as explore
from explore_logits import (
    FormatError,
    LogitDataset,
    LogitsError,
    OpenError,
    RowError,
    as_output,
    get_sample,
    iter_samples,
    load_extraction_config,
    load_logit_dataset,
)

ROWS = random_rows(20)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty rows in three shards of three row groups each."""
    return write_output(tmp_path_factory.mktemp("output"), ROWS)


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        pairs = zip(one[name], two[name], strict=True) if isinstance(one[name], list) else None
        for a, b in pairs or [(one[name], two[name])]:
            np.testing.assert_array_equal(a, b, err_msg=name)
            assert getattr(a, "dtype", None) == getattr(b, "dtype", None)


def expected(row: int) -> dict[str, Any]:
    return get_sample([ROWS[row]])


# Rows ---------------------------------------------------------------------------------------------


def test_every_row_can_be_read_in_any_order(output: Path) -> None:
    dataset = load_logit_dataset(output)
    order = np.random.default_rng(3).permutation(20)
    for row in order.tolist():
        assert_same(get_sample(dataset, row), expected(row))
    assert len(dataset) == 20
    assert_same(get_sample(dataset, -1), expected(19))


@pytest.mark.parametrize("row", [20, -21, 10**9])
def test_a_row_that_is_not_there_is_an_error_that_says_how_many_there_are(
    output: Path, row: int
) -> None:
    with pytest.raises(RowError, match="20 rows"):
        get_sample(load_logit_dataset(output), row)
    with pytest.raises(IndexError):
        load_logit_dataset(output)[row]


def test_one_row_reads_one_row_group(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []

    class Counting:
        def __init__(self, path: Path) -> None:
            self.file = open(path, "rb")  # noqa: SIM115 - closed with the reader
            self.closed = False

        def read(self, n: int = -1) -> bytes:
            start = self.file.tell()
            data = self.file.read(n)
            read.append((start, len(data)))
            return data

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    store = explore.open_store(output)
    monkeypatch.setattr(store, "open", lambda path: Counting(output / path))
    dataset = LogitDataset(store, {"data/part-00001.parquet": 0})
    group = dataset.footer(0).row_group(1)
    size = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
    begin = min(column_start(group.column(i)) for i in range(group.num_columns))
    read.clear()
    assert_same(get_sample(dataset, 4), expected(12))  # row 4 of the shard: its second group
    assert sum(n for _, n in read) <= size
    assert all(begin <= start and start + n <= begin + size for start, n in read)
    read.clear()
    get_sample(dataset, 5)
    assert read == []  # the same row group is kept


def column_start(column: Any) -> int:
    pages = [column.data_page_offset, column.dictionary_page_offset or column.data_page_offset]
    return min(pages)


def test_all_kinds_of_datasets_give_the_same_samples(output: Path) -> None:
    mapped = datasets.load_dataset("parquet", data_dir=str(output / "data"), split="train")
    streamed = datasets.load_dataset(
        "parquet", data_dir=str(output / "data"), split="train", streaming=True
    )
    files = sorted((output / "data").glob("*.parquet"))
    kinds = {
        "folder by name": str(output),
        "folder by path": output,
        "list of files": files,
        "opened": load_logit_dataset(output),
        "datasets.Dataset": mapped,
        "datasets.Dataset with a format": mapped.with_format("torch"),
        "datasets.IterableDataset": streamed,
        "pyarrow table": rows_to_table(ROWS),
        "list of rows": ROWS,
        "rows as stored": list(load_logit_dataset(output)),
    }
    for kind in kinds.values():
        assert_same(get_sample(kind, 13), expected(13))
        assert [s["index"] for s in iter_samples(kind, max_samples=9)] == list(range(9))
    for row in (20, -1):
        with pytest.raises(RowError, match="stream"):
            get_sample(streamed, row)


def test_reading_does_not_change_what_was_given(output: Path) -> None:
    mapped = datasets.load_dataset("parquet", data_dir=str(output / "data"), split="train")
    shaped = mapped.with_format("numpy", columns=["index"])
    before = (shaped.format, shaped._fingerprint)
    get_sample(mapped, 7)
    get_sample(mapped.with_format("numpy"), 7)
    assert (shaped.format, shaped._fingerprint) == before
    streamed = mapped.to_iterable_dataset()
    get_sample(streamed, 7)
    assert next(iter(streamed))["index"] == 0


def test_optional_columns_may_be_missing(tmp_path: Path) -> None:
    table = rows_to_table(ROWS[:4]).replace_schema_metadata(None)
    missing = [name for name in explore.OPTIONAL_COLUMNS if name in table.column_names]
    pq.write_table(table.drop_columns(missing), tmp_path / "old.parquet")
    sample = get_sample(load_logit_dataset(tmp_path), 2)
    assert sample["index"] == 2  # the row number, for want of better
    assert sample["num_tokens"] == ROWS[2]["num_tokens"]
    assert all(part.size == 0 for part in sample["sampled_indices"])
    assert explore.dequantize_all_logits(sample, 0)[0].size == ROWS[2]["top_counts"][0]


def test_a_needed_column_that_is_missing_is_named() -> None:
    with pytest.raises(FormatError, match="no column 'top_counts'"):
        get_sample(rows_to_table(ROWS[:1]).drop_columns(["top_counts"]))


def test_wider_types_are_accepted_when_nothing_is_lost() -> None:
    table = rows_to_table(ROWS[:2])
    wide = pa.schema(
        [
            pa.field(
                field.name,
                pa.large_list(pa.int64())
                if field.type in (pa.list_(pa.uint16()), pa.list_(pa.uint8()))
                else field.type,
            )
            for field in table.schema
        ]
    )
    assert_same(get_sample(table.cast(wide), 1), get_sample(table, 1))
    rows = [{**ROWS[0], "top_counts": [300, *ROWS[0]["top_counts"][1:]]}]
    foreign = pa.Table.from_pylist(rows, schema=wide)
    with pytest.raises(FormatError, match="top_counts"):
        get_sample(foreign)


def test_stored_text_and_empty_tails_are_read() -> None:
    rows = random_rows(3, settings=SETTINGS | {"sampled_n": 0, "store_tokens": True})
    sample = get_sample(rows, 1)
    for name in ("input_ids", "token_positions"):
        assert sample[name].tolist() == rows[1][name]
    assert [part.size for part in sample["sampled_indices"]] == [0] * sample["num_tokens"]
    rows = [{**row, "sampled_min": [], "sampled_max": []} for row in rows]
    assert get_sample(rows, 1)["sampled_min"].tolist() == [0.0] * sample["num_tokens"]


# Names, splits, settings --------------------------------------------------------------------------


def test_names_tell_the_split_and_the_order_of_shards(tmp_path: Path) -> None:
    for folder, names, there in (
        ("a", ("train-00000-of-00001", "test-00000-of-00001"), {"test": [1], "train": [0]}),
        ("b", ("data/part-99999", "data/part-100000", "data/part-00002"), {"train": [2, 0, 1]}),
        ("c", ("latest-00001", "model-test-00000", "my_dev_run"), {"train": [0, 1, 2]}),
        ("d", ("test/0", "data/dev/0", "data/001/part-09000"), {"dev": [1], "train": [2]}),
    ):
        paths = [tmp_path / folder / f"{name}.parquet" for name in names]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(rows_to_table(ROWS[:1]), path)
        for split, order in there.items():
            shards = load_logit_dataset(tmp_path / folder, split).shards
            assert shards == [f"{names[place]}.parquet" for place in order]
        with pytest.raises(OpenError, match=rf"no split 'eval'; it has {', '.join(there)}$"):
            load_logit_dataset(tmp_path / folder, "eval")


def test_a_folder_that_only_holds_outputs_is_refused_with_their_names(tmp_path: Path) -> None:
    with pytest.raises(OpenError, match=r"holds no Parquet files$"):
        load_logit_dataset(tmp_path)
    for name in ("both/a", "both/b", "demo/logits"):
        write_output(tmp_path / name, ROWS[:4])
    (tmp_path / "demo/lengths").mkdir()
    pq.write_table(pa.table({"index": [1]}), tmp_path / "demo/lengths/lengths.parquet")
    with pytest.raises(OpenError, match=r"name one of those below: .*both/a, .*both/b$"):
        load_logit_dataset(tmp_path / "both")
    with pytest.raises(OpenError, match=r"name one of those below: \S*demo/logits$"):
        load_logit_dataset(tmp_path / "demo")
    with pytest.raises(OpenError, match="lengths"):
        load_logit_dataset(tmp_path / "demo/lengths/..")
    inside = write_output(tmp_path / "both/a", ROWS[:4])
    write_output(inside / "old", ROWS[:8])
    assert len(load_logit_dataset(inside)) == 4


def test_an_output_may_have_more_shards_than_a_process_may_open_files(tmp_path: Path) -> None:
    made = write_output(tmp_path, ROWS + ROWS, rows_per_shard=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 20, hard))
    try:
        assert [sample["index"] for sample in iter_samples(made)] == [*range(20)] * 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_shards_of_two_runs_are_not_read_as_one(tmp_path: Path) -> None:
    one = write_output(tmp_path / "one", ROWS[:3]) / "data/part-00000.parquet"
    other = SETTINGS | {"top_p": 0.9, "seed": 7}
    two = write_output(tmp_path / "two", ROWS[:3], settings=other) / "data/part-00000.parquet"
    with pytest.raises(FormatError, match="two runs, which differ in seed, top_p"):
        list(iter_samples([one, two]))
    with pytest.raises(OpenError, match="names a file twice"):
        load_logit_dataset([one, one])
    elsewhere = SETTINGS | {"attn": "eager", "versions": {"torch": "1"}}
    same = write_output(tmp_path / "same", ROWS[3:6], settings=elsewhere) / "data"
    assert len(list(iter_samples([one, same / "part-00000.parquet"]))) == 6
    job = SETTINGS | {"dataset": "./chats.jsonl", "dataset_revision": "sha256:1", "numerics": {}}
    moved = job | {"dataset": "/data/chats.jsonl", "numerics": {"attention": "eager"}}
    parts = [
        write_output(tmp_path / f"{n}", ROWS[n : n + 3], settings=of) / "data/part-00000.parquet"
        for n, of in ((6, job), (9, moved))
    ]
    assert [sample["index"] for sample in iter_samples(parts)] == [*range(6, 12)]
    (tmp_path / "6/data/part-00001.parquet").write_bytes(parts[1].read_bytes())
    assert explore.validate_output(tmp_path / "6").ok


def test_an_output_in_parts_is_read_in_their_order_by_its_checkpoints(tmp_path: Path) -> None:
    skipped = {3: "too_long", 9: "unusable"}
    rows = [row for row in ROWS if row["index"] not in skipped]
    output = write_parts(
        tmp_path, rows, skipped=skipped, rows_per_part=4, first_part=8998, workers=2
    )
    assert sorted(path.name for path in output.glob("checkpoint*")) == [
        "checkpoint-w00.json", "checkpoint-w01.json",
    ]  # fmt: skip
    dataset = load_logit_dataset(output)
    assert dataset.shards[1:3] == ["data/part-08999.parquet", "data/001/part-09000.parquet"]
    assert [sample["index"] for sample in iter_samples(dataset)] == [r["index"] for r in rows]
    fresh = load_logit_dataset(output)
    assert_same(get_sample(fresh, 12), get_sample([rows[12]]))
    assert len(fresh._footers) == 1, "the checkpoints say which part holds the row"
    assert dataset.skipped() == skipped
    assert "2 conversations without a row (too_long 1, unusable 1)" in (
        explore.describe_run(dataset)
    )


def test_rows_can_be_sliced_and_chosen_by_conversation(output: Path) -> None:
    dataset = load_logit_dataset(output)
    assert dataset[6:11:2] == [dataset[6], dataset[8], dataset[10]]
    assert dataset[5:5] == []
    assert_same(get_sample(dataset, conversation=13), expected(13))
    assert_same(get_sample(ROWS[2], -1), expected(2))
    with pytest.raises(RowError, match="none of the 20 rows is of conversation 77"):
        get_sample(dataset, conversation=77)


def test_many_rows_come_in_the_order_asked_for(output: Path) -> None:
    dataset, wanted = load_logit_dataset(output), [13, 2, -1, 13, 7, 0]
    found = dataset.take(wanted)["index"].to_pylist()
    assert found == [dataset[row]["index"] for row in wanted]


@pytest.mark.parametrize("row", ["3", 1.0, True, slice(0, 2), None, [1]])
def test_what_is_no_row_number_is_refused_with_what_to_pass(output: Path, row: Any) -> None:
    with pytest.raises(RowError, match="a row number is an integer"):
        get_sample(load_logit_dataset(output), row)


def test_what_is_no_dataset_or_sample_is_refused_with_what_to_pass(output: Path) -> None:
    dataset = load_logit_dataset(output)
    for nothing in (3, None):
        for function in (
            get_sample,
            explore.compute_dataset_stats,
            explore.analyze_nucleus_sizes,
            explore.compute_bytes_per_token_stats,
            explore.print_dataset_stats,
            functools.partial(explore.compare_outputs, dataset),
        ):
            with pytest.raises(LogitsError, match="a dataset is an output by name"):
                function(nothing)
        for function in (
            explore.load_logit_dataset,
            explore.load_extraction_config,
            explore.quick_explore,
            explore.validate_output,
            explore.LogitIterableDataset,
            functools.partial(explore.export_axolotl, folder=output / "export"),
        ):
            with pytest.raises(LogitsError, match="an output is a folder, a Parquet file"):
                function(nothing)
    sample = get_sample(dataset)
    with pytest.raises(LogitsError, match="decoded already") as decoded:
        get_sample([sample])
    assert "\n" not in str(decoded.value)
    with pytest.raises(LogitsError, match="max_samples=-1"):
        list(explore.iter_samples(dataset, max_samples=-1))
    for function in (explore.visualize_conversation_probabilities, explore.render_page):
        for wrong in (sample, [sample], None):
            with pytest.raises(LogitsError, match="what analyze_token_probabilities returns"):
                function(wrong)
    for function in (explore.print_top_tokens, explore.dequantize_top_logits):
        with pytest.raises(LogitsError, match=r"get_sample\(dataset, i\) returns it, not a LogitD"):
            function(dataset, 0)
    with pytest.raises(LogitsError, match=r"get_sample\(dataset, i\) returns it, not a LogitD"):
        explore.plot_nucleus_vs_sampled(dataset)  # type: ignore[arg-type]
    for t in ("0", 1.5, None):
        with pytest.raises(RowError, match="token's number is an integer"):
            explore.decode_top_tokens(sample, t)  # type: ignore[arg-type]
    with pytest.raises(LogitsError, match=r"pass what load_tokenizer\('MODEL'\) returns"):
        explore.print_top_tokens(sample, 0, "some/model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such folder or file"),
        ("/nowhere/at/all", "no such folder or file"),
        ("not a name", "no such folder or file"),
        ([], "empty"),
        (["./nowhere.parquet"], "no such file"),
        ("", "no such folder or file"),
        ("~nobody/out", "no such folder or file"),
        ("a" * 5000, "no such folder or file: a{200}$"),
        ("user/" + "a" * 120, "no name of a dataset: Repo id must"),
        ("user/..", "no name of a dataset"),
        ("user/x--y", "no name of a dataset"),
        ("user/x.git", "no name of a dataset"),
        ("üser/näme", "no name of a dataset"),
        ("user/\udcff", "no such folder or file: user/⟨U\\+DCFF⟩"),
        ("user/na\nme\x00", "no such folder or file"),
    ],
)
def test_an_output_that_is_not_there_is_refused(name: Any, message: str) -> None:
    with pytest.raises(OpenError, match=message):
        load_logit_dataset(name)


def test_the_settings_come_from_the_file_or_from_a_shard(output: Path, tmp_path: Path) -> None:
    assert load_extraction_config(output) == SETTINGS
    alone = write_output(tmp_path, ROWS[:2])
    (alone / "extraction_config.json").unlink()
    assert load_extraction_config(alone) == SETTINGS
    pq.write_table(rows_to_table(ROWS[:2]).replace_schema_metadata(None), tmp_path / "bare.parquet")
    with pytest.raises(OpenError, match="no settings"):
        load_extraction_config(tmp_path / "bare.parquet")


def test_a_checkpoint_of_other_files_is_not_believed(output: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    counts = {f"part-{part:05d}.parquet": rows for part, rows in enumerate((8, 8, 4))}
    entries = {}
    for name, rows in counts.items():
        data = (output / "data" / name).read_bytes()
        (tmp_path / "data" / name).write_bytes(data)
        entries[f"data/{name}"] = {"bytes": len(data), "figures": {"rows": rows}}
    stale = {path: {"bytes": 17, "figures": {"rows": 1}} for path in entries}
    odd = {path: {**entry, "figures": {"rows": "many"}} for path, entry in entries.items()}
    texts = [json.dumps({"shards": shards}) for shards in (entries, stale, odd, 3)]
    for text in (*texts, "[]", "{", "[" * 100_000):
        (tmp_path / "checkpoint.json").write_text(text)
        for row in (0, 12, 15, 19):
            assert_same(get_sample(load_logit_dataset(tmp_path), row), expected(row))
    entries["data/part-00001.parquet"]["figures"] = {"rows": 9}
    (tmp_path / "checkpoint.json").write_text(json.dumps({"shards": entries}))
    assert_same(get_sample(load_logit_dataset(tmp_path), 16), expected(16))


# Untrusted files ----------------------------------------------------------------------------------


def test_a_link_out_of_the_folder_is_not_followed(output: Path, tmp_path: Path) -> None:
    inside = tmp_path / "output"
    (inside / "data").mkdir(parents=True)
    (inside / "data/part-00000.parquet").symlink_to(output / "data/part-00000.parquet")
    with pytest.raises(OpenError, match="holds no Parquet files"):
        load_logit_dataset(inside)
    secret = tmp_path / "secret.json"
    secret.write_text('{"model": "mine"}')
    (inside / "data/part-00000.parquet").unlink()
    pq.write_table(rows_to_table(ROWS[:1]), inside / "data/part-00000.parquet")
    (inside / "extraction_config.json").symlink_to(secret)
    with pytest.raises(OpenError, match="outside"):
        load_extraction_config(inside)
    with pytest.raises(OpenError, match="outside"):
        explore.open_store(inside).open("../secret.json")


def test_links_of_the_hubs_own_cache_are_followed(output: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "data"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "1").write_bytes((output / "data/part-00000.parquet").read_bytes())
    (snapshot / "part-00000.parquet").symlink_to("../../../blobs/1")
    assert_same(get_sample(load_logit_dataset(snapshot.parent), 3), expected(3))


def test_a_row_group_that_announces_too_much_is_refused_before_it_is_read(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explore, "MAX_GROUP_BYTES", 1000)
    with pytest.raises(OpenError, match="smaller row groups"):
        get_sample(load_logit_dataset(output), 0)


def bomb(table: pa.Table, column: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(column), column, values)


def test_a_bomb_of_few_bytes_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    zeros = pa.array(np.zeros(2**24, np.uint16))
    long = bomb(
        rows_to_table(ROWS[:1]),
        "top_logits_quantized",
        pa.ListArray.from_arrays([0, len(zeros)], zeros),
    )
    packed = pa.array([bytes(2**22)], pa.binary())  # 4 MiB, which each of 64 rows points at
    shared = pa.DictionaryArray.from_arrays(pa.array(np.zeros(64, np.int32)), packed)
    wide = bomb(rows_to_table([ROWS[0]] * 64), "top_indices_high", shared)
    for table, message in ((long, "smaller row groups"), (wide, "268,435,456 bytes in")):
        path = tmp_path / f"{len(table)}.parquet"
        pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**23)
        assert path.stat().st_size < 20_000
        reads = (get_sample, lambda p: list(iter_samples(p)), lambda p: next(iter(as_output(p))))
        for read in reads:
            before = pa.total_allocated_bytes()
            with pytest.raises(LogitsError, match=rf"{path.name}: .*{message}") as caught:
                read(path)
            del caught
            assert pa.total_allocated_bytes() - before < 2**24


NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("column", ["logsumexp", "top_min", "top_max", "sampled_min"])
def test_what_is_not_finite_is_refused_by_row_and_token(column: str) -> None:
    row = next(row for row in ROWS[4:] if row["num_tokens"] > 2)
    for value in NOT_FINITE:
        broken = {**row, column: [*row[column][:2], value, *row[column][3:]]}
        with pytest.raises(FormatError, match="row 1: token 2 has a log-sum-exp, or"):
            list(iter_samples([ROWS[0], broken]))


@pytest.mark.parametrize("version", [b"3", b"9" * 5000, b"\xff", b"1.5", b""])
def test_a_later_format_is_refused_whatever_it_says(tmp_path: Path, version: bytes) -> None:
    table = rows_to_table(ROWS[:1])
    named = {**table.schema.metadata, explore.METADATA_VERSION: version}
    pq.write_table(table.replace_schema_metadata(named), tmp_path / "a.parquet")
    with pytest.raises(FormatError, match=r"a\.parquet is in format .{,20}, formats up to 2 can"):
        get_sample(tmp_path)


STRANGE = ["[" * 200_000, '{"top_p": NaN}', '{"top_p": ' + "9" * 5000 + "}", "null", "[1, 2]",
           '{"text_col": [1]}', '{"template_kwargs": 3}', '{"model": 1}', "\x00"]  # fmt: skip


@pytest.mark.parametrize("text", STRANGE)
def test_settings_that_are_none_are_refused_in_one_line_by_file(tmp_path: Path, text: str) -> None:
    write_output(tmp_path, ROWS[:1])
    (tmp_path / "extraction_config.json").write_text(text)
    with pytest.raises(FormatError, match=r"^extraction_config\.json: ") as caught:
        load_extraction_config(tmp_path)
    assert "\n" not in str(caught.value)
    shard = tmp_path / "data/part-00000.parquet"
    table = rows_to_table(ROWS[:1])
    named = {**table.schema.metadata, explore.METADATA_SETTINGS: text.encode()}
    pq.write_table(table.replace_schema_metadata(named), shard)
    assert get_sample(tmp_path)["index"] == 0  # the rows need none of it
    with pytest.raises(FormatError, match=r"part-00000\.parquet: "):
        _ = load_logit_dataset(tmp_path).settings


COMMANDS = ([], ["--stats", "--text"], ["--validate"], ["--conversation", "3"], ["--token", "0"])


@pytest.mark.parametrize(
    "change",
    [
        *({name: [value]} for name in ("logsumexp", "top_min", "sampled_max")
          for value in (float("nan"), -3e38, 3e38)),
        {"input_ids": [-5]}, {"token_positions": [-1]},
        {"index_col": "x"}, {"template_date": "2030-19-39"}, {"template_date": [1]}, {"turns": 3},
        {"checkpoint.json": '{"parts": {"number": [NaN], "rows": [[]], "bytes": ["x"]}}'},
        {"checkpoint.json": '{"parts": {"number": [9]}}'},
        {"checkpoint.json": '{"parts": {"number": [' + "9" * 5000 + "]}}"},
        {"chat_template.jinja": "{% x"},
    ],
    ids=lambda change: f"{change!s:.40}",
)  # fmt: skip
def test_no_strange_output_ends_in_a_traceback(tmp_path: Path, change: dict[str, Any]) -> None:
    ((name, value),) = change.items()
    settings = SETTINGS | {"store_tokens": True, "model": str(TEACHER), "dataset": str(CHATS)}
    rows = random_rows(3, settings=settings, tokens=4)
    if name in rows[0]:
        rows = [{**row, name: value * len(row[name])} for row in rows]
    elif "." not in name:
        settings |= change
    made = write_parts(tmp_path, rows, settings=settings)
    if "." in name:
        (made / name).write_text(value)
    codes = [explore.main([str(made), *words]) for words in COMMANDS]  # a bug would raise here
    assert set(codes) <= {0, 2, 3}


def test_counts_that_promise_more_than_there_is_are_refused_without_memory() -> None:
    for change in ({"num_tokens": 2**31 - 1}, {"top_counts": [255] * ROWS[0]["num_tokens"]}):
        with pytest.raises(FormatError, match="row 0: "):
            get_sample([{**ROWS[0], **change}])


@pytest.mark.parametrize("name", ["extraction_config.json", "chat_template.jinja"])
def test_an_absurdly_large_text_file_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_output(tmp_path, ROWS[:1])
    (tmp_path / name).write_text(" " * 2000)
    monkeypatch.setattr(explore, "MAX_TEXT_BYTES", 1000)
    with pytest.raises(OpenError, match=name):
        explore.open_store(tmp_path).read_text(name)


@pytest.mark.parametrize("damage", ["truncate", "zero", "garbage", "flip"])
def test_a_damaged_file_is_a_format_error_that_names_it(tmp_path: Path, damage: str) -> None:
    write_output(tmp_path, ROWS[:8])
    shard = tmp_path / "data/part-00000.parquet"
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[100:4000:7] = bytes(len(data[100:4000:7]))
    content = {"truncate": data[: len(data) // 2], "zero": b"", "garbage": b"PAR1" * 40}
    shard.write_bytes(bytes(content.get(damage, data)))
    with pytest.raises(FormatError, match=r"part-00000\.parquet"):
        list(iter_samples(tmp_path))


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_no_thread_of_arrows_reads_what_is_pythons(kind: str, output: Path) -> None:
    # One that lets go of a Python buffer while the interpreter ends takes the process down.
    readers = set()

    class Noted(io.BytesIO):
        size = property(lambda self: len(self.getbuffer()))

        def read(self, *length: int) -> bytes:
            readers.add(threading.get_ident())
            return super().read(*length)

    class Files(LocalFileSystem):
        protocol = kind
        cachable = False

        def open(self, path: str, *_: Any, **__: Any) -> Noted:
            return Noted(Path(path).read_bytes())

    dataset = load_logit_dataset(output)
    noted = LogitDataset(replace(dataset.store, files=Files()), dataset.sizes)
    assert noted.store.on_hub == (kind == "memory")
    for row, sample in enumerate(iter_samples(noted)):
        assert_same(sample, expected(row))
    assert row == len(ROWS) - 1
    assert readers == {threading.get_ident()}


# The Hub ------------------------------------------------------------------------------------------

HUB_READER = """
import json, sys, urllib.request, os, explore_logits, huggingface_hub
from explore_logits import get_sample, load_logit_dataset, load_extraction_config, LogitsError

def log():
    with urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/_ctl/log") as answer:
        return json.load(answer)

def fetched(since):
    return [e["sent"] for e in log()[since:] if e["method"] == "GET" and e["range"]]

result = {}
dataset = load_logit_dataset("user/logits")
sample = get_sample(dataset, 17)
result["first"] = sum(fetched(0))
result["shards opened"] = len(dataset._footers)
opening = len(log())
other = get_sample(dataset, 22)
result["index"], result["other"] = sample["index"], other["index"]
result["second"] = sum(fetched(opening))
result["requests"] = len(fetched(opening))
size = lambda group: sum(group.column(i).total_compressed_size for i in range(group.num_columns))
result["groups"] = [size(dataset.footer(1).row_group(i)) for i in (2, 5)]
result["rows"] = len(dataset)
result["model"] = load_extraction_config("user/logits")["model"]
local = load_logit_dataset("user/logits", streaming=False)
result["local"] = [local.store.on_hub, get_sample(local, 17)["index"]]
result["model local"] = load_extraction_config(local)["model"]
def failing(call):
    try:
        call()
    except LogitsError as error:
        return str(error)

def post(path, **body):
    data = json.dumps(body).encode()
    urllib.request.urlopen(os.environ["HF_ENDPOINT"] + path, data=data)

result["missing"] = failing(lambda: load_logit_dataset("user/nothing"))
explore_logits.HUB_TIMEOUT_S = 0.5
for name, fault in {
    "refused": {"match": "parquet", "status": 403},
    "echo": {"match": "parquet", "status": 403, "message": "Bearer " + os.environ["HF_TOKEN"]},
    "closed": {"match": "api/datasets", "drop": "before"},
    "silent": {"match": "api/datasets", "latency": 60},
    **{f"answers {text} {place}": {"match": place, "text": text}
       for text in ("[1,2]", "{}", "null", "no") for place in ("datasets/user/logits$", "tree")},
}.items():
    huggingface_hub.close_session()
    huggingface_hub.HfFileSystem.clear_instance_cache()
    post("/_ctl/fault", count=99, **fault)
    result[name] = failing(lambda: get_sample(load_logit_dataset("user/logits"), 3))
    post("/_ctl/clear")
print(json.dumps(result))
"""


def test_over_the_hub_one_row_costs_a_footer_and_a_row_group(tmp_path: Path) -> None:
    rows = random_rows(24, settings=SETTINGS | {"vocab_size": 2000}, tokens=90)
    output = write_output(tmp_path / "out", rows, rows_per_shard=12, rows_per_group=2)
    files = {f"data/{path.name}": path.stat().st_size for path in (output / "data").iterdir()}
    shards = {path: {"bytes": n, "figures": {"rows": 12}} for path, n in files.items()}
    (output / "checkpoint.json").write_text(json.dumps({"shards": shards}))
    with LoopbackHub(root=str(tmp_path / "hub")) as hub:
        environment = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": "hf_loopback",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
        }
        upload = (
            "import huggingface_hub as h; api = h.HfApi();"
            "api.create_repo('user/logits', repo_type='dataset');"
            f"kind = dict(repo_type='dataset', folder_path={str(output)!r});"
            "api.upload_folder(repo_id='user/logits', **kind);"
            "import urllib.request, os;"
            "urllib.request.urlopen(os.environ['HF_ENDPOINT'] + '/_ctl/clear', data=b'')"
        )
        for script in (upload, HUB_READER):
            done = subprocess.run(
                [sys.executable, "-c", script],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
            assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"files {files}; {result}")
    assert (result["index"], result["other"], result["rows"]) == (17, 22, 24)
    assert result["shards opened"] == 1  # the checkpoint says which shard holds row 17
    # The footer is read with the 64 KiB at the end of the file, a row group exactly once.
    assert result["first"] <= 2**16 + result["groups"][0] + 1000
    assert result["second"] <= result["groups"][1] + 1000
    assert result["requests"] <= 2  # a redirect and the bytes
    assert sum(result["groups"]) < min(files.values()) / 2
    assert result["model"] == result["model local"] == SETTINGS["model"]
    assert result["local"] == [False, 17]
    assert "no dataset 'user/nothing'" in result["missing"]
    for name in ("refused", "echo", "closed", "silent"):
        assert "user/logits cannot be read from the Hub" in result[name] or (
            "parquet cannot be read from the Hub" in result[name]
        ), name
    answers = [said for name, said in result.items() if name.startswith("answers")]
    assert len(answers) == 8
    assert all(said.startswith("user/logits") for said in answers)
    assert "hf_loopback" not in done.stdout + done.stderr

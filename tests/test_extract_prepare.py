"""Section 2 of `extract_logits.py`: which rows belong to the job, and how long they are."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_teachers import tiny_tokenizer

import compute_lengths
import extract_logits
from explore_logits import LogitsError, SourceError, TemplateError, open_source, resolve_columns
from extract_logits import (
    ConversationDataset,
    DataError,
    EncodedRow,
    ExtractionConfig,
    IdSet,
    PreparedDataset,
    RowEncoder,
    StopRequested,
    describe_differences,
    prepare_dataset,
    prepare_windows,
)

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = tiny_tokenizer(300)
SUBJECTS = ["math", "art", "", None, "law", "math", "math", 7]


def make(**options: Any) -> ExtractionConfig:
    return ExtractionConfig(**{"model": "m", "dataset": "d", "output": "./o", **options})


def chat(number: int, size: int | None = None) -> list[dict[str, str]]:
    text = "z" * (number % 7 if size is None else size)
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": f"{number}{text}"}]


def rows_of(count: int, **columns: list[Any]) -> list[dict[str, Any]]:
    return [
        {"messages": chat(n), **{name: values[n] for name, values in columns.items()}}
        for n in range(count)
    ]


def encoder_for(
    rows: list[dict[str, Any]], index_col: str | None = None, **options: Any
) -> RowEncoder:
    columns = resolve_columns(list(rows[0]), index_col=index_col)
    return RowEncoder(TOKENIZER, TOKENIZER.chat_template, columns, **options)


def prepare(rows: list[dict[str, Any]], **options: Any) -> PreparedDataset:
    """Prepare rows map-style, the way a run without --streaming does."""
    source = datasets.Dataset.from_list(rows)
    config = make(**options)
    encoder = encoder_for(rows, config.index_col, max_seq_len=config.max_seq_len)
    return prepare_dataset(config, source, encoder)


def stream(rows: list[dict[str, Any]], **options: Any) -> list[PreparedDataset]:
    """Prepare rows as a stream whose rows may lack keys, the way --streaming reads .jsonl."""
    source = datasets.IterableDataset.from_generator(iter_rows, gen_kwargs={"rows": rows})
    config = make(streaming=True, **options)
    encoder = encoder_for(rows, config.index_col, max_seq_len=config.max_seq_len)
    return list(prepare_windows(config, source, encoder))


def iter_rows(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from rows


def selected(rows: list[dict[str, Any]], **options: Any) -> list[int]:
    return prepare(rows, **options).indices.tolist()


# Selection ----------------------------------------------------------------------------------------


def test_without_options_every_row_is_taken_under_its_number() -> None:
    prepared = prepare(rows_of(20))
    assert prepared.indices.tolist() == prepared.numbers.tolist() == list(range(20))


def test_full_dataset_takes_every_row() -> None:
    assert selected(rows_of(20), full_dataset=True) == list(range(20))


def test_offset_and_limit_count_source_rows() -> None:
    assert selected(rows_of(20), start_offset=5, limit=4) == [5, 6, 7, 8]
    assert selected(rows_of(20), start_offset=18, limit=4) == [18, 19]


def test_nothing_selected_is_refused_and_names_the_options() -> None:
    with pytest.raises(DataError, match=r"none of its 20 rows.*--start-offset"):
        prepare(rows_of(20), start_offset=20)


def test_random_rows_depend_on_seed_and_index_not_on_the_order_of_the_source() -> None:
    ids = [3 * n - 50 for n in range(60)]
    rows = rows_of(60, id=ids)
    chosen = selected(rows, index_col="id", random_sample=True, limit=12)
    assert len(chosen) == 12
    assert chosen != ids[:12]
    backwards = selected(rows[::-1], index_col="id", random_sample=True, limit=12)
    assert sorted(backwards) == sorted(chosen)
    other = selected(rows, index_col="id", random_sample=True, limit=12, seed=1)
    assert sorted(other) != sorted(chosen)


def test_a_larger_limit_keeps_the_rows_of_a_smaller_one() -> None:
    for random_sample in (False, True):
        small = selected(rows_of(60), random_sample=random_sample, limit=10)
        large = selected(rows_of(60), random_sample=random_sample, limit=30)
        assert set(small) < set(large)


def test_a_random_sample_is_uniform() -> None:
    """Each of 40 rows is taken by 10 of 40 places: 400 seeds, χ² with 39 degrees of freedom.

    False alarm below 1e-5 (critical value 85.3 with 400 draws of 10 without replacement, whose
    statistic is smaller than the multinomial one). The seeds are fixed, so it never flickers.
    """
    indices = np.arange(40)
    counts = Counter[int]()
    for seed in range(400):
        config = make(random_sample=True, limit=10, seed=seed)
        counts.update(extract_logits.select_rows(indices, None, config).tolist())
    expected = 400 * 10 / 40
    assert sum((counts[n] - expected) ** 2 / expected for n in range(40)) < 85.3


def test_each_group_has_its_limit_a_star_stands_for_the_others() -> None:
    rows = rows_of(80, subject=[SUBJECTS[n % 8] and str(SUBJECTS[n % 8]) for n in range(80)])
    limits = {"math": 4, "": 3, "*": 2}
    taken = selected(rows, subject_col="subject", sample_subject=limits)
    counts = Counter(rows[n]["subject"] or "" for n in taken)
    assert counts == {"math": 4, "": 3, "art": 2, "law": 2, "7": 2}


def test_without_a_star_other_groups_have_no_limit_and_zero_takes_none() -> None:
    rows = rows_of(40, subject=["math" if n % 2 else "art" for n in range(40)])
    taken = selected(rows, subject_col="subject", sample_subject={"math": 0})
    assert taken == list(range(0, 40, 2))


def test_a_missing_subject_column_names_those_there_are() -> None:
    for read in (prepare, stream):
        with pytest.raises(DataError, match=r"'topic'.*messages.*subject"):
            read(rows_of(3, subject=["a", "b", "c"]), subject_col="topic", sample_subject={})


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("random_sample", [False, True])
def test_a_stream_selects_the_rows_that_map_style_selects(
    with_ids: bool, random_sample: bool
) -> None:
    rng = np.random.default_rng(5)
    subjects = [SUBJECTS[n] and str(SUBJECTS[n]) for n in rng.integers(0, 8, 90)]
    rows = rows_of(90, id=(rng.permutation(1000)[:90] - 500).tolist(), subject=subjects)
    source = datasets.Dataset.from_list(rows)
    columns = resolve_columns(list(rows[0]), index_col="id" if with_ids else None)
    ids = extract_logits.read_source_indices(source, columns)
    groups = [extract_logits.group_name(subject) for subject in subjects]
    sizes = set()
    for offset, limit, subject in itertools.product(
        [0, 7, 200], [None, 1, 25, 500], [None, {"math": 5}, {"": 2, "*": 3}, {"*": 0}, {}]
    ):
        config = make(
            start_offset=offset, limit=limit, random_sample=random_sample, streaming=True,
            subject_col=None if subject is None else "subject", sample_subject=subject,
        )  # fmt: skip
        wanted = extract_logits.select_rows(ids, None if subject is None else groups, config)
        streamed = [index for index, _ in extract_logits.stream_rows(config, rows, columns)]
        assert streamed == ids[wanted].tolist(), config
        sizes.add(len(streamed))
    assert {0, 1, 25, 83, 90} <= sizes


@pytest.mark.parametrize("random_sample", [False, True])
def test_a_stream_is_prepared_as_the_rows_map_style_prepares(random_sample: bool) -> None:
    rows = rows_of(90, id=list(range(-90, 0)), subject=[str(n % 3) for n in range(90)])
    options: dict[str, Any] = {
        "index_col": "id", "subject_col": "subject", "sample_subject": {"0": 9, "*": 20},
        "start_offset": 4, "limit": 40, "random_sample": random_sample,
    }  # fmt: skip
    whole, (window,) = prepare(rows, **options), stream(rows, **options)
    assert window.indices.tolist() == whole.indices.tolist()
    assert window.lengths.tolist() == whole.lengths.tolist()
    assert window.num_tokens is not None
    assert whole.num_tokens is not None
    assert window.num_tokens.tolist() == whole.num_tokens.tolist()


def test_a_stream_is_cut_into_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract_logits, "STREAM_WINDOW", 40)
    windows = stream(rows_of(100))
    assert [window.indices.tolist() for window in windows] == [
        list(range(40)), list(range(40, 80)), list(range(80, 100)),
    ]  # fmt: skip


def test_a_streamed_file_and_folder_have_the_row_numbers_of_the_map_style_ones(
    tmp_path: Path,
) -> None:
    for part in range(3):
        lines = [json.dumps({"messages": chat(10 * part + n)}) for n in range(4)]
        (tmp_path / f"part-{part}.jsonl").write_text("\n\n".join(lines) + "\n")
    for path in (tmp_path / "part-1.jsonl", tmp_path):
        config = make(dataset=str(path), streaming=True)
        encoder = encoder_for(rows_of(1))
        windows = list(prepare_windows(config, open_source(str(path), streaming=True), encoder))
        whole = prepare_dataset(config, open_source(str(path)), encoder)
        streamed = {row.index: row for window in windows for row in window.encoded or []}
        assert list(streamed) == whole.indices.tolist()
        for position, row in enumerate(streamed.values()):
            other = ConversationDataset(whole, encoder)[position]
            assert isinstance(other, EncodedRow)
            np.testing.assert_array_equal(row.input_ids, other.input_ids)


# Ids ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [prepare, stream])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2, 1], "1 occurs more than once"),
        ([1, None, 3], "row 1.*None.*--index-col"),
        (["a", "b", "c"], "row 0.*'a'.*--index-col"),
        ([0.0, 1.0, 2.0], "row 0.*0.0.*--index-col"),
        ([True, False, True], "row 0.*True.*--index-col"),
        ([0, 2**31, 1], "row 1.*2147483648.*--index-col"),
        ([0, 1, -(2**31) - 1], "row 2.*-2147483649.*--index-col"),
    ],
)
def test_ids_that_are_not_unique_int32_are_refused(
    read: Callable[..., Any], ids: list[Any], message: str
) -> None:
    with pytest.raises((DataError, SourceError), match=message) as refusal:
        read(rows_of(3, id=ids), index_col="id")
    assert "\n" not in str(refusal.value)


def test_duplicates_are_found_in_a_stream_that_is_sampled_at_random() -> None:
    with pytest.raises(DataError, match="4 occurs more than once"):
        stream(rows_of(3, id=[4, 5, 4]), index_col="id", random_sample=True, limit=1)


def test_the_bounds_of_int32_are_ids() -> None:
    ids = [-(2**31), 0, 2**31 - 1]
    assert selected(rows_of(3, id=ids), index_col="id") == ids
    assert stream(rows_of(3, id=ids), index_col="id")[0].indices.tolist() == ids


def test_unsigned_ids_beyond_int64_are_refused() -> None:
    table = pa.table({"messages": [chat(0)], "id": pa.array([2**64 - 1], pa.uint64())})
    with pytest.raises(SourceError, match="18446744073709551615"):
        prepare_dataset(
            make(index_col="id"), datasets.Dataset(table), encoder_for(table.to_pylist(), "id")
        )


def test_a_set_of_ids_knows_what_it_holds_before_and_after_it_merges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(IdSet, "RECENT", 64)
    rng = np.random.default_rng(1)
    seen: set[int] = set()
    ids = IdSet()
    for value in [*rng.integers(-400, 400, 3000).tolist(), -(2**31), 2**31 - 1]:
        assert ids.add(value) == (value not in seen)
        seen.add(value)
    assert ids.merged.size > 64


# Workers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["prepare", "stream"])
def test_workers_share_the_selected_rows_without_overlap(read: str) -> None:
    rows = rows_of(300, subject=[str(n % 3) for n in range(300)])
    options: dict[str, Any] = {
        "start_offset": 20, "limit": 200, "subject_col": "subject", "sample_subject": {"1": 50},
    }  # fmt: skip
    whole = selected(rows, **options)
    shares = []
    for rank in range(4):
        mine = {**options, "rank": rank, "world_size": 4}
        windows = [prepare(rows, **mine)] if read == "prepare" else stream(rows, **mine)
        shares.append([n for window in windows for n in window.indices.tolist()])
    assert sorted(itertools.chain(*shares)) == whole
    # 200 rows on 4 workers: 50 ± 6.1; five deviations, the hash is fixed so it never flickers
    assert all(20 <= len(share) <= 80 for share in shares)


def test_a_row_belongs_to_the_same_worker_whatever_else_is_selected() -> None:
    rows = rows_of(100)
    few = selected(rows, limit=30, rank=1, world_size=3)
    many = selected(rows, rank=1, world_size=3)
    assert few == [n for n in many if n < 30]


def test_a_worker_without_rows_has_an_empty_share() -> None:
    shares = [prepare(rows_of(1), rank=rank, world_size=8).indices.size for rank in range(8)]
    assert sorted(shares) == [0] * 7 + [1]


# Lengths ------------------------------------------------------------------------------------------


def test_measured_lengths_are_those_of_the_encoded_rows() -> None:
    rows = rows_of(600, extra=["x"] * 600)  # enough for worker processes
    prepared = prepare(rows)
    dataset = ConversationDataset(prepared, encoder_for(rows))
    assert prepared.num_tokens is not None
    for position in range(0, 600, 37):
        row = dataset[position]
        assert isinstance(row, EncodedRow)
        assert row.input_ids.size == prepared.lengths[position]
        assert row.token_positions.size == prepared.num_tokens[position]


def test_conversations_above_the_maximum_are_left_out_and_counted() -> None:
    rows = [{"messages": chat(n, size=10 * n)} for n in range(6)]
    sizes = prepare(rows).lengths.tolist()
    limit = sizes[3]
    for windows in ([prepare(rows, max_seq_len=limit)], stream(rows, max_seq_len=limit)):
        assert windows[0].indices.tolist() == [0, 1, 2, 3]
        assert [(row.index, row.reason) for row in windows[0].skipped] == [
            (4, "too_long"), (5, "too_long"),
        ]  # fmt: skip
        assert str(sizes[4]) in windows[0].skipped[0].detail


def test_unusable_conversations_are_left_out_by_reason() -> None:
    rows = rows_of(4)
    rows[1] = {"messages": [{"role": "user", "content": "anyone?"}]}
    rows[2] = {"messages": []}
    for windows in ([prepare(rows)], stream(rows)):
        assert windows[0].indices.tolist() == [0, 3]
        assert [(row.index, row.reason) for row in windows[0].skipped] == [
            (1, "no_assistant"), (2, "empty"),
        ]  # fmt: skip


@pytest.mark.parametrize("count", [5, 600])
def test_a_template_that_cannot_be_used_is_refused_as_itself(count: int) -> None:
    rows = rows_of(count)
    encoder = RowEncoder(TOKENIZER, "{{ messages | length }}", resolve_columns(["messages"]))
    with pytest.raises(TemplateError) as refusal:
        prepare_dataset(make(), datasets.Dataset.from_list(rows), encoder)
    assert "\n" not in str(refusal.value)
    assert "--chat-template" in str(refusal.value)


def test_what_cannot_be_used_is_named_wherever_it_stands() -> None:
    rows = rows_of(150)
    for number in (3, 80, 149):
        rows[number]["messages"] = []
    prepared = prepare(rows)
    assert [row.index for row in prepared.skipped] == [3, 80, 149]
    assert prepared.indices.size == 147
    assert int(prepared.lengths.min()) > 0


def test_measuring_stops_when_told_to() -> None:
    source, encoder = datasets.Dataset.from_list(rows_of(5)), encoder_for(rows_of(1))
    with pytest.raises(StopRequested):
        prepare_dataset(make(), source, encoder, should_stop=lambda: True)


@pytest.mark.parametrize("random_sample", [False, True])
def test_passing_over_the_rows_of_a_stream_stops_when_told_to(random_sample: bool) -> None:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 20

    config = make(streaming=True, start_offset=90, limit=5, random_sample=random_sample)
    source = datasets.IterableDataset.from_generator(iter_rows, gen_kwargs={"rows": rows_of(100)})
    with pytest.raises(StopRequested):
        list(prepare_windows(config, source, encoder_for(rows_of(1)), should_stop=should_stop))
    assert asked == 20


def test_a_column_of_lengths_is_used_as_it_is() -> None:
    rows = rows_of(4, size=[40, 10, 30, 20])
    prepared = prepare(rows, length_col="size", max_seq_len=30)
    assert prepared.lengths.tolist() == [10, 30, 20]
    assert [row.reason for row in prepared.skipped] == ["too_long"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [([1, 0, 2], "row 1 holds 0"), ([1, None, 2], "nulls"), (["1", "2", "3"], "string")],
)
def test_a_column_that_holds_no_lengths_is_refused(sizes: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=f"--length-col size: .*{message}"):
        prepare(rows_of(3, size=sizes), length_col="size")


# Lengths computed before --------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path: Path) -> dict[str, Any]:
    """A source of 30 rows, two of them unusable and no spot checks, and its computed lengths."""
    TOKENIZER.save_pretrained(tmp_path / "model")
    rows = rows_of(30, id=[5 * n - 20 for n in range(30)])
    rows[4]["messages"] = []
    rows[10]["messages"] = [{"role": "user", "content": "anyone?"}]
    write_jsonl(tmp_path / "chats.jsonl", rows)
    options = {"model": str(tmp_path / "model"), "dataset": str(tmp_path / "chats.jsonl")}
    compute_lengths.compute_lengths(
        compute_lengths.LengthsConfig(
            **options, index_col="id", num_proc=1, output_dir=str(tmp_path / "lengths")
        )
    )
    name = str(tmp_path / "lengths" / "lengths.parquet")
    return {**options, "index_col": "id", "tokenized_dataset": name}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def open_and_prepare(options: dict[str, Any]) -> PreparedDataset:
    source = open_source(options["dataset"])
    config = make(**options)
    columns = resolve_columns(source.column_names, index_col=config.index_col)
    encoder = RowEncoder(
        TOKENIZER, TOKENIZER.chat_template, columns, config.include_think, config.include_end,
        config.max_seq_len,
    )  # fmt: skip
    return prepare_dataset(config, source, encoder)


def rewrite(path: str, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def test_each_of_several_workers_reads_the_lengths_once(
    measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    read_lengths = extract_logits.read_lengths

    def note(name: str, **options: Any) -> Any:
        read.append(name)
        return read_lengths(name, **options)

    whole = open_and_prepare(measured)
    monkeypatch.setattr(extract_logits, "read_lengths", note)
    shares = [open_and_prepare({**measured, "rank": rank, "world_size": 3}) for rank in range(3)]
    assert len(read) == 3
    found = {
        index: (length, tokens)
        for share in shares
        for index, length, tokens in zip(
            share.indices.tolist(), share.lengths.tolist(), share.num_tokens.tolist(), strict=True
        )
    }
    columns = (whole.indices, whole.lengths, whole.num_tokens)
    assert found == {index: (n, m) for index, n, m in zip(*map(list, columns), strict=True)}


def test_lengths_are_joined_on_the_index_in_whatever_order_they_come(
    measured: dict[str, Any],
) -> None:
    rewrite(
        measured["tokenized_dataset"], lambda t: t.take(np.random.default_rng(0).permutation(30))
    )
    joined = open_and_prepare(measured)
    alone = open_and_prepare({**measured, "tokenized_dataset": None})
    assert joined.indices.tolist() == alone.indices.tolist()
    assert joined.lengths.tolist() == alone.lengths.tolist()
    assert joined.num_tokens is not None
    assert alone.num_tokens is not None
    assert joined.num_tokens.tolist() == alone.num_tokens.tolist()


def test_conversations_with_length_0_are_skipped_by_their_reason(measured: dict[str, Any]) -> None:
    prepared = open_and_prepare(measured)
    assert [(row.index, row.reason) for row in prepared.skipped] == [
        (0, "empty"), (30, "no_assistant"),
    ]  # fmt: skip


def test_joined_lengths_respect_the_maximum(measured: dict[str, Any]) -> None:
    longest = int(open_and_prepare(measured).lengths.max())
    prepared = open_and_prepare({**measured, "max_seq_len": longest - 1})
    assert int(prepared.lengths.max()) < longest
    assert Counter(row.reason for row in prepared.skipped)["too_long"] >= 1


def test_a_folder_of_lengths_and_a_job_on_a_part_of_the_rows_are_fine(
    measured: dict[str, Any],
) -> None:
    folder = str(Path(measured["tokenized_dataset"]).parent)
    prepared = open_and_prepare({**measured, "tokenized_dataset": folder, "limit": 8})
    assert prepared.indices.size == 7


def test_lengths_of_a_moved_source_and_model_still_belong_to_it(
    measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(measured["dataset"]).parent
    monkeypatch.chdir(folder)
    open_and_prepare({**measured, "model": "model", "dataset": "./chats.jsonl"})
    Path("chats.jsonl").rename("renamed.jsonl")
    open_and_prepare({**measured, "dataset": "renamed.jsonl"})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "gpt2"}, ["model", "'gpt2'"]),
        ({"include_think": True}, ["include_think", "False", "True"]),
        ({"include_end": True}, ["include_end"]),
        ({"subset": "en"}, ["subset", "'en'"]),
        ({"split": "test"}, ["split", "'train'", "'test'"]),
        ({"index_col": None}, ["index_col", "'id'", "None"]),
    ],
)
def test_lengths_of_another_job_are_refused_with_the_difference(
    measured: dict[str, Any], change: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(DataError, match="measured for another job") as refusal:
        open_and_prepare({**measured, **change})
    for word in named:
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_lengths_of_another_template_are_refused(
    measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = TOKENIZER.chat_template
    monkeypatch.setattr(TOKENIZER, "chat_template", template.replace("\n", " "))
    with pytest.raises(DataError, match="chat_template_sha256"):
        open_and_prepare(measured)


def test_lengths_of_a_source_that_has_changed_since_are_refused(measured: dict[str, Any]) -> None:
    rows = rows_of(30, id=[5 * n - 20 for n in range(30)])
    write_jsonl(Path(measured["dataset"]), rows)
    with pytest.raises(DataError, match="dataset_revision"):
        open_and_prepare(measured)


def test_lengths_that_lack_conversations_are_refused(measured: dict[str, Any]) -> None:
    rewrite(measured["tokenized_dataset"], lambda table: table.slice(0, 28))
    with pytest.raises(DataError, match="lacks 2 of the 30 conversations, such as index 120"):
        open_and_prepare(measured)


def test_lengths_with_an_index_twice_are_refused(measured: dict[str, Any]) -> None:
    rewrite(
        measured["tokenized_dataset"], lambda table: pa.concat_tables([table, table.slice(0, 1)])
    )
    with pytest.raises(LogitsError, match="occurs twice"):
        open_and_prepare(measured)


def test_lengths_without_a_record_are_checked_against_the_text(measured: dict[str, Any]) -> None:
    def forget(table: pa.Table, shift: int = 0) -> pa.Table:
        lengths = [length and length + shift for length in table["length"].to_pylist()]
        return pa.table({"index": table["index"], "tokens": lengths})

    table = pq.read_table(measured["tokenized_dataset"])
    options = {**measured, "length_col": "tokens"}
    pq.write_table(forget(table), measured["tokenized_dataset"])
    assert open_and_prepare(options).num_tokens is None
    pq.write_table(forget(table, shift=1), measured["tokenized_dataset"])
    with pytest.raises(DataError, match=r"says \d+ tokens for index -?\d+, there are \d+"):
        open_and_prepare(options)


def test_lengths_that_are_not_there_are_refused(measured: dict[str, Any]) -> None:
    with pytest.raises(LogitsError, match="nowhere"):
        open_and_prepare({**measured, "tokenized_dataset": "./nowhere.parquet"})


def test_a_stream_says_that_it_measures_for_itself(caplog: pytest.LogCaptureFixture) -> None:
    stream(rows_of(3, size=[9, 9, 9]), length_col="size")
    assert "lengths computed before are not used" in caplog.text


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux")
def test_memory_of_a_stream_is_flat_while_the_source_grows_tenfold(tmp_path: Path) -> None:
    """2.6 MB and 26 MB: kept rows would show as 24 MB more, kept token ids alone as 15 MB.

    Memory is asked for at every window: what importing torch takes for a moment would hide a leak.
    """
    for count in (100, 1_000):
        with (tmp_path / f"{count}.jsonl").open("w", encoding="utf-8") as file:
            for n in range(count):
                row = {"messages": chat(n, size=2_000), "id": 7 * n, "notes": "n" * 24_000}
                file.write(json.dumps(row) + "\n")
    script = textwrap.dedent(
        f"""
        import os, sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import extract_logits as e
        from explore_logits import open_source, resolve_columns
        from tiny_teachers import tiny_tokenizer

        def resident_mb():
            pages = int(open("/proc/self/statm").read().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

        e.STREAM_WINDOW = 20
        tokenizer = tiny_tokenizer(300)
        columns = resolve_columns(["messages", "id"], index_col="id")
        encoder = e.RowEncoder(tokenizer, tokenizer.chat_template, columns)
        for count in (100, 1_000):
            config = e.ExtractionConfig(
                model="m", dataset=f"{tmp_path}/{{count}}.jsonl", output="./o", index_col="id",
                streaming=True, random_sample=True, limit=950,
            )
            source = open_source(config.dataset, streaming=True)
            rows, peak = 0, 0.0
            for window in e.prepare_windows(config, source, encoder):
                rows, peak = rows + window.indices.size, max(peak, resident_mb())
            print(rows, peak)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    few, before, many, after = map(float, done.stdout.split())
    print(f"with 100 rows {before:.1f} MB, with 1,000 rows {after:.1f} MB")
    assert (few, many) == (100, 950)
    assert after - before < 8


def test_every_length_of_a_small_job_is_checked_against_the_text(measured: dict[str, Any]) -> None:
    def shift_last(table: pa.Table) -> pa.Table:
        lengths = table["length"].to_pylist()
        lengths[7] += 1
        return pa.table({"index": table["index"], "length": lengths})

    rewrite(measured["tokenized_dataset"], shift_last)
    with pytest.raises(DataError, match="for index 15, there are"):
        open_and_prepare({**measured, "limit": 8})


def test_lengths_of_another_dataset_are_another_jobs_unless_its_files_are_the_same() -> None:
    found = {"dataset": "user/chats", "dataset_revision": "1234"}
    other = {"dataset": "user/talks", "dataset_revision": None}
    assert describe_differences(found, other) == ["dataset 'user/chats', here 'user/talks'"]
    assert describe_differences(found, {**other, "dataset_revision": "1234"}) == []

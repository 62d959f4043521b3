"""Sections 1 and 2 of `extract_logits.py`: which conversations, in which order, read how."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import explore_logits
import extract_logits
from explore_logits import ConfigError, ConversationColumns, ConversationError, LogitsError
from extract_logits import DataError, EncodedRow, ExtractionConfig, KnownLengths, SkippedRow

BY_ID = {"index_col": "id"}
IDS = [7, 3, -5, 12, 900, 41, 0, 8, 77, 5, 6, 2**31 - 1]
GROUPS = ["a", "b", None, "a", "c", "a", "b", None, "c", "a", "b", "c"]


def rows_of(ids: list[Any], groups: list[Any] | None = None) -> list[dict[str, Any]]:
    return [
        {"id": i, "messages": f"[{i}]", "subject": group, "size": 3 + n}
        for n, (i, group) in enumerate(zip(ids, groups or ["a"] * len(ids), strict=True))
    ]


def select(rows: list[dict[str, Any]], **options: Any) -> extract_logits.Selection:
    """Select from rows, read whole or as a stream."""
    config = ExtractionConfig(model="m", dataset="d", output="./o", **{**BY_ID, **options})
    source: Any = datasets.Dataset.from_list(rows)
    if config.streaming:
        source = source.to_iterable_dataset()
    columns = ConversationColumns(messages="messages", index=config.index_col)
    return extract_logits.prepare_dataset(config, source, columns)


def order(rows: Any = None, **options: Any) -> list[int]:
    """Return the ids of a selection in their order."""
    rows = rows or rows_of(IDS, GROUPS)
    return [index for part in select(rows, **options).parts(4) for index in part.ids.tolist()]


SELECTIONS: list[dict[str, Any]] = [
    {}, {"index_col": None}, {"start_offset": 3}, {"start_offset": 2, "limit": 7},
    {"random_sample": True, "limit": 6}, {"random_sample": True, "seed": 9, "start_offset": 4},
    {"subject_col": "subject", "sample_subject": {"a": 2, "": 1, "*": 1}},
    {"subject_col": "subject", "sample_subject": {"a": 2}, "random_sample": True, "limit": 5},
]  # fmt: skip


@pytest.mark.parametrize("options", SELECTIONS, ids=str)
def test_a_stream_gives_the_parts_of_a_source_that_is_read_whole(options):
    rows = rows_of(IDS, GROUPS)
    selections = select(rows, **options), select(rows, **options, streaming=True)
    for size in (1, 4, 100):
        found = []
        for selection in selections:
            parts = list(selection.parts(size))
            assert [part.number for part in parts] == list(range(len(parts)))
            read = [list(part.read(range(part.ids.size))) for part in parts]
            found.append(([part.ids.tolist() for part in parts], read))
        assert found[0] == found[1]
    (ids,), (rows,) = found[0]  # one part of 100
    if "index_col" not in options:
        assert [row["messages"] for row in rows] == [f"[{index}]" for index in ids]
        if not {"random_sample", "sample_subject"} & set(options):
            assert ids == IDS[options.get("start_offset", 0) :][: options.get("limit")]


@pytest.mark.parametrize("options", SELECTIONS, ids=str)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_higher_limit_only_appends(options, streaming):
    options = {**options, "streaming": streaming}
    every = order(**{**options, "limit": None})
    assert len(set(every)) == len(every) > 1
    for limit in range(1, len(every) + 2):
        assert order(**{**options, "limit": limit}) == every[:limit]


def test_the_order_at_random_depends_on_seed_and_ids_alone():
    one = order(random_sample=True)
    assert one == order(rows_of(IDS[::-1]), random_sample=True)
    assert one != order(random_sample=True, seed=1)
    assert one == sorted(IDS, key=lambda i: extract_logits.mix_hash(np.array([i]), seed=42)[0])


def test_groups_are_limited_in_the_order_of_the_selection():
    limits = {"a": 2, "": 0, "*": 1}
    assert order(subject_col="subject", sample_subject=limits) == [7, 3, 12, 900]
    with pytest.raises(ConfigError, match="no row is of the group 'B'; there are '', 'a', 'b'"):
        order(subject_col="subject", sample_subject={"B": 2, "*": 1})


@pytest.mark.parametrize("workers", [3, 20])
@pytest.mark.parametrize("streaming", [False, True])
def test_workers_share_the_parts_by_their_number(workers, streaming):
    found = {}
    for rank in range(workers):
        share = {"rank": rank, "world_size": workers, "streaming": streaming}
        for part in select(rows_of(IDS), **share).parts(2):
            assert part.number % workers == rank
            assert part.number not in found
            found[part.number] = part.ids.tolist()
    assert found == {number: IDS[2 * number : 2 * number + 2] for number in range(6)}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("ids", "says"),
    [([4, 5, 4], "4 occurs more than once"), (["x", "y"], "not an integer"),
     ([1.5, 2.0], "not an integer"), ([2**31, 1], "32 bits"), ([1, None], "not an integer")],
    ids=str,
)  # fmt: skip
def test_bad_ids_are_named(ids, says, streaming):
    with pytest.raises((DataError, explore_logits.SourceError), match=says):
        order(rows_of(ids), streaming=streaming)


@given(ids=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=300))
def test_a_set_of_ids_tells_each_repetition(ids):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extract_logits.IdSet, "RECENT", 7)
        seen, plain = extract_logits.IdSet(), set()
        for index in ids:
            assert seen.add(index) == (index not in plain)
            plain.add(index)


def test_lengths_are_joined_by_id_whatever_the_order_of_their_rows(tmp_path):
    ids, path = [9, 2, 5], str(tmp_path / "lengths.parquet")
    columns = {"index": ids, "length": [10 * index for index in ids], "num_tokens": ids}
    pq.write_table(pa.table(columns), path)
    for options, measured, lengths in (
        ({"tokenized_dataset": path}, explore_logits.read_lengths(path), [20, 50, 90]),
        ({"length_col": "size"}, None, [4, 5, 3]),
    ):
        selection = select(rows_of(ids), **options)
        known = extract_logits.find_lengths(selection.config, {}, selection, measured)
        places = known.places(np.array([2, 5, 9]))
        assert known.length[places].tolist() == lengths
        assert measured is None or known.num_tokens[places].tolist() == [2, 5, 9]
        with pytest.raises(DataError, match="lacks 1 of 2 conversations, such as index 4"):
            known.places(np.array([2, 4]))


# Windows ------------------------------------------------------------------------------------------


class Encoder:
    """Stands for the tokenizer: as many tokens as the row's number says."""

    max_seq_len = 30

    def __init__(self) -> None:
        self.seen: list[int] = []

    def encode_all(self, rows: Any) -> list[EncodedRow | SkippedRow]:
        self.seen += [index for index, row in rows if not isinstance(row, SkippedRow)]
        return [
            row if isinstance(row, SkippedRow) else EncodedRow(index, np.arange(index % 50 + 2), [])
            for index, row in rows
        ]


def windows_of(encoder: Any, lengths: Any) -> list[Any]:
    """Return windows of 100 conversations in parts of 70: more than are encoded at a time."""
    selection, take = select(rows_of(list(range(100)))), lambda _, ids: ids.tolist()
    options = {"rows_per_part": 70, "begin_part": take, "lengths": lengths}
    return list(extract_logits.ConversationDataset(selection, encoder, **options))


def test_too_long_by_known_lengths_is_not_tokenized():
    ids, encoder = np.arange(100), Encoder()
    known = KnownLengths("--length-col", ids, ids % 50 + 2)
    windows = windows_of(encoder, known)
    skipped = [row for window in windows for row in window.skipped]
    assert [row.index for window in windows for row in window.rows] == encoder.seen
    assert {row.index for row in skipped} == {n for n in range(100) if n % 50 + 2 > 30}
    assert encoder.seen == [n for n in range(100) if n % 50 + 2 <= 30]
    assert {row.reason for row in skipped} == {"too_long"}


def test_lengths_of_another_source_are_refused():
    known = KnownLengths("lengths", np.arange(100), np.full(100, 7))
    with pytest.raises(DataError, match="says 7 tokens for index 0, there are 2"):
        windows_of(Encoder(), known)


@pytest.mark.parametrize("processes", [0, 2])
def test_errors_come_after_all_that_came_before(processes):
    def batches() -> Any:
        yield from ([n] for n in range(5))
        raise LogitsError("the source is broken")

    made: list[Any] = []
    ahead = extract_logits.run_ahead(lambda batch: batch, batches(), processes=processes)
    with pytest.raises(LogitsError, match="the source is broken"):
        made.extend(ahead)
    assert made == [[n] for n in range(5)]


@pytest.mark.parametrize("again", [rows_of(IDS[:-1]), rows_of([1, *IDS[1:]])])
def test_a_stream_that_has_changed_when_it_is_read_again_is_refused(again):
    chosen = select(rows_of(IDS), streaming=True, random_sample=True)
    passes = iter([rows_of(IDS), again])
    source = type("Source", (), {"__iter__": lambda _: iter(next(passes))})()
    with pytest.raises(DataError, match="it has changed"):
        list(replace(chosen, source=source).parts(4))


@pytest.mark.parametrize(
    ("ids", "limit", "reason"),
    [([1, 2, 3], 3, None), ([1, 2, 3], 2, "too_long"), ([], None, "no_assistant"),
     ([1, 2**18 - 1], None, None), ([1, 2**18], None, "id_too_large")],
)  # fmt: skip
def test_a_conversation_is_encoded_or_says_why_not(ids, limit, reason):
    def encode(row: Any, *, max_tokens: int | None = None) -> Any:
        if not ids:
            raise ConversationError("no_assistant", "nobody answers")
        found = np.asarray(ids, np.int32)
        return SimpleNamespace(input_ids=found, token_positions=np.ones(1, int), notes=())

    made = extract_logits.RowEncoder(SimpleNamespace(encode=encode), limit).encode({}, 9)
    assert made.index == 9
    assert (made.reason if isinstance(made, SkippedRow) else None) == reason

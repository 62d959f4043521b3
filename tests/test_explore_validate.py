"""Validation: an output that is sound passes, and every kind of damage is caught and named."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_script
from small_output import (
    SETTINGS,
    random_rows,
    rows_to_table,
    write_checkpoint,
    write_output,
    write_parts,
)

import explore_logits as explore
from explore_logits import (
    METADATA_PART,
    ValidationReport,
    hash_ids,
    load_extraction_config,
    pack_indices,
    unpack_indices,
    validate_output,
)

STORED = SETTINGS | {"store_tokens": True}
ROWS = random_rows(18, settings=STORED, seed=8)
SHARD, ROW = "data/part-00001.parquet", 5  # where the damage is done: row 13 of the output

Row = dict[str, Any]


def first_token(row: Row, *, least: int = 2) -> tuple[int, int]:
    """Return a token whose nucleus holds at least `least` entries, and where they begin."""
    starts = np.concatenate(([0], np.cumsum(row["top_counts"])))
    token = int(np.flatnonzero(np.array(row["top_counts"]) >= least)[0])
    return token, int(starts[token])


def change_ids(row: Row, part: str, change: Callable[[np.ndarray], None]) -> None:
    ids = np.array(unpack_indices(row[f"{part}_indices_low"], row[f"{part}_indices_high"]))
    change(ids)
    low, high = pack_indices(ids)
    row[f"{part}_indices_low"], row[f"{part}_indices_high"] = low.tolist(), high


def set_item(name: str, place: int, value: Any) -> Callable[[Row], None]:
    def damage(row: Row) -> None:
        row[name] = [*row[name]]
        row[name][place] = value

    return damage


def drop_item(name: str) -> Callable[[Row], None]:
    def damage(row: Row) -> None:
        row[name] = row[name][:-1]

    return damage


def swap_levels(row: Row) -> None:
    _, at = first_token(row, least=4)
    levels = [*row["top_logits_quantized"]]
    levels[at + 1], levels[at + 2] = levels[at + 2], levels[at + 1]
    row["top_logits_quantized"] = levels


def repeat_nucleus_id(row: Row) -> None:
    _, at = first_token(row)
    change_ids(row, "top", lambda ids: ids.__setitem__(at + 1, ids[at]))


def tail_from_nucleus(row: Row) -> None:
    top = unpack_indices(row["top_indices_low"], row["top_indices_high"])
    change_ids(row, "sampled", lambda ids: ids.__setitem__(0, top[0]))


def repeat_tail_id(row: Row) -> None:
    change_ids(row, "sampled", lambda ids: ids.__setitem__(1, ids[0]))


def id_beyond(part: str) -> Callable[[Row], None]:
    def damage(row: Row) -> None:
        change_ids(row, part, lambda ids: ids.__setitem__(-1, SETTINGS["vocab_size"] + 7))

    return damage


def low_top_level(row: Row) -> None:
    _, at = first_token(row)
    row["top_logits_quantized"] = [*row["top_logits_quantized"]]
    row["top_logits_quantized"][at] = 65_534


def shift_range(name: str, by: float) -> Callable[[Row], None]:
    def damage(row: Row) -> None:
        token, _ = first_token(row)
        for end in ("min", "max"):
            values = [*row[f"{name}_{end}"]]
            values[token] += by
            row[f"{name}_{end}"] = values

    return damage


def swap_range(row: Row) -> None:
    token, _ = first_token(row)
    low, high = [*row["top_min"]], [*row["top_max"]]
    low[token], high[token] = high[token], low[token]
    row["top_min"], row["top_max"] = low, high


def unordered_ties(row: Row) -> None:
    token, at = first_token(row)
    size = row["top_counts"][token]
    row["top_logits_quantized"] = [*row["top_logits_quantized"]]
    row["top_logits_quantized"][at : at + size] = [0] * size
    change_ids(row, "top", lambda ids: ids[at : at + size].sort())
    change_ids(row, "top", lambda ids: ids.__setitem__(slice(at, at + 2), ids[[at + 1, at]]))
    row["top_min"] = [*row["top_min"]]
    row["top_min"][token] = row["top_max"][token]


def shrink_nucleus(row: Row) -> None:
    """Drop the last entry of an uncapped nucleus, ids, level and count."""
    counts = np.array(row["top_counts"])
    token = int(np.flatnonzero((counts >= 2) & (counts < SETTINGS["top_p_max"]))[0])
    end = int(counts[: token + 1].sum())
    ids = unpack_indices(row["top_indices_low"], row["top_indices_high"])
    low, high = pack_indices(np.delete(ids, end - 1))
    row["top_indices_low"], row["top_indices_high"] = low.tolist(), high
    levels = np.delete(row["top_logits_quantized"], end - 1)
    levels[end - 2] = 0
    row["top_logits_quantized"] = levels.tolist()
    counts[token] -= 1
    row["top_counts"] = counts.tolist()


def lower_logsumexp(by: float) -> Callable[[Row], None]:
    def damage(row: Row) -> None:
        row["logsumexp"] = [value - by for value in row["logsumexp"]]

    return damage


def lower_tail(row: Row) -> None:
    row["sampled_logits_quantized"] = [
        min(level, 60_000) for level in row["sampled_logits_quantized"]
    ]


def split_tail(row: Row) -> None:
    for name in ("sampled_indices_low", "sampled_logits_quantized"):
        row[name] = row[name][: len(row[name]) // 2]
    row["sampled_indices_high"] = pack_indices(row["sampled_indices_low"])[1]


def empty_row(row: Row) -> None:
    for name in row:
        if isinstance(row[name], list):
            row[name] = []
    row |= {"num_tokens": 0, "top_indices_high": b"", "sampled_indices_high": b""}


MUTATIONS: dict[str, tuple[str, Callable[[Row], None]]] = {
    "a null list": ("null", lambda row: row.update(top_min=None)),
    "a null inside a list": ("null", set_item("logsumexp", 0, None)),
    "num_tokens too large": ("length", lambda row: row.update(num_tokens=2**31 - 1)),
    "no tokens at all": ("length", empty_row),
    "a count missing": ("length", drop_item("top_counts")),
    "a low id missing": ("length", drop_item("top_indices_low")),
    "a byte of high bits missing": ("length", drop_item("top_indices_high")),
    "a level missing": ("length", drop_item("top_logits_quantized")),
    "a minimum missing": ("length", drop_item("top_min")),
    "a maximum missing": ("length", drop_item("top_max")),
    "a log-sum-exp missing": ("length", drop_item("logsumexp")),
    "a tail id missing": ("length", drop_item("sampled_indices_low")),
    "a tail level missing": ("length", drop_item("sampled_logits_quantized")),
    "a tail minimum missing": ("length", drop_item("sampled_min")),
    "a position missing": ("length", drop_item("token_positions")),
    "fewer tail tokens than drawn": ("tail count", split_tail),
    "a conversation twice": ("twice", lambda row: row.update(index=ROWS[2]["index"])),
    "a nucleus id beyond the vocabulary": ("id", id_beyond("top")),
    "a tail id beyond the vocabulary": ("id", id_beyond("sampled")),
    "an id twice in the nucleus": ("duplicate", repeat_nucleus_id),
    "an id twice in the tail": ("duplicate", repeat_tail_id),
    "a nucleus id in the tail": ("duplicate", tail_from_nucleus),
    "ascending nucleus logits": ("order", swap_levels),
    "ties with descending ids": ("ties", unordered_ties),
    "levels that do not reach the maximum": ("quantization", low_top_level),
    "tail levels that do not reach the maximum": ("quantization", lower_tail),
    "a range upside down": ("range", swap_range),
    "a range that is not a number": ("range", set_item("top_max", 0, float("nan"))),
    "an infinite range": ("range", set_item("sampled_max", 0, float("inf"))),
    "a tail above the nucleus": ("tail", shift_range("sampled", 30.0)),
    "a log-sum-exp that is not finite": ("logsumexp", set_item("logsumexp", 0, float("-inf"))),
    "a log-sum-exp below the largest logit": ("logsumexp", lower_logsumexp(40.0)),
    "probabilities over one": ("sum", lower_logsumexp(0.5)),
    "a nucleus short of top_p": ("mass", shrink_nucleus),
    "a nucleus with less mass": ("mass", lower_logsumexp(-0.2)),
    "a nucleus larger than needed": ("minimal", shift_range("top", 0.5)),
    "a position past the text": ("positions", set_item("token_positions", -1, 10**6)),
    "a position at the very start": ("positions", set_item("token_positions", 0, 0)),
    "positions that do not ascend": ("positions", set_item("token_positions", -1, 1)),
    "a text token beyond the vocabulary": ("text", set_item("input_ids", 0, 10**6)),
}


def damaged_output(folder: Path, damage: Callable[[Row], None]) -> Path:
    rows = [dict(row) for row in ROWS]
    damage(rows[8 + ROW])
    return write_output(folder, rows, settings=STORED)


def test_a_sound_output_has_no_violations(tmp_path: Path) -> None:
    for number, changes in enumerate((STORED, SETTINGS, {**SETTINGS, "logit_bits": 6},
                                      {**SETTINGS, "sampled_n": 0}, {**SETTINGS, "top_p": 1.0,
                                      "top_p_max": 255})):  # fmt: skip
        rows = random_rows(12, settings=changes, seed=number)
        report = validate_output(write_output(tmp_path / str(number), rows, settings=changes))
        assert report.ok, str(report)
        assert (report.shards, report.rows) == (2, 12)


@pytest.mark.parametrize(("rule", "damage"), MUTATIONS.values(), ids=MUTATIONS.keys())
def test_damage_to_a_row_is_caught_and_named(
    tmp_path: Path, rule: str, damage: Callable[[Row], None]
) -> None:
    report = validate_output(damaged_output(tmp_path, damage))
    assert not report.ok
    assert rule in report.counts, str(report)
    named = [violation for violation in report.violations if violation.rule == rule]
    assert {(violation.shard, violation.row) for violation in named} == {(SHARD, ROW)}
    assert all(violation.row in (ROW, None) for violation in report.violations)
    assert report.rows == 18


# Files --------------------------------------------------------------------------------------------


def rewrite(shard: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(shard)), shard)


def swap_columns(table: pa.Table) -> pa.Table:
    names = table.column_names
    names[2], names[4] = names[4], names[2]
    return table.select(names)


def retype(table: pa.Table) -> pa.Table:
    place = table.column_names.index("top_min")
    return table.set_column(place, "top_min", table["top_min"].cast(pa.list_(pa.float64())))


def other_settings(table: pa.Table) -> pa.Table:
    metadata = rows_to_table([], settings=STORED | {"seed": 43, "top_p": 0.9}).schema.metadata
    return table.replace_schema_metadata(metadata)


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-200])


def scribble(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[40:400] = bytes(360)
    shard.write_bytes(bytes(data))


FILE_DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "truncated": ("unreadable", cut),
    "empty file": ("unreadable", lambda shard: shard.write_bytes(b"")),
    "no Parquet at all": ("unreadable", lambda shard: shard.write_text("hello " * 100)),
    "damaged pages": ("unreadable", scribble),
    "no rows": ("empty", lambda s: rewrite(s, lambda table: table.slice(0, 0))),
    "a column missing": ("columns", lambda s: rewrite(s, lambda t: t.drop_columns(["top_max"]))),
    "columns in another order": ("columns", lambda s: rewrite(s, swap_columns)),
    "a column too many": (
        "columns",
        lambda s: rewrite(s, lambda t: t.append_column("extra", t["index"])),
    ),
    "another type": ("type", lambda s: rewrite(s, retype)),
    "no metadata": (
        "metadata",
        lambda s: rewrite(s, lambda t: t.replace_schema_metadata(None)),
    ),
    "another run's settings": ("settings", lambda s: rewrite(s, other_settings)),
    "the shard twice": (
        "twice",
        lambda s: (s.parent / "part-00007.parquet").write_bytes(s.read_bytes()),
    ),
}


@pytest.mark.parametrize(("rule", "damage"), FILE_DAMAGE.values(), ids=FILE_DAMAGE.keys())
def test_damage_to_a_file_is_caught_and_named(
    tmp_path: Path, rule: str, damage: Callable[[Path], Any]
) -> None:
    damage(write_output(tmp_path, ROWS, settings=STORED) / SHARD)
    report = validate_output(tmp_path)
    assert rule in report.counts, str(report)
    shards = {violation.shard for violation in report.violations}
    assert shards == {"data/part-00007.parquet" if rule == "twice" else SHARD}


@pytest.mark.parametrize(
    "change",
    [{"top_p": "most"}, {"logit_bits": 10**9}, {"vocab_size": [5]}, {"top_p_max": True},
     {"sampled_n": -1}, {"top_p": float("nan")}, {"model": 7}, {"messages_col": ["a"]}],
)  # fmt: skip
def test_absurd_settings_are_refused_by_name(tmp_path: Path, change: Row) -> None:
    output = write_output(tmp_path, ROWS, settings=STORED)
    shard = output / SHARD
    metadata = rows_to_table([], settings=STORED | change).schema.metadata
    rewrite(shard, lambda table: table.replace_schema_metadata(metadata))
    report = validate_output(output)
    assert report.counts == {"settings": 1}
    assert next(iter(change)) in str(report)
    assert report.rows == 18
    with pytest.raises(explore.FormatError, match=next(iter(change))):
        explore.compute_dataset_stats([shard])
    assert explore.get_sample([shard])["index"] == 8


def test_random_damage_never_ends_in_anything_but_a_report(tmp_path: Path) -> None:
    # 150 files with 1 to 20 bytes changed, half of them in the footer; seeded.
    output = write_output(tmp_path, ROWS[:6], settings=STORED)
    shard = output / "data/part-00000.parquet"
    sound = shard.read_bytes()
    footer = len(sound) - 8 - int.from_bytes(sound[-8:-4], "little")
    caught = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        data = np.frombuffer(sound, np.uint8).copy()
        places = rng.integers(footer if seed % 2 else 0, data.size, rng.choice([1, 2, 5, 20]))
        data[places] = rng.integers(0, 256, places.size)
        shard.write_bytes(data.tobytes())
        caught += not validate_output(output).ok
        for read in (explore.compute_dataset_stats, explore.analyze_nucleus_sizes):
            with contextlib.suppress(explore.LogitsError):
                read(output)
    assert caught > 100


def test_shards_that_the_checkpoint_lists_otherwise_are_named(tmp_path: Path) -> None:
    output = write_output(tmp_path, ROWS, settings=STORED)
    sizes = {f"data/{path.name}": path.stat().st_size for path in (output / "data").iterdir()}
    shards = {path: {"bytes": size} for path, size in sizes.items()}
    for change, wrong in (
        ({}, []),
        ({SHARD: {"bytes": 5}}, [SHARD]),
        ({"data/part-00009.parquet": {"bytes": 5}}, ["data/part-00009.parquet"]),
    ):
        (output / "checkpoint.json").write_text(json.dumps({"shards": shards | change}))
        report = validate_output(output)
        assert [violation.shard for violation in report.violations] == wrong
        assert set(report.counts) <= {"checkpoint"}
    del shards[SHARD]
    for text in (json.dumps({"shards": shards}), "[]", "{"):
        (output / "checkpoint.json").write_text(text)
        assert validate_output(output).counts == {"checkpoint": 1}


def test_several_kinds_of_damage_are_all_reported(tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS]
    chosen = [MUTATIONS[name] for name in ("a null list", "ascending nucleus logits")]
    chosen += [MUTATIONS["an id twice in the tail"], MUTATIONS["a position missing"]]
    places = (0, 8 + ROW, 16, 17)
    for place, (_, damage) in zip(places, chosen, strict=True):
        damage(rows[place])
    output = write_output(tmp_path, rows, settings=STORED)
    (output / "extraction_config.json").write_text("{not json")
    report = validate_output(output)
    assert {"settings", *(rule for rule, _ in chosen)} <= report.counts.keys()
    shards = {f"data/part-0000{number}.parquet" for number in range(3)}
    assert {v.shard for v in report.violations} == {*shards, "extraction_config.json"}


def test_a_flood_of_violations_is_counted_but_not_listed(tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS]
    for row in rows:
        lower_logsumexp(40.0)(row)
    report = validate_output(write_output(tmp_path, rows, settings=STORED))
    tokens = sum(row["num_tokens"] for row in rows)
    assert report.counts["logsumexp"] == tokens
    assert len(report.violations) <= 3 * 10 * len(report.counts)
    assert f"logsumexp {tokens}" in str(report)


# Parts --------------------------------------------------------------------------------------------

SKIPPED = {3: "too_long", 17: "unusable"}
PART_ROWS = [row for row in ROWS if row["index"] not in SKIPPED]


def in_parts(folder: Path, **changes: Any) -> Path:
    how = {"settings": STORED, "skipped": SKIPPED, "rows_per_part": 6, **changes}
    return write_parts(folder, PART_ROWS, **how)


def change_part(shard: Path, **changes: Any) -> None:
    """Write a part's file again with other words about itself."""
    table = pq.read_table(shard)
    part = {**json.loads(table.schema.metadata[METADATA_PART]), **changes}
    metadata = {**table.schema.metadata, METADATA_PART: json.dumps(part).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), shard)


def test_what_a_writer_added_after_the_schema_is_read_as_well(tmp_path: Path) -> None:
    """Such entries stand in the footer alone, not in the copy of the schema that Arrow reads."""
    output = in_parts(tmp_path)
    sizes = {}
    for shard in output.glob("data/*.parquet"):
        table = pq.read_table(shard)
        entries = table.schema.metadata
        table = table.replace_schema_metadata(None)
        with pq.ParquetWriter(shard, table.schema) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata(entries)
        assert not pq.read_schema(shard).metadata
        sizes[int(shard.stem.removeprefix("part-"))] = shard.stat().st_size
    checkpoint = json.loads((output / "checkpoint.json").read_text())
    checkpoint["parts"]["bytes"] = [sizes[number] for number in checkpoint["parts"]["number"]]
    (output / "checkpoint.json").write_text(json.dumps(checkpoint))
    (output / "extraction_config.json").unlink()
    assert validate_output(output).violations == []
    assert load_extraction_config(output)["rows_per_part"] == 6


def test_a_sound_output_in_parts_has_no_violations(tmp_path: Path) -> None:
    everyone = dict.fromkeys(range(6, 12), "too_long")
    rows = [row for row in ROWS if row["index"] not in everyone]
    empty = write_parts(tmp_path / "a", rows, settings=STORED, skipped=everyone, rows_per_part=6)
    for output in (empty, in_parts(tmp_path / "b", workers=3, first_part=8999)):
        report = validate_output(output)
        assert report.ok, str(report)
        assert report.shards == 3
    assert pq.read_metadata(empty / "data/part-00001.parquet").num_rows == 0


PART_DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "another number": ("part", lambda s: change_part(s, number=7)),
    "other ids": ("part", lambda s: change_part(s, ids=hash_ids([1, 2]))),
    "rows it does not hold": ("part", lambda s: change_part(s, rows=7)),
    "tokens it does not hold": ("part", lambda s: change_part(s, tokens=7)),
    "another sum of nuclei": ("part", lambda s: change_part(s, nucleus=7)),
    "capped nuclei it does not hold": ("part", lambda s: change_part(s, capped=7)),
    "more selected than found": ("part", lambda s: change_part(s, conversations=9)),
    "a count that is none": ("part", lambda s: change_part(s, rows="six")),
    "reasons that are none": ("part", lambda s: change_part(s, skipped=["too_long"])),
    "a row that was skipped elsewhere": (
        "twice",
        lambda s: change_part(s, skipped={"3": "too_long"}, conversations=7),
    ),
    "rows in another order": ("part", lambda s: rewrite(s, lambda t: t.take([5, 4, 3, 2, 1, 0]))),
    "no word about the part": (
        "metadata",
        lambda s: rewrite(
            s,
            lambda t: t.replace_schema_metadata(
                {k: v for k, v in t.schema.metadata.items() if k != METADATA_PART}
            ),
        ),
    ),
    "the name of another part": ("part", lambda s: s.rename(s.with_name("part-00009.parquet"))),
}


@pytest.mark.parametrize(("rule", "damage"), PART_DAMAGE.values(), ids=PART_DAMAGE.keys())
def test_damage_to_what_a_part_says_is_caught_and_named(
    tmp_path: Path, rule: str, damage: Callable[[Path], Any]
) -> None:
    output = in_parts(tmp_path)
    for checkpoint in output.glob("checkpoint*"):
        checkpoint.unlink()
    damage(output / SHARD)
    report = validate_output(output)
    assert rule in report.counts, str(report)
    assert {v.shard for v in report.violations} <= {SHARD, "data/part-00009.parquet"}


def test_without_an_order_that_is_known_only_whole_parts_are_compared_with_their_hash(
    tmp_path: Path,
) -> None:
    shuffled = STORED | {"random_sample": True}
    output = in_parts(tmp_path / "a", settings=shuffled)
    rewrite(output / "data/part-00000.parquet", lambda t: t.take([1, 0, 2, 3, 4]))
    assert validate_output(output).counts == {"checkpoint": 1}  # by its size alone
    rewrite(output / SHARD, lambda t: t.take([1, 0, 2, 3, 4, 5]))
    assert validate_output(output).counts["part"] == 1


def test_a_checkpoint_that_lists_other_parts_is_named(tmp_path: Path) -> None:
    output = in_parts(tmp_path)
    content = json.loads((output / "checkpoint.json").read_text())["parts"]
    records = [dict(zip(content, row, strict=True)) for row in zip(*content.values(), strict=True)]
    for record in records:
        record["skipped"] = {}
    for change in ({"bytes": 5}, {"ids": "0" * 16}, {"tokens": 1}):
        changed = [{**r, **(change if r["number"] == 1 else {})} for r in records]
        write_checkpoint(output, changed, "")
        report = validate_output(output)
        assert report.counts == {"checkpoint": 1}, str(report)
        assert report.violations[0].shard == SHARD
    write_checkpoint(output, records[:2], "")
    assert validate_output(output).violations[0].shard == "data/part-00002.parquet"


def test_ten_thousand_violations_cost_what_ten_thousand_do() -> None:
    # Work is counted, not timed: the kept violations must never be searched.
    class Unsearchable(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("searched")

    report = ValidationReport("x", violations=Unsearchable())
    for shard in range(10_000):
        report.add(f"part-{shard:05d}", "order", "nucleus logits ascend")
    assert len(report.violations) == report.counts["order"] == 10_000


def test_hostile_names_do_not_reach_the_terminal() -> None:
    report = ValidationReport("x")
    report.add("data/a.parquet", "settings", "\x1b[2Jgone", row=1)
    assert "\x1b" not in str(report)


def test_the_command_exits_3_and_names_shard_row_token_and_rule(tmp_path: Path) -> None:
    done = run_script("explore_logits.py", damaged_output(tmp_path, swap_levels), "--validate")
    assert done.code == 3
    assert f"{SHARD}, row {ROW}, token " in done.stdout
    assert "order: nucleus logits ascend" in done.stdout
    assert done.summary["violations"] == {"order": 1}


def test_what_is_asked_for_together_is_done_together(tmp_path: Path) -> None:
    output = write_output(tmp_path / "one", ROWS, settings=STORED)
    done = run_script("explore_logits.py", output, "--validate", "--stats", "--compare", output)
    assert done.code == 0, done.stderr
    assert "valid: 3 shards, 18 rows" in done.stdout
    assert "covered by nucleus" in done.stdout
    assert "rows in common      18" in done.stdout
    assert done.summary["bytes_per_token"] > 0
    assert (done.summary["violations"], done.summary["common_rows"]) == ({}, 18)

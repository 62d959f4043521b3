"""Validation: an output that is sound passes, and every kind of damage is caught and named."""

import functools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_output import SETTINGS, STORED, random_rows, write_checkpoint, write_output, write_parts

import explore_logits as explore
from explore_logits import METADATA_PART, validate_output

ROWS = random_rows(18, settings=STORED, seed=8)
SHARD, ROW = "data/part-00001.parquet", 5  # where the damage is done: row 13 of the output
MORE = "data/part-00009.parquet"  # a shard that is not there
HURT = ROWS[8 + ROW]
SIZES = np.array(HURT["top_counts"])
TOKEN = int(np.flatnonzero((SIZES >= 4) & (SETTINGS["top_p_max"] > SIZES))[0])  # of many entries
AT, END = (int(SIZES[:n].sum()) for n in (TOKEN, TOKEN + 1))  # where they stand
TOP_IDS, TAIL_IDS = (
    explore.unpack_indices(HURT[f"{part}_indices_low"], HURT[f"{part}_indices_high"])
    for part in ("top", "sampled")
)
LEVELS = HURT["top_logits_quantized"]


def in_shards(folder):
    """Write an output as version 0.1 laid it out."""
    return write_output(folder, ROWS, settings=STORED)


def in_parts(folder, **changes):
    how = {"settings": STORED, "skipped": {3: "too_long", 17: "unusable"}, "rows_per_part": 6}
    rows = [row for row in ROWS if row["index"] not in how["skipped"]]
    return write_parts(folder, rows, **how | changes)


def put(values, *changes):
    """Return values with others at some places."""
    places = {place % len(values): value for place, value in changes}
    return [places.get(place, value) for place, value in enumerate(values)]


def ids(part, values):
    """Return the columns of a part's ids."""
    low, high = explore.pack_indices(np.asarray(values))
    return {f"{part}_indices_low": low.tolist(), f"{part}_indices_high": high}


def item(name, place, value):
    return {name: put(HURT[name], (place, value))}


def shift(by, *names):
    return {name: [value + by for value in HURT[name]] for name in names or ["logsumexp"]}


EMPTY_ROW = {name: [] for name, value in HURT.items() if isinstance(value, list)}
TIED = {  # every level is 0, ids ascend but for the first two
    **ids("top", [*TOP_IDS[:AT], *np.roll(np.sort(TOP_IDS[AT:END])[:2], 1),
                  *np.sort(TOP_IDS[AT:END])[2:], *TOP_IDS[END:]]),
    "top_logits_quantized": [*LEVELS[:AT], *[0] * (END - AT), *LEVELS[END:]],
    **item("top_min", TOKEN, HURT["top_max"][TOKEN]),
}  # fmt: skip
HALF = TAIL_IDS.size // 2
DAMAGE = {  # what is wrong: the rule that says so, and what the row holds instead
    "a null list": ("null", {"top_min": None}),
    "a null inside a list": ("null", item("logsumexp", 0, None)),
    "num_tokens too large": ("length", {"num_tokens": 2**31 - 1}),
    "no tokens at all": ("length", {
        **EMPTY_ROW, "num_tokens": 0, "top_indices_high": b"", "sampled_indices_high": b""}),
    "counts too short": ("length", {"top_counts": HURT["top_counts"][:-1]}),
    "tail ids too short": ("length", {"sampled_indices_low": HURT["sampled_indices_low"][:-1]}),
    "fewer tail tokens than drawn": ("tail count", {
        **ids("sampled", TAIL_IDS[:HALF]),
        "sampled_logits_quantized": HURT["sampled_logits_quantized"][:HALF]}),
    "a conversation twice": ("twice", {"index": ROWS[2]["index"]}),
    "a nucleus id beyond the vocabulary": ("id", ids("top", put(TOP_IDS, (-1, 607)))),
    "a tail id beyond the vocabulary": ("id", ids("sampled", put(TAIL_IDS, (-1, 607)))),
    "an id twice in the nucleus": ("duplicate", ids("top", put(TOP_IDS, (AT + 1, TOP_IDS[AT])))),
    "a nucleus id in the tail": ("duplicate", ids("sampled", put(TAIL_IDS, (0, TOP_IDS[0])))),
    "ascending nucleus logits": ("order", {
        "top_logits_quantized": put(LEVELS, (AT + 1, LEVELS[AT + 2]), (AT + 2, LEVELS[AT + 1]))}),
    "ties with descending ids": ("ties", TIED),
    "levels that do not reach the maximum": ("quantization", {
        "top_logits_quantized": put(LEVELS, (AT, 65_534))}),
    "a range upside down": ("range", {
        **item("top_min", TOKEN, HURT["top_max"][TOKEN]),
        **item("top_max", TOKEN, HURT["top_min"][TOKEN])}),
    "a range that is not a number": ("range", item("top_max", 0, float("nan"))),
    "a tail above the nucleus": ("tail", shift(30.0, "sampled_min", "sampled_max")),
    "a log-sum-exp that is not finite": ("logsumexp", item("logsumexp", 0, float("-inf"))),
    "a log-sum-exp below the largest logit": ("logsumexp", shift(-40.0)),
    "probabilities over one": ("sum", shift(-0.5)),
    "a nucleus with less mass": ("mass", shift(0.2)),
    "a log-sum-exp that no vocabulary has": ("sum", shift(20.0)),
    "a nucleus larger than needed": ("minimal", shift(0.5, "top_min", "top_max")),
    "a position past the text": ("positions", item("token_positions", -1, 10**6)),
    "a position at the very start": ("positions", item("token_positions", 0, 0)),
    "a text token beyond the vocabulary": ("text", item("input_ids", 0, 10**6)),
}  # fmt: skip


def test_a_sound_output_has_no_violations(tmp_path):
    others = [{"logit_bits": bits} for bits in (6, 15, 16)]
    others += [{"sampled_n": 0}, {"top_p": 1.0, "top_p_max": 255}]
    for number, settings in enumerate((STORED, *(SETTINGS | other for other in others))):
        rows = random_rows(12, settings=settings, seed=number)
        report = validate_output(write_output(tmp_path / str(number), rows, settings=settings))
        assert report.ok, str(report)
        assert (report.shards, report.rows) == (2, 12)
    everyone = dict.fromkeys(range(6, 12), "too_long")
    rows = [row for row in ROWS if row["index"] not in everyone]
    empty = write_parts(tmp_path / "a", rows, settings=STORED, skipped=everyone, rows_per_part=6)
    for output in (empty, in_parts(tmp_path / "b", workers=3, first_part=8999)):
        report = validate_output(output)
        assert report.ok, str(report)
        assert report.shards == 3
    assert pq.read_metadata(empty / "data/part-00001.parquet").num_rows == 0


@pytest.mark.parametrize(("rule", "change"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_to_a_row_is_caught_and_named(tmp_path, rule, change):
    rows = put(ROWS, (8 + ROW, HURT | change))
    report = validate_output(write_output(tmp_path, rows, settings=STORED))
    assert not report.ok
    assert rule in report.counts, str(report)
    named = [violation for violation in report.violations if violation.rule == rule]
    assert {(violation.shard, violation.row) for violation in named} == {(SHARD, ROW)}
    assert all(violation.row in (ROW, None) for violation in report.violations)
    assert report.rows == 18


def rewrite(shard, change):
    pq.write_table(change(pq.read_table(shard)), shard)


def describe(shard, change):
    """Write a shard again with other metadata."""
    rewrite(shard, lambda table: table.replace_schema_metadata(change(table.schema.metadata)))


def change_settings(shard, changes):
    schema = explore.shard_schema(store_tokens=True, settings=STORED | changes)
    describe(shard, lambda _: schema.metadata)


def change_part(shard, **changes):
    def change(metadata):
        part = json.loads(metadata[METADATA_PART]) | changes
        return metadata | {METADATA_PART: json.dumps(part).encode()}

    describe(shard, change)


def retype(table):
    place = table.column_names.index("top_min")
    return table.set_column(place, "top_min", table["top_min"].cast(pa.list_(pa.float64())))


SHARD_DAMAGE = {
    "truncated": ("unreadable", lambda s: s.write_bytes(s.read_bytes()[:-200])),
    "damaged pages": ("unreadable", lambda s: s.write_bytes(
        s.read_bytes()[:40] + bytes(360) + s.read_bytes()[400:])),
    "no rows": ("empty", lambda s: rewrite(s, lambda t: t.slice(0, 0))),
    "a column missing": ("columns", lambda s: rewrite(s, lambda t: t.drop_columns(["top_max"]))),
    "another type": ("type", lambda s: rewrite(s, retype)),
    "no metadata": ("metadata", lambda s: describe(s, lambda _: None)),
    "another run's settings": ("settings", lambda s: change_settings(s, {"seed": 43})),
    "the shard twice": ("twice", lambda s: (s.parents[1] / MORE).write_bytes(s.read_bytes())),
}  # fmt: skip
PART_DAMAGE = {
    **{f"{name} {value}": ("part", functools.partial(change_part, **{name: value}))
       for name, value in (
           ("number", 7), ("ids", explore.hash_ids([1, 2])), ("rows", 7), ("nucleus", 7),
           ("conversations", 9), ("rows", "six"))},
    "a row that was skipped elsewhere": (
        "twice", lambda s: change_part(s, skipped={"3": "too_long"}, conversations=7)),
    "rows in another order": ("part", lambda s: rewrite(s, lambda t: t.take([5, 4, 3, 2, 1, 0]))),
    "no word about the part": (
        "metadata", lambda s: describe(s, lambda m: {k: m[k] for k in m if k != METADATA_PART})),
    "the name of another part": ("part", lambda s: s.rename(s.parents[1] / MORE)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("write", "rule", "damage"),
    [*((in_shards, *how) for how in SHARD_DAMAGE.values()),
     *((in_parts, *how) for how in PART_DAMAGE.values())],
    ids=[*SHARD_DAMAGE, *PART_DAMAGE],
)  # fmt: skip
def test_damage_to_a_file_is_caught_and_named(tmp_path, write, rule, damage):
    output = write(tmp_path)
    for checkpoint in output.glob("checkpoint*"):
        checkpoint.unlink()
    damage(output / SHARD)
    report = validate_output(output)
    assert rule in report.counts, str(report)
    shards = {violation.shard for violation in report.violations}
    assert shards == {MORE if (output / MORE).exists() else SHARD}


@pytest.mark.parametrize(
    "change",
    [{"top_p": "\x1b[2J"}, {"logit_bits": 10**9}, {"top_p_max": True}, {"top_p": float("nan")}],
)
def test_absurd_settings_are_refused_by_name(tmp_path, change):
    output, (name,) = in_shards(tmp_path), change
    change_settings(output / SHARD, change)
    report = validate_output(output)
    assert (report.counts, report.rows) == ({"settings": 1}, 18)
    assert name in str(report)
    assert "\x1b" not in str(report), "it goes to a terminal"
    with pytest.raises(explore.FormatError, match=name):
        explore.compute_dataset_stats([output / SHARD])
    assert explore.get_sample([output / SHARD])["index"] == 8


def test_a_checkpoint_of_version_0_1_that_lists_other_shards_is_named(tmp_path):
    output = in_shards(tmp_path)
    shards = {f"data/{p.name}": {"bytes": p.stat().st_size} for p in (output / "data").iterdir()}
    for listed, wrong in ((shards, []), (shards | {MORE: {"bytes": 5}}, [MORE])):
        (output / "checkpoint.json").write_text(json.dumps({"shards": listed}))
        assert [v.shard for v in validate_output(output).violations] == wrong


def test_only_whole_parts_are_compared_with_their_hash_where_the_order_is_not_known(tmp_path):
    shuffled = STORED | {"random_sample": True}
    output = in_parts(tmp_path / "a", settings=shuffled)
    rewrite(output / "data/part-00000.parquet", lambda t: t.take([1, 0, 2, 3, 4]))
    assert validate_output(output).counts == {"checkpoint": 1}  # by its size alone
    rewrite(output / SHARD, lambda t: t.take([1, 0, 2, 3, 4, 5]))
    assert validate_output(output).counts["part"] == 1


def test_a_checkpoint_that_lists_other_parts_is_named(tmp_path):
    output = in_parts(tmp_path)
    columns = json.loads((output / "checkpoint.json").read_text())["parts"]
    rows = zip(*columns.values(), strict=True)
    records = [{**dict(zip(columns, row, strict=True)), "skipped": {}} for row in rows]
    for listed, shard in (
        *((put(records, (1, records[1] | change)), SHARD)
          for change in ({"bytes": 5}, {"ids": "0" * 16}, {"tokens": 1})),
        (records[:2], "data/part-00002.parquet"),
    ):  # fmt: skip
        write_checkpoint(output, listed, "")
        report = validate_output(output)
        assert report.counts == {"checkpoint": 1}, str(report)
        assert report.violations[0].shard == shard


def test_the_command_exits_3_and_names_shard_row_token_and_rule(tmp_path, capsys):
    _, change = DAMAGE["ascending nucleus logits"]
    output = write_output(tmp_path, put(ROWS, (8 + ROW, HURT | change)), settings=STORED)
    assert explore.main([str(output), "--validate"]) == 3
    shown = capsys.readouterr().out
    assert f"{SHARD}, row {ROW}, token " in shown
    assert "order: nucleus logits ascend" in shown
    assert json.loads(shown.splitlines()[-1])["violations"] == {"order": 1}

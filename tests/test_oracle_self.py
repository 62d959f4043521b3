"""The oracle and the tail's tests pass what is right and reject a fault of each kind.

A run of a random teacher is right; one thing at a time is made wrong in what it has stored.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tail_law
from conftest import chat
from tail_law import LawViolation, check_tail_law
from tiny_teachers import save_teacher

import extract_logits

V, TWINS = 300, 140
CHATS = {n: chat(text) for n, text in enumerate(("Four, as ever. 四", "…", "and so on, " * 12))}
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Records]:
    """A right run: its folder, its teacher, its rows."""
    folder = tmp_path_factory.mktemp("run")
    save_teacher(folder / "model", V, padding=20, twins=TWINS, seed=5)
    lines = (json.dumps({"messages": messages}) for messages in CHATS.values())
    (folder / "chats.jsonl").write_text("\n".join(lines))
    argv = ["--model", folder / "model", "--dataset", folder / "chats.jsonl", "--store-tokens"]
    argv += ["--output", folder / "out", "--cache-dir", folder / "cache"]
    argv += ["--top-p", 0.9, "--top-p-max", 20, "--sampled-n", 6]
    assert extract_logits.main(list(map(str, argv))) == 0
    records = pq.read_table(folder / "out/data/part-00000.parquet").to_pylist()
    return folder / "out", oracle.load_reference(str(folder / "model")), records


def check(run: Any, folder: Path, records: Records, columns: Any = None) -> oracle.Report:
    """Let the oracle look at other records in place of the run's."""
    output, teacher, _ = run
    (folder / "data").mkdir()
    said = (output / "extraction_config.json").read_bytes()
    (folder / "extraction_config.json").write_bytes(said)
    there = pq.read_schema(output / "data/part-00000.parquet")
    fields = columns or oracle.COLUMNS + oracle.TOKEN_COLUMNS
    table = pa.Table.from_pylist(records, schema=pa.schema(fields, metadata=there.metadata))
    pq.write_table(table, folder / "data" / "part-00000.parquet")
    return oracle.check_run(folder, *teacher, CHATS)


def test_a_right_run_passes_with_its_figures(run: Any, tmp_path: Path) -> None:
    report = check(run, tmp_path, run[2])
    assert (report.rows, report.nucleus_max) == (3, 20)
    assert report.tokens == sum(row["num_tokens"] for row in run[2])
    assert 0.2 < report.max_quantization_error_steps <= 0.5 + oracle.FLOAT_STEPS
    assert report.tail_p_value > 1e-3


def put(row: int, name: str, place: int, value: Any) -> Callable[[Records], Any]:
    """Return how to change one value of a row; a function is given what is there."""

    def change(records: Records) -> None:
        values = records[row][name]
        values[place] = value(values[place], records[row]) if callable(value) else value

    return change


def swap_twins(records: Records) -> None:
    for row in records:
        ids = row["top_indices_low"]
        ends = np.cumsum(row["top_counts"])
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            low = [i for i in ids[start:end] if i < TWINS and i + TWINS in ids[start:end]]
            if low:
                a, b = ids.index(low[0], start), ids.index(low[0] + TWINS, start)
                ids[a], ids[b] = ids[b], ids[a]
                return
    raise AssertionError("no twins in the run")


def fewer_bits(records: Records) -> None:
    q, step = records[0]["sampled_logits_quantized"], 65535 / 4095
    records[0]["sampled_logits_quantized"] = [round(round(v / step) * step) for v in q]


def tail_sorted(records: Records) -> None:
    for row in records:
        names = ("sampled_logits_quantized", "sampled_indices_low")
        for start in range(0, 6 * row["num_tokens"], 6):
            part = slice(start, start + 6)
            drawn = sorted(zip(*(row[name][part] for name in names), strict=True), reverse=True)
            for name, values in zip(names, zip(*drawn, strict=True), strict=True):
                row[name][part] = values


def move_count(records: Records) -> None:
    counts = records[2]["top_counts"]
    t = next(t for t in range(len(counts) - 1) if counts[t] > 1 and counts[t + 1] < 20)
    counts[t], counts[t + 1] = counts[t] - 1, counts[t + 1] + 1


FAULTS: dict[str, Callable[[Records], Any]] = {  # by what the oracle says
    "row 1: missing": lambda records: records.pop(1),
    "row 1: stored twice": lambda records: records.append(records[1]),
    "num_tokens": lambda records: [row.update(index=2 - row["index"]) for row in records],
    "token_positions": put(2, "token_positions", 4, 0),
    "row 2 token 4: logsumexp": put(2, "logsumexp", 4, lambda value, _: value + 2e-5),
    "nats apart": lambda records: records[2]["top_indices_low"].reverse(),
    "the lower id comes first": swap_twins,
    "in the nucleus and in the tail": put(
        0, "sampled_indices_low", 0, lambda _, row: row["top_indices_low"][0]
    ),
    "tail holds an id twice": put(
        0, "sampled_indices_low", 1, lambda _, row: row["sampled_indices_low"][0]
    ),
    "wrong size": move_count,
    "tail logit": fewer_bits,
    "not drawn by its law": tail_sorted,
    "nucleus min": put(2, "top_min", 4, lambda value, _: value - 1.0),
    "V is 300": lambda records: records[0].update(
        top_indices_high=b"\x01" + records[0]["top_indices_high"][1:]
    ),
    "null in sampled_max": put(2, "sampled_max", 0, None),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_a_fault_in_what_is_stored_is_rejected(run: Any, tmp_path: Path, reason: str) -> None:
    records = copy.deepcopy(run[2])
    FAULTS[reason](records)
    with pytest.raises(oracle.Violation, match=reason):
        check(run, tmp_path, records)


def test_another_order_of_the_columns_is_rejected(run: Any, tmp_path: Path) -> None:
    with pytest.raises(oracle.Violation, match="column"):
        check(run, tmp_path, run[2], oracle.TOKEN_COLUMNS + oracle.COLUMNS)


def token_check(
    x: list[float], stored: list[int], tolerance: oracle.Tolerance
) -> oracle.TokenCheck:
    """Check a nucleus of right values, in a row of logits `x`."""
    values = sorted((x[i] for i in stored), reverse=True)
    span = values[0] - values[-1] or 1.0
    q = [round((value - values[-1]) / span * 65535) for value in values]
    top = oracle.Entries("nucleus", stored, q, values[-1], values[0])
    lse = oracle.oracle_token(np.array(x), 0.9, 4).logsumexp
    token = oracle.StoredToken(top, oracle.Entries("tail", [], [], 0.0, 0.0), lse)
    return oracle.TokenCheck(token, np.array(x), oracle.Settings(0.9, 4, 0), tolerance, "").run()


def test_grace_is_counted_and_bounded(run: Any) -> None:
    near, far = [2.0, 2.0 + 5e-6, -4.0], [2.0, 2.0 + 4e-5, -4.0]
    assert token_check(near, [1, 0], oracle.SAME_LOGITS).near_ties == 0
    assert token_check(near, [0, 1], oracle.OTHER_FORWARD).near_ties == 2
    for x, tolerance in ((near, oracle.SAME_LOGITS), (far, oracle.OTHER_FORWARD)):
        with pytest.raises(oracle.Violation, match="place 0"):
            token_check(x, [0, 1], tolerance)
    edge = [np.log(0.9 - 1e-6), np.log(0.05), np.log(0.05 + 1e-6)]
    assert token_check(edge, [0, 2], oracle.SAME_LOGITS).near_boundaries == 0
    assert token_check(edge, [0], oracle.OTHER_FORWARD).near_boundaries == 1
    with pytest.raises(oracle.Violation, match="wrong size"):
        token_check(edge, [0], oracle.SAME_LOGITS)
    whole = oracle.RunCheck(*run[1], oracle.Settings())
    whole.report.tokens, whole.report.near_ties = 500, 7
    whole.finish()
    whole.report.near_boundaries = 1
    with pytest.raises(oracle.Violation, match="more than noise explains"):
        whole.finish()


# The law of the tail ------------------------------------------------------------------------------

SMALL = tail_law.make_cases(10_000)


def race(
    log_probs: np.ndarray, nucleus: np.ndarray, m: int, n_trials: int, seed: int,
    *, scale: float = 1.0, share: int = 1, least: float = -np.inf,
) -> np.ndarray:  # fmt: skip
    """Draw by the Gumbel-max trick in float64: noise of a scale, that `share` trials share."""
    rng, found = np.random.default_rng(seed), []
    for start in range(0, n_trials, 1000):
        rows = min(1000, n_trials - start)
        noise = rng.gumbel(size=(-(-rows // share), len(log_probs)))
        keys = log_probs.clip(min=least) + scale * noise.repeat(share, axis=0)[:rows]
        keys[:, nucleus] = -np.inf
        found.append(np.argsort(-keys, axis=1)[:, :m])
    return np.concatenate(found)


def repeats_filled_uniformly(*args: Any) -> np.ndarray:
    """Draw with replacement; what repeats is replaced by any others."""
    log_probs, nucleus, m, n_trials, seed = args
    rng = np.random.default_rng(seed)
    weights = np.exp(np.where(nucleus, -np.inf, log_probs - log_probs[~nucleus].max()))
    drawn = rng.choice(len(weights), size=(n_trials, m), p=weights / weights.sum())
    fill = rng.permuted(np.tile(np.flatnonzero(~nucleus), (n_trials, 1)), axis=1)
    rows = np.concatenate([drawn, fill], axis=1).tolist()
    return np.array([list(dict.fromkeys(row))[:m] for row in rows])


BIASED: dict[str, tail_law.Draw] = {
    "repeats filled uniformly": repeats_filled_uniformly,
    "noise of scale 0.95": lambda *args: race(*args, scale=0.95),
    "noise shared by two trials": lambda *args: race(*args, share=2),
    "probabilities floored": lambda *args: race(*args, least=-87.5),
    "nucleus not left out": lambda *args: race(args[0], np.zeros_like(args[1]), *args[2:]),
}


def test_the_gumbel_max_trick_passes() -> None:
    check_tail_law(race, cases=[*SMALL, *tail_law.make_large_cases(600)])


@pytest.mark.parametrize("fault", BIASED)
def test_a_biased_sampler_is_rejected(fault: str) -> None:
    with pytest.raises(LawViolation):
        check_tail_law(BIASED[fault], cases=SMALL)

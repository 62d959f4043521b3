"""The oracle and the tail's tests pass what is right and reject a fault of each kind.

A run of a random teacher is right; one thing at a time is made wrong in what it has stored.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tail_law
from conftest import chat
from tail_law import LawViolation, check_tail_law
from test_oracle_run import run_checked
from tiny_teachers import save_teacher

CHATS = {n: chat(text) for n, text in enumerate(("Four, as ever. 四", "…", "and so on, " * 12))}
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A right run: its folder, its teacher, what the oracle says, its rows."""
    folder = tmp_path_factory.mktemp("run")
    model = save_teacher(folder / "model", 300, padding=20, twins=140, seed=5)
    sizes = ["--top-p", 0.9, "--top-p-max", 20, "--sampled-n", 6]
    records = ({"messages": messages} for messages in CHATS.values())
    output, report = run_checked(folder, model, records, "--store-tokens", *sizes)
    rows = pq.read_table(output / "data/part-00000.parquet").to_pylist()
    return output, oracle.load_reference(str(model)), report, rows


def check(run: Any, folder: Any, records: Records, columns: Any = None) -> None:
    """Let the oracle look at other records in place of the run's."""
    output, teacher, *_ = run
    shutil.copytree(output, folder, dirs_exist_ok=True)
    part = folder / "data" / "part-00000.parquet"
    fields = columns or oracle.COLUMNS + oracle.TOKEN_COLUMNS
    schema = pa.schema(fields, metadata=pq.read_schema(part).metadata)
    pq.write_table(pa.Table.from_pylist(records, schema=schema), part)
    oracle.check_run(folder, *teacher, CHATS)


def test_a_right_run_passes_with_its_figures(run):
    _, (model, _), report, records = run
    assert (report.rows, report.nucleus_max) == (3, 20)
    assert report.tokens == sum(row["num_tokens"] for row in records)
    assert 0.2 < report.max_steps <= 0.5 + oracle.FLOAT_STEPS
    assert report.tail_p_value > 1e-3
    assert oracle.find_twins(model, 300)[140] == [0, 140]


def put(row: int, name: str, place: int, value: Callable[[Any, Any], Any]) -> Any:
    """Return how to change one value of a row, given what is there and the row."""

    def change(records: Records) -> None:
        records[row][name][place] = value(records[row][name][place], records[row])

    return change


def sort_tail(records: Records) -> None:
    for row in records:
        order = np.argsort(-np.reshape(row["sampled_logits_quantized"], (-1, 6)), axis=1)
        for name in ("sampled_logits_quantized", "sampled_indices_low"):
            drawn = np.reshape(row[name], (-1, 6))
            row[name] = np.take_along_axis(drawn, order, axis=1).ravel().tolist()


FAULTS: dict[str, Callable[[Records], Any]] = {  # by what the oracle says
    "row 1: missing": lambda records: records.pop(1),
    "row 1: stored twice": lambda records: records.append(records[1]),
    "num_tokens": lambda records: [row.update(index=2 - row["index"]) for row in records],
    "token_positions": put(2, "token_positions", 4, lambda *_: 0),
    "row 2 token 4: logsumexp": put(2, "logsumexp", 4, lambda value, _: value + 2e-5),
    "nats apart": lambda records: records[2]["top_indices_low"].reverse(),
    "in the nucleus and in the tail": put(
        0, "sampled_indices_low", 0, lambda _, row: row["top_indices_low"][0]
    ),
    "tail holds an id twice": put(
        0, "sampled_indices_low", 1, lambda _, row: row["sampled_indices_low"][0]
    ),
    "tail logit": lambda records: records[0].update(
        sampled_logits_quantized=[
            q + 2 if 0 < q < 60_000 else q for q in records[0]["sampled_logits_quantized"]
        ]
    ),
    "not drawn by its law": sort_tail,
    "nucleus min": put(2, "top_min", 4, lambda value, _: value - 1.0),
    "V is 300": lambda records: records[0].update(
        top_indices_high=b"\x01" + records[0]["top_indices_high"][1:]
    ),
    "null in sampled_max": put(2, "sampled_max", 0, lambda *_: None),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_a_fault_in_what_is_stored_is_rejected(run, tmp_path, reason):
    records = copy.deepcopy(run[-1])
    FAULTS[reason](records)
    with pytest.raises(oracle.Violation, match=reason):
        check(run, tmp_path, records)


def test_another_order_of_the_columns_is_rejected(run, tmp_path):
    with pytest.raises(oracle.Violation, match="column"):
        check(run, tmp_path, run[-1], oracle.TOKEN_COLUMNS + oracle.COLUMNS)


def token_check(x: list[float], stored: list[int], tolerance: Any, **twins: Any) -> Any:
    """Check a nucleus of right values, in a row of logits `x`."""
    values = sorted((x[i] for i in stored), reverse=True)
    span = values[0] - values[-1] or 1.0
    q = [round((value - values[-1]) / span * 65535) for value in values]
    top = oracle.Entries("nucleus", stored, q, values[-1], values[0])
    lse = oracle.oracle_token(np.array(x), 0.9, 4).logsumexp
    token = oracle.StoredToken(top, oracle.Entries("tail", [], [], 0.0, 0.0), lse)
    settings = oracle.Settings(0.9, 4, 0)
    return oracle.TokenCheck(token, np.array(x), settings, tolerance, "", **twins).run()


NEAR, FAR = [2.0, 2.0 + 5e-6, -4.0], [2.0, 2.0 + 4e-5, -4.0]  # a tie, nearly
EDGE = [np.log(0.9 - 1e-6), np.log(0.05), np.log(0.05 + 1e-6)]  # the first holds 0.9, nearly
EXACT = {"twins": {0: [0, 1], 1: [0, 1]}}


def test_grace_is_counted_and_bounded(run):
    same, other = oracle.SAME_LOGITS, oracle.OTHER_FORWARD
    assert token_check(NEAR, [1, 0], same).near_ties == 0
    assert token_check(NEAR, [0, 1], other).near_ties == 2
    assert token_check(EDGE, [0, 2], same).near_boundaries == 0
    assert token_check(EDGE, [0], other).near_boundaries == 1
    assert token_check([2.0, 2.0, -4.0], [0, 1], other, **EXACT).near_ties == 0
    for x, stored, tolerance, twins, reason in (
        (NEAR, [0, 1], same, {}, "place 0"), (FAR, [0, 1], other, {}, "place 0"),
        (EDGE, [0], same, {}, "wrong size: mass"), (EDGE, [0, 2, 1], other, {}, "2 tokens hold"),
        ([2.0, 2.0, -4.0], [1, 0], other, EXACT, "the lower id comes first"),
    ):  # fmt: skip
        with pytest.raises(oracle.Violation, match=reason):
            token_check(x, stored, tolerance, **twins)
    whole = oracle.RunCheck(*run[1], oracle.Settings())
    whole.report.tokens, whole.report.near_ties = 500, 7
    whole.finish()
    whole.report.near_boundaries = 1
    with pytest.raises(oracle.Violation, match="more than noise explains"):
        whole.finish()


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


def repeats_filled_uniformly(log_probs, nucleus, m, n_trials, seed):
    """Draw with replacement; what repeats is replaced by any others."""
    drawn = race(log_probs, nucleus, 1, n_trials * m, seed).reshape(n_trials, m)
    fill = race(0 * log_probs, nucleus, (~nucleus).sum(), n_trials, seed + 1)
    rows = np.concatenate([drawn, fill], axis=1).tolist()
    return np.array([list(dict.fromkeys(row))[:m] for row in rows])


SMALL = tail_law.make_cases(10_000)
BIASED: dict[str, tail_law.Draw] = {
    "repeats filled uniformly": repeats_filled_uniformly,
    "noise of scale 0.95": lambda *args: race(*args, scale=0.95),
    "noise shared by two trials": lambda *args: race(*args, share=2),
    "probabilities floored": lambda *args: race(*args, least=-87.5),
    "nucleus not left out": lambda *args: race(args[0], np.zeros_like(args[1]), *args[2:]),
}


def test_the_gumbel_max_trick_passes():
    check_tail_law(race, cases=[*SMALL, *tail_law.make_large_cases(600)])


@pytest.mark.parametrize("fault", BIASED)
def test_a_biased_sampler_is_rejected(fault):
    with pytest.raises(LawViolation):
        check_tail_law(BIASED[fault], cases=SMALL)

"""The oracle and the tail's tests pass what is right and reject a fault of each kind.

A run of a random teacher is right; one thing at a time is made wrong in what it has stored.
"""

from __future__ import annotations

import copy
import shutil
from typing import Any

import numpy as np
import oracle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tail_law
from conftest import chat
from test_oracle_run import run_checked
from tiny_teachers import save_teacher

CHATS = {n: chat(text) for n, text in enumerate(("Four, as ever. 四", "…", "and so on, " * 12))}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A right run: its folder, its teacher, its rows."""
    folder = tmp_path_factory.mktemp("run")
    model = save_teacher(folder / "model", 300, padding=20, seed=5)
    sizes = ["--top-p", 0.9, "--top-p-max", 20, "--sampled-n", 6]
    records = ({"messages": messages} for messages in CHATS.values())
    output, report = run_checked(folder, model, records, "--store-tokens", *sizes)
    assert (report.rows, max(report.sizes)) == (3, 20)
    assert report.tail_p_value > 1e-3
    rows = pq.read_table(output / "data/part-00000.parquet").to_pylist()
    return output, oracle.load_reference(str(model)), rows


def sort_tail(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        order = np.argsort(-np.reshape(row["sampled_logits_quantized"], (-1, 6)), axis=1)
        for name in ("sampled_logits_quantized", "sampled_indices_low"):
            drawn = np.reshape(row[name], (-1, 6))
            row[name] = np.take_along_axis(drawn, order, axis=1).ravel().tolist()


FAULTS = {  # what is done to the rows, and what the oracle says
    "rows.pop(1)": "row 1: missing",
    "rows.append(rows[1])": "row 1: stored twice",
    "rows[0]['index'], rows[2]['index'] = 2, 0": "num_tokens",
    "rows[2]['token_positions'][4] = 0": "token_positions",
    "rows[2]['logsumexp'][4] += 2e-5": "row 2 token 4: logsumexp",
    "rows[2]['top_indices_low'].insert(0, rows[2]['top_indices_low'].pop(1))": "nats apart",
    "rows[0]['sampled_indices_low'][0] = rows[0]['top_indices_low'][0]": "is there twice",
    "rows[0]['top_indices_low'][0] = 310": "V = 300",
    "rows[0]['sampled_logits_quantized'][1] += 2": "tail: logit",
    "rows[2]['top_min'][4] -= 1.0": "nucleus: min",
    "sort_tail(rows)": "not drawn by its law",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_what_is_stored_is_rejected(run, tmp_path, fault):
    output, teacher, right = run
    rows = copy.deepcopy(right)
    exec(fault, {"rows": rows, "sort_tail": sort_tail})
    shutil.copytree(output, tmp_path, dirs_exist_ok=True)
    part = tmp_path / "data" / "part-00000.parquet"
    schema = pa.schema(oracle.COLUMNS + oracle.TOKEN_COLUMNS, pq.read_schema(part).metadata)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), part)
    with pytest.raises(oracle.Violation, match=FAULTS[fault]):
        oracle.check_run(tmp_path, *teacher, CHATS)


def test_few_near_ties_are_let_pass(run):
    check = oracle.RunCheck(*run[1], oracle.Settings(top_p=0.9, sampled_n=0))
    near, far = np.array([2.0, 2.0 + 5e-6, -4.0]), np.array([2.0, 2.0 + 4e-5, -4.0])
    check.check_nucleus([0, 1], near, oracle.oracle_token(near, 0.9, 100), "")
    with pytest.raises(oracle.Violation, match="nats apart"):
        check.check_nucleus([0, 1], far, oracle.oracle_token(far, 0.9, 100), "")
    check.report.tokens, check.report.exempt = 500, 6 + check.report.exempt
    with pytest.raises(oracle.Violation, match="more than noise explains"):
        check.finish()


def race(
    log_probs: np.ndarray, nucleus: np.ndarray, m: int, n_trials: int, seed: int,
    *, scale: float = 1.0, share: int = 1, least: float = -np.inf,
) -> np.ndarray:  # fmt: skip
    """Draw by the Gumbel-max trick in float64: noise of a scale, that `share` trials share."""
    noise = np.random.default_rng(seed).gumbel(size=(-(-n_trials // share), len(log_probs)))
    keys = log_probs.clip(min=least) + scale * noise.repeat(share, axis=0)[:n_trials]
    keys[:, nucleus] = -np.inf
    return np.argsort(-keys, axis=1)[:, :m]


SMALL = tail_law.make_cases(10_000)
BIASED: dict[str, tail_law.Draw] = {
    "noise of scale 0.95": lambda *args: race(*args, scale=0.95),
    "noise shared by two trials": lambda *args: race(*args, share=2),
    "probabilities floored": lambda *args: race(*args, least=-87.5),
    "nucleus not left out": lambda *args: race(args[0], np.zeros_like(args[1]), *args[2:]),
}


def test_the_gumbel_max_trick_passes():
    tail_law.check_tail_law(race, cases=[*SMALL, *tail_law.make_large_cases(600)])


@pytest.mark.parametrize("fault", BIASED)
def test_a_biased_sampler_is_rejected(fault):
    with pytest.raises(tail_law.LawViolation):
        tail_law.check_tail_law(BIASED[fault], cases=SMALL)

"""vLLM as the engine of the teacher's layers, against transformers. `make vllm` runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import run_process

pytest.importorskip("vllm", reason="vLLM needs an environment of its own: make vllm")

from architectures import VLLM, measure_engines

from explore_logits import iter_samples, load_logit_dataset

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "tests" / "teacher"
IN_PROCESS = '{"enforce_eager": true, "distributed_executor_backend": "uni"}'
ROWS = 400
COLUMNS = ("input_ids", "logsumexp", "top_counts", "sampled_indices")


def command(output: Path, engine: str, *more: str) -> list[str]:
    found = [sys.executable, str(ROOT / "extract_logits.py"), "--model", str(TEACHER / "model")]
    found += ["--dataset", str(TEACHER / "conversations.jsonl"), "--index-col", "id"]
    found += ["--limit", str(ROWS), "--store-tokens", "--upload-every", "10", "--engine", engine]
    found += ["--engine-args", IN_PROCESS] if engine == "vllm" else []
    return [*found, "--output", str(output), "--cache-dir", f"{output}-cache", *more]


def run(output: Path, engine: str, *more: str) -> dict[str, Any]:
    done = run_process(command(output, engine, *more), timeout_s=800)
    assert done.code == 0, done.stderr[-3000:]
    print(f"{engine}: {done.summary['seconds']} s, {done.summary['tokens']} tokens")
    return done.summary


def samples(output: Path) -> dict[int, Any]:
    return {
        int(sample["index"]): {name: np.asarray(sample[name]) for name in COLUMNS}
        for sample in iter_samples(load_logit_dataset(output))
    }


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same conversations by both engines."""
    folder = tmp_path_factory.mktemp("engines")
    found = {engine: folder / engine for engine in ("transformers", "vllm")}
    for engine, output in found.items():
        assert run(output, engine)["rows"] == ROWS
    return found


def test_rows_are_those_of_transformers_up_to_rounding(outputs: dict[str, Path]) -> None:
    ours, theirs = (samples(outputs[engine]) for engine in ("vllm", "transformers"))
    assert ours.keys() == theirs.keys()
    off, same, drawn, nuclei = 0.0, 0, 0, 0
    for index, row in ours.items():
        other = theirs[index]
        assert list(row["input_ids"]) == list(other["input_ids"])
        off = max(off, float(np.abs(row["logsumexp"] - other["logsumexp"]).max()))
        nuclei += int(np.sum(row["top_counts"] != other["top_counts"]))
        same += int(np.sum(row["sampled_indices"] == other["sampled_indices"]))
        drawn += np.size(row["sampled_indices"])
    print(f"log-sum-exp off by {off:.1g}, {nuclei} nuclei differ, {same} of {drawn} draws the same")
    assert off < 1e-4
    assert nuclei <= 2
    # a draw is a function of seed, conversation, position and logits: only near ties change it
    assert same > 0.995 * drawn


def test_settings_say_which_engine_and_a_run_by_the_other_is_refused(
    outputs: dict[str, Path],
) -> None:
    settings = load_logit_dataset(outputs["vllm"]).settings
    assert settings["engine"] == "vllm"
    assert settings["numerics"]["versions"]["vllm"]
    other = command(outputs["vllm"], "transformers", "--resume")
    done = run_process(other)
    assert done.code == 2
    assert "engine" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_mixtures_of_experts_in_both_precisions_and_small_chunks(family: str) -> None:
    assert family in VLLM
    (row,) = measure_engines([family])
    assert not row.problem
    assert row.difference is not None
    assert row.divergence is not None
    assert row.plain_divergence is not None
    assert row.difference < 1e-4
    assert row.divergence < 4 * row.plain_divergence

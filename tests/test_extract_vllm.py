"""vLLM as the engine of the teacher's layers, against transformers. `make vllm` runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHATS, ROOT, TEACHER
from processes import Finished, run_process

pytest.importorskip("vllm", reason="vLLM needs an environment of its own: make vllm")

from architectures import VLLM, measure_engines

from explore_logits import iter_samples, load_logit_dataset

IN_PROCESS = '{"enforce_eager": true, "distributed_executor_backend": "uni"}'
ROWS = 400
COLUMNS = ("input_ids", "logsumexp", "top_counts", "sampled_indices")


def extract(output: Path, engine: str, *more: object) -> Finished:
    command = [sys.executable, ROOT / "extract_logits.py", "--model", TEACHER, "--dataset", CHATS]
    command += ["--index-col", "id", "--limit", ROWS, "--store-tokens", "--upload-every", 10]
    command += ["--engine", engine, *(["--engine-args", IN_PROCESS] if engine == "vllm" else [])]
    command += ["--output", output, "--cache-dir", f"{output}-cache", *more]
    return run_process(command, timeout_s=800)


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
        summary = extract(output, engine).passed()
        assert summary["rows"] == ROWS
        print(f"{engine}: {summary['seconds']} s, {summary['tokens']} tokens")
    return found


def test_rows_are_those_of_transformers_up_to_rounding(outputs):
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
    assert off < 1e-4
    assert nuclei <= 2
    # a draw is a function of seed, conversation, position and logits: only near ties change it
    assert same > 0.995 * drawn


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_mixtures_of_experts_in_both_precisions_and_small_chunks(family):
    assert family in VLLM
    (row,) = measure_engines([family])
    assert not row.problem
    assert row.difference < 1e-4
    assert row.divergence < 4 * row.plain_divergence

"""vLLM as the engine of the teacher's layers, against transformers. `make vllm` runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHATS, ROOT, TEACHER
from processes import run_process

pytest.importorskip("vllm", reason="vLLM needs an environment of its own: make vllm")

from architectures import measure_engines

from explore_logits import iter_samples, load_logit_dataset


def extract(output: Path, engine: str, *more: object) -> dict[int, Any]:
    """Return the samples of a run by their ids."""
    command = [sys.executable, ROOT / "extract_logits.py", "--model", TEACHER, "--dataset", CHATS]
    command += ["--index-col", "id", "--store-tokens", "--upload-every", 10, "--engine", engine]
    command += ["--output", output, "--cache-dir", f"{output}-cache", *more]
    assert run_process(command, timeout_s=800).passed()["rows"] == 400
    return {int(sample["index"]): sample for sample in iter_samples(load_logit_dataset(output))}


def test_rows_are_those_of_transformers_up_to_rounding(tmp_path):
    in_process = '{"enforce_eager": true, "distributed_executor_backend": "uni"}'
    ours = extract(tmp_path / "vllm", "vllm", "--engine-args", in_process)
    theirs = extract(tmp_path / "transformers", "transformers")
    assert ours.keys() == theirs.keys()
    off, same, drawn, nuclei = 0.0, 0, 0, 0
    for index, row in ours.items():
        other = theirs[index]
        assert list(row["input_ids"]) == list(other["input_ids"])
        off = max(off, float(np.abs(row["logsumexp"] - other["logsumexp"]).max()))
        nuclei += int(np.sum(np.not_equal(row["top_counts"], other["top_counts"])))
        same += int(np.sum(np.equal(row["sampled_indices"], other["sampled_indices"])))
        drawn += np.size(row["sampled_indices"])
    assert off < 1e-4
    assert nuclei <= 2
    # a draw is a function of seed, conversation, position and logits: only near ties change it
    assert same > 0.995 * drawn


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_mixtures_of_experts_in_both_precisions_and_small_chunks(family):
    (row,) = measure_engines([family])
    assert not row.problem
    assert row.difference < 1e-4
    assert row.divergence < 4 * row.plain_divergence

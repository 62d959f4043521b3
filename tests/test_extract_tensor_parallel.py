"""One teacher in two processes, started by a real torchrun over gloo, against one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import CHATS, ROOT, TEACHER, run_script

from explore_logits import dequantize_logits

JOB = ["--model", TEACHER, "--dataset", CHATS, "--index-col", "id", "--limit", 8]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TORCHRUN += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def start_group(*args: object) -> subprocess.Popen[str]:
    """Start extract_logits.py as two processes that share a teacher."""
    command = [*TORCHRUN, str(ROOT / "extract_logits.py"), *map(str, [*JOB, *args])]
    return subprocess.Popen(
        [*command, "--tensor-parallel"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def read_rows(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the rows of an output by id."""
    shards = sorted((folder / "data").glob("*.parquet"))
    return {row["index"]: row for path in shards for row in pq.read_table(path).to_pylist()}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_two_processes_give_the_rows_of_one(tmp_path: Path, dtype: str) -> None:
    options = ["--dtype", dtype, "--cache-dir", tmp_path / "cache", "--max-batch-size", 2]
    alone = run_script("extract_logits.py", *JOB, *options, "--output", tmp_path / "alone")
    assert alone.code == 0, alone.stderr
    group = start_group(*options, "--output", tmp_path / "group")
    stdout, stderr = group.communicate(timeout=200)
    assert group.returncode == 0, stderr
    (summary,) = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    assert summary["rows"] == 8  # one line: the other process writes nothing
    assert stderr.count(f"in {dtype}, attention") == 2
    assert stderr.count("in float32; ") == 2  # the head
    one, two = read_rows(tmp_path / "alone"), read_rows(tmp_path / "group")
    assert one.keys() == two.keys()
    assert list((tmp_path / "group").glob("data/*")) == [tmp_path / "group/data/part-00000.parquet"]
    # sums are split in two: in float32 no more than rounding, in bfloat16 that of every layer
    near, alike = {"float32": (1e-4, 0.995), "bfloat16": (0.2, 0.8)}[dtype]
    same = total = 0
    for index, row in one.items():
        other = two[index]
        assert row["num_tokens"] == other["num_tokens"]
        assert np.allclose(row["logsumexp"], other["logsumexp"], atol=near, rtol=0)
        counts = np.asarray(row["top_counts"])
        if dtype == "float32":
            assert row["top_counts"] == other["top_counts"]
            assert np.allclose(top_logits(row, counts), top_logits(other, counts), atol=1e-3)
        same += np.sum(counts == np.asarray(other["top_counts"]))
        total += counts.size
    assert same / total >= alike


def top_logits(row: dict[str, Any], counts: np.ndarray) -> np.ndarray:
    """Return the nucleus logits of all tokens, flattened."""
    vmin, vmax = (np.repeat(np.asarray(row[name]), counts) for name in ("top_min", "top_max"))
    return np.asarray(dequantize_logits(np.asarray(row["top_logits_quantized"]), vmin, vmax))


@pytest.mark.slow
def test_a_signal_stops_the_group_and_the_job_can_be_resumed(tmp_path: Path) -> None:
    options = ["--cache-dir", tmp_path / "cache", "--max-batch-size", 1, "--upload-every", 1]
    options += ["--limit", 200, "--output", tmp_path / "out", "--resume"]
    group = start_group(*options)
    end = time.monotonic() + 120
    while not list(tmp_path.glob("out/data/*.parquet")) and time.monotonic() < end:
        time.sleep(0.1)
    group.send_signal(signal.SIGTERM)
    group.communicate(timeout=100)
    assert group.returncode != 0
    done = len(read_rows(tmp_path / "out"))
    assert 0 < done < 200
    assert not list(tmp_path.rglob("*.tmp"))


def test_without_torchrun_it_is_refused_with_the_command(tmp_path: Path) -> None:
    done = run_script("extract_logits.py", *JOB, "--output", tmp_path / "o", "--tensor-parallel")
    assert done.code == 2
    assert "torchrun --nproc-per-node" in done.stderr.splitlines()[-1]

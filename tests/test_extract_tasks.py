"""Many processes on one job: workers, launchers, tasks of datatrove, processes of one teacher."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHATS, ROOT, TEACHER, Finished, run_script
from outputs import Output
from processes import run_process

from extract_logits import ConfigError, launched_as, make_executor, parse_args

JOB = ["--model", TEACHER, "--dataset", CHATS, "--index-col", "id", "--limit", 12]
REQUIRED = ["--model", "m", "--dataset", "d", "--output", "./o"]
SLURM = ["--executor", "slurm", "--tasks", "8"]


def counted(rank: str, size: str, count: int) -> list[dict[str, Any]]:
    """Return the variables that a launcher gives each of its processes."""
    return [{rank: number, size: count} for number in range(count)]


def torchrun(nodes: int, each: int) -> list[dict[str, Any]]:
    world = {"WORLD_SIZE": nodes * each, "GROUP_WORLD_SIZE": nodes}
    return [
        {**world, "RANK": rank, "GROUP_RANK": rank // each, "LOCAL_RANK": rank % each}
        for rank in range(nodes * each)
    ]


SKY = counted("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", 4)
SRUN = counted("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", 3)
ARRAY = {"SLURM_ARRAY_TASK_COUNT": 3, "SLURM_ARRAY_TASK_MIN": 1}
NESTED = {
    "torchrun": torchrun(1, 8),
    "torchrun --standalone on SkyPilot": [n | p for n in SKY for p in torchrun(1, 8)],
    "torchrun over SkyPilot": [SKY[p["GROUP_RANK"]] | p for p in torchrun(4, 8)],
    "torchrun over srun": [SRUN[p["GROUP_RANK"]] | p for p in torchrun(3, 2)],
    "srun in an array from 1": [
        ARRAY | {"SLURM_ARRAY_TASK_ID": n} | t for n in (1, 2, 3) for t in SRUN
    ],
}


@pytest.mark.parametrize("launcher", NESTED)
def test_every_process_of_nested_launchers_is_another_worker(launcher):
    environments = NESTED[launcher]
    found = [launched_as({k: str(v) for k, v in names.items()}) for names in environments]
    assert sorted(found) == [(rank, len(environments)) for rank in range(len(environments))]


def test_options_win_over_the_launcher_and_one_teacher_or_submitter_is_one_worker(monkeypatch):
    for name, value in {**SKY[2], **torchrun(1, 2)[1]}.items():
        monkeypatch.setenv(name, str(value))
    for options, wanted in (
        ([], (5, 8)), (["--tensor-parallel"], (2, 4)), (SLURM, (None, None)),
        (["--rank", "0", "--world-size", "2"], (0, 2)),
    ):  # fmt: skip
        config = parse_args([*REQUIRED, *options])
        assert (config.rank, config.world_size) == wanted
    assert launched_as({}) == launched_as({"RANK": "1"}) == (None, None)
    with pytest.raises(ConfigError, match="--rank and --world-size"):
        launched_as({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "3"})


# Tasks --------------------------------------------------------------------------------------------


def run_tasks(folder: Path, *options: object) -> Finished:
    """Run the job as tasks into folder/out."""
    pytest.importorskip("datatrove")
    cache = ["--cache-dir", folder / "cache", "--output", folder / "out", "--upload-every", 3]
    return run_script("extract_logits.py", *JOB, *cache, *options)


def test_local_tasks_store_every_part_and_only_missing_ones_again(tmp_path):
    job = ["--executor", "local", "--tasks", 3, "--workers", 2, "--max-batch-size", 1]
    done = run_tasks(tmp_path, *job, "--messages-col", "nope")
    assert (done.code, done.summary["tasks_left"]) == (75, 3)
    assert "no column 'nope' (--messages-col)" in done.summary["error"]
    summary = run_tasks(tmp_path, *job).passed()
    assert (summary["rows"], summary["tasks_left"]) == (12, 0)
    output = Output(tmp_path / "out")
    hashes = output.hashes()
    assert (len(hashes), len(output.rows())) == (4, 12)
    lost = tmp_path / "out" / output.part_paths()[1]
    lost.unlink()
    kept = {path: path.stat().st_mtime_ns for path in lost.parent.iterdir()}
    run_tasks(tmp_path, *job).passed()
    assert output.hashes() == hashes
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ray", "slurm"])
def test_tasks_on_a_cluster_store_every_row_once(kind, tmp_path):
    options = {"cpus_per_task": 1, "mem_per_cpu_gb": 1, "gpus_per_task": 0}
    if kind == "ray":
        pytest.importorskip("ray")
    elif not shutil.which("sinfo"):
        pytest.skip("no Slurm here")
    else:
        partition = subprocess.getoutput("sinfo -h -t idle -o %R").split()[0]
        options |= {"partition": partition, "time": "00:10:00"}
    job = ["--executor", kind, "--tasks", 2, "--executor-options", json.dumps(options)]
    run_tasks(tmp_path, *job).passed()
    output, end = Output(tmp_path / "out"), time.monotonic() + 240
    while len(output.rows()) < 12 and time.monotonic() < end:  # Slurm has only submitted them
        time.sleep(1)
    assert len(output.rows()) == 12


def test_the_script_for_slurm_says_what_was_asked_for(tmp_path, monkeypatch):
    pytest.importorskip("datatrove")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setattr(subprocess, "check_output", lambda *_: b"Submitted batch job 7")
    time = {"time": "02:00:00", "partition": "gpu"}
    options = {**time, "gpus_per_task": 2, "cpus_per_task": 6, "sbatch_args": {"account": "llm"}}
    words = ["--workers", "4", "--executor-options", json.dumps(options)]
    make_executor(parse_args([*REQUIRED, *SLURM, *words]), tmp_path / "logs").run()
    script = (tmp_path / "logs/launch_script.slurm").read_text()
    for line in ("time=02:00:00", "array=0-7%4", "gpus=2", "cpus-per-task=6", "account=llm"):
        assert f"#SBATCH --{line}\n" in script
    assert re.search(r"^export PATH=\S+:\$PATH PYTHONPATH=\S+$", script, re.MULTILINE)


# Processes of one teacher -------------------------------------------------------------------------


ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def group_command(*args: object) -> list[str]:
    """Return what starts extract_logits.py as two processes that share a teacher."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2]
    words += ["--master-port", 0, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    words += [ROOT / "extract_logits.py", "--tensor-parallel", *JOB, *args]
    return list(map(str, words))


def run_group(*args: object) -> dict[str, Any]:
    """Run them to their end; return the summary, which one of them writes."""
    done = run_process(group_command(*args), env=ALONE)
    assert done.code == 0, done.stderr
    (summary,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(summary)


def test_two_processes_give_the_rows_of_one(extract, tmp_path):
    """Up to rounding: their sums are split in two."""
    extract(*JOB, "--max-batch-size", 2, model=None, dataset=None, output="./alone").passed()
    folders = ["--cache-dir", tmp_path / "cache", "--output", tmp_path / "group"]
    assert run_group("--max-batch-size", 2, *folders)["rows"] == 12
    assert run_group("--max-batch-size", 2, *folders, "--resume")["new_rows"] == 0
    one, two = Output(tmp_path / "alone"), Output(tmp_path / "group")
    assert one.parts() == two.parts()
    ours, theirs = (output.table(0).drop(["index"]).to_pydict() for output in (one, two))
    for name in ("logsumexp", "top_min", "top_max"):
        a, b = (np.concatenate(table[name]) for table in (ours, theirs))
        assert np.allclose(a, b, atol=1e-4, rtol=0), name
    assert ours["top_counts"] == theirs["top_counts"]
    top = [np.concatenate(table["top_indices_low"]) for table in (ours, theirs)]
    assert np.mean(top[0] == top[1]) > 0.995


@pytest.mark.slow
def test_a_signal_stops_the_group_and_the_job_can_be_resumed(tmp_path):
    options = ["--cache-dir", tmp_path / "cache", "--max-batch-size", 1, "--upload-every", 1]
    options += ["--limit", 200, "--output", tmp_path / "out", "--resume"]
    group = subprocess.Popen(group_command(*options), env={**os.environ, **ALONE})
    end = time.monotonic() + 120
    while not list(tmp_path.glob("out/data/*.parquet")) and time.monotonic() < end:
        time.sleep(0.1)
    group.send_signal(signal.SIGTERM)
    assert group.wait(timeout=100) != 0
    done = len(Output(tmp_path / "out").rows())
    assert 0 < done < 200
    run_group(*options)
    assert len(Output(tmp_path / "out").rows()) == 200

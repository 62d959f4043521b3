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
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import CHATS, ROOT, TEACHER, Finished, rows_of, run_script
from outputs import Output
from processes import run_process

import extract_logits
from extract_logits import ConfigError, launched_as, make_executor, parse_args

JOB = ["--model", TEACHER, "--dataset", CHATS, "--index-col", "id", "--limit", 12]
REQUIRED = ["--model", "m", "--dataset", "d", "--output", "./o"]
SLURM = ["--executor", "slurm", "--tasks", "8"]
TIME = {"time": "02:00:00", "partition": "gpu"}


Each = list[dict[str, Any]]  # the variables that each process of a launcher has


def array_of(count: int, *, first: int) -> Each:
    names = {"SLURM_ARRAY_TASK_COUNT": count, "SLURM_ARRAY_TASK_MIN": first}
    return [{**names, "SLURM_ARRAY_TASK_ID": first + number} for number in range(count)]


def sky(nodes: int) -> Each:
    return [{"SKYPILOT_NODE_RANK": node, "SKYPILOT_NUM_NODES": nodes} for node in range(nodes)]


def srun(tasks: int) -> Each:
    return [{"SLURM_PROCID": task, "SLURM_STEP_NUM_TASKS": tasks} for task in range(tasks)]


def torchrun(nodes: int, each: int) -> Each:
    world = {"WORLD_SIZE": nodes * each, "GROUP_WORLD_SIZE": nodes}
    return [
        {**world, "RANK": rank, "GROUP_RANK": rank // each, "LOCAL_RANK": rank % each}
        for rank in range(nodes * each)
    ]


def over(machines: Each, processes: Each) -> Each:
    """Give each process of one torchrun the variables of the machine that it runs on."""
    return [machines[process["GROUP_RANK"]] | process for process in processes]


NESTED = {
    "an array from 0": array_of(4, first=0),
    "torchrun": torchrun(1, 8),
    "torchrun --standalone on SkyPilot": [n | p for n in sky(4) for p in torchrun(1, 8)],
    "torchrun over SkyPilot": over(sky(4), torchrun(4, 8)),
    "torchrun --standalone in srun": [t | p for t in srun(3) for p in torchrun(1, 2)],
    "torchrun over srun": over(srun(3), torchrun(3, 2)),
    "srun in an array from 1": [a | t for a in array_of(3, first=1) for t in srun(2)],
}


@pytest.mark.parametrize("launcher", NESTED)
def test_every_process_of_nested_launchers_is_another_worker(launcher):
    environments = NESTED[launcher]
    found = [launched_as({k: str(v) for k, v in names.items()}) for names in environments]
    assert sorted(found) == [(rank, len(environments)) for rank in range(len(environments))]


def test_options_win_over_the_launcher_and_one_teacher_or_submitter_is_one_worker(monkeypatch):
    for name, value in {**sky(3)[0], **torchrun(1, 2)[1], "SKYPILOT_NODE_RANK": 2}.items():
        monkeypatch.setenv(name, str(value))
    for options, wanted in (
        ([], (5, 6)), (["--tensor-parallel"], (2, 3)), (SLURM, (None, None)),
        (["--rank", "0", "--world-size", "2"], (0, 2)),
    ):  # fmt: skip
        config = parse_args([*REQUIRED, *options])
        assert (config.rank, config.world_size) == wanted
    assert launched_as({}) == launched_as({"RANK": "1"}) == (None, None)
    with pytest.raises(ConfigError, match="--rank and --world-size"):
        launched_as({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "3"})


# Tasks --------------------------------------------------------------------------------------------


def needs(name: str) -> None:
    """Skip, with the reason, where a part of the extra `scale` is not installed."""
    pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[scale]'")


def run_tasks(folder: Path, *options: object) -> Finished:
    """Run the job as tasks into folder/out."""
    needs("datatrove")
    cache = ["--cache-dir", folder / "cache", "--output", folder / "out", "--upload-every", 3]
    return run_script("extract_logits.py", *JOB, *cache, *options)


def test_local_tasks_store_every_part_and_only_missing_ones_again(tmp_path):
    job = ["--executor", "local", "--tasks", 3, "--workers", 2, "--max-batch-size", 1]
    summary = run_tasks(tmp_path, *job).passed()
    assert (summary["rows"], summary["tasks_left"]) == (12, 0)
    output = Output(tmp_path / "out")
    hashes = output.hashes()
    assert (len(hashes), len(output.rows())) == (4, 12)
    assert "teacher" in Path(summary["logs"], "logs/task_00001.log").read_text()
    lost = tmp_path / "out" / output.part_paths()[1]
    lost.unlink()
    kept = {path: path.stat().st_mtime_ns for path in lost.parent.iterdir()}
    run_tasks(tmp_path, *job).passed()
    assert output.hashes() == hashes
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_the_last_line_says_why_tasks_failed(tmp_path):
    done = run_tasks(tmp_path, "--executor", "local", "--tasks", 1, "--messages-col", "nope")
    assert (done.code, done.summary["tasks_left"]) == (75, 1)
    for said in (done.summary["error"], done.stderr.splitlines()[-1]):
        assert "no column 'nope' (--messages-col)" in said


@pytest.mark.slow
def test_tasks_on_a_ray_cluster_store_every_row_once(tmp_path):
    needs("ray")
    job = ["--executor", "ray", "--tasks", 2, "--workers", 2, "--executor-options"]
    small = {"cpus_per_task": 1, "mem_per_cpu_gb": 1}
    done = run_tasks(tmp_path, *job, json.dumps({**small, "gpus_per_task": 1000}))
    assert done.code == 2
    assert "gpus_per_task" in done.stderr.splitlines()[-1]
    summary = run_tasks(tmp_path, *job, json.dumps({**small, "gpus_per_task": 0})).passed()
    assert (summary["tasks_left"], len(Output(tmp_path / "out").rows())) == (0, 12)


def test_the_script_for_slurm_says_what_was_asked_for(tmp_path, monkeypatch):
    needs("datatrove")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setattr(subprocess, "check_output", lambda *_: b"Submitted batch job 7")
    options = {**TIME, "gpus_per_task": 2, "cpus_per_task": 6, "sbatch_args": {"account": "llm"}}
    words = ["--workers", "4", "--executor-options", json.dumps(options)]
    make_executor(parse_args([*REQUIRED, *SLURM, *words]), tmp_path / "logs").run()
    script = (tmp_path / "logs/launch_script.slurm").read_text()
    for line in (
        "partition=gpu", "time=02:00:00", "array=0-7%4", "gpus=2", "cpus-per-task=6", "account=llm",
        "requeue",
    ):  # fmt: skip
        assert f"#SBATCH --{line}\n" in script
    assert "qos" not in script
    assert re.search(r"^export PATH=\S+:\$PATH PYTHONPATH=\S+$", script, re.MULTILINE)
    assert "launch_pickled_pipeline" in script


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("local", {"cpus": 3}, "LocalPipelineExecutor.*unexpected.* 'cpus'; it takes pipeline, "),
        ("slurm", {**TIME, "tim": 3}, "unexpected keyword argument 'tim'"),
        ("slurm", {}, "missing.*'time' and 'partition'"),
    ],
)
def test_options_that_an_executor_does_not_have_or_lacks_are_named(tmp_path, kind, options, said):
    needs("datatrove")
    job = ["--executor", kind, "--tasks", "2", "--executor-options", json.dumps(options)]
    with pytest.raises(ConfigError, match=f"^--executor-options: .*{said}"):
        make_executor(parse_args([*REQUIRED, *job]), tmp_path)


def test_what_tasks_and_shared_teachers_need_is_named(extract, write_chats, folder, monkeypatch):
    write_chats(rows_of(3))
    folder.write("data/part-00000.parquet", b"PAR1")  # of another job
    tasks = {"executor": "local", "tasks": 2}
    ends = [extract(tensor_parallel=True), extract(**tasks)]
    monkeypatch.setitem(sys.modules, "datatrove", None)
    ends.append(extract(**tasks))
    for done, said in zip(ends, ("torchrun", "--resume", "extra scale"), strict=True):
        assert (done.code, said in done.stderr.splitlines()[-1]) == (2, True), done.stderr


# Processes of one teacher -------------------------------------------------------------------------


ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def group_command(*args: object) -> list[str]:
    """Return what starts extract_logits.py as two processes that share a teacher."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    words = [*torchrun, ROOT / "extract_logits.py", "--tensor-parallel", *JOB, *args]
    return list(map(str, words))


def run_group(*args: object) -> tuple[dict[str, Any], str]:
    """Run them to their end; return the summary, which one of them writes, and stderr."""
    done = run_process(group_command(*args), env=ALONE)
    assert done.code == 0, done.stderr
    (summary,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return summary, done.stderr


def test_two_processes_give_the_rows_of_one(extract, tmp_path):
    """Up to rounding: their sums are split in two."""
    extract(*JOB, "--max-batch-size", 2, model=None, dataset=None, output="./alone").passed()
    folders = ["--cache-dir", tmp_path / "cache", "--output", tmp_path / "group"]
    assert run_group("--max-batch-size", 2, *folders)[0]["rows"] == 12
    planned, said = run_group("--plan", "--verify-mask", "--limit", 4, *folders)
    assert planned["rows"] == 4
    shown = [line for line in said.splitlines() if "⟦" in line]
    assert min(map(shown.count, shown)) == 1  # one process shows them, and would ask
    assert run_group("--max-batch-size", 2, *folders, "--resume")[0]["new_rows"] == 0
    one, two = Output(tmp_path / "alone"), Output(tmp_path / "group")
    assert one.parts() == two.parts()
    ours, theirs = (output.table(0).drop(["index"]).to_pydict() for output in (one, two))
    for name in ("logsumexp", "top_min", "top_max"):
        a, b = (np.concatenate(table[name]) for table in (ours, theirs))
        assert np.allclose(a, b, atol=1e-4, rtol=0), name
    assert ours["top_counts"] == theirs["top_counts"]
    top = [np.concatenate(table["top_indices_low"]) for table in (ours, theirs)]
    assert np.mean(top[0] == top[1]) > 0.995


def test_a_process_that_writes_nothing_says_what_ended_it(monkeypatch, caplog):
    def extract() -> bool:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    run = SimpleNamespace(extract=extract, skipped=Counter(), rows=0, tokens=0)
    job = SimpleNamespace(schema=None, settings=None)
    for name, instead in (("open_job", job), ("Extraction", run)):
        monkeypatch.setattr(extract_logits, name, lambda *_, instead=instead: instead)
    config = parse_args([*REQUIRED, "--tensor-parallel"])
    summary = extract_logits.run_until(config, extract_logits.GracefulInterrupt(), leads=False)
    assert summary == {"exit_code": 4}
    assert "a process that tokenizes was killed" in caplog.text


def test_a_process_that_writes_nothing_is_silent_when_it_is_stopped(monkeypatch):
    def wait(config: Any, interrupt: Any, **_: Any) -> None:
        with interrupt.leaving_at_once():
            os.kill(os.getpid(), signal.SIGINT)

    for name, instead in (("join_group", lambda _: 1), ("run_until", wait)):
        monkeypatch.setattr(extract_logits, name, instead)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    config = parse_args([*REQUIRED, "--tensor-parallel"])
    assert extract_logits.run_extraction(config) == {"exit_code": 130}


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


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("sinfo"), reason="no Slurm here")
def test_tasks_on_slurm_store_every_row_once(tmp_path):
    up = subprocess.run(["sinfo", "-h", "-t", "idle"], capture_output=True, text=True, timeout=20)
    if not up.stdout.split():
        pytest.skip(f"Slurm has no idle node: {up.stdout}{up.stderr}")
    options = {"partition": up.stdout.split()[0].rstrip("*"), "time": "00:10:00"}
    options |= {"gpus_per_task": 0, "cpus_per_task": 1, "mem_per_cpu_gb": 1}
    job = ["--executor", "slurm", "--tasks", 2, "--executor-options", json.dumps(options)]
    summary = run_tasks(tmp_path, *job).passed()
    assert summary["tasks_submitted"] == 2
    end = time.monotonic() + 240
    logs = Path(summary["logs"])
    while len(list(logs.glob("completions/*"))) < 2 and time.monotonic() < end:
        time.sleep(1)
    out = "".join(path.read_text() for path in logs.glob("slurm_logs/*"))
    assert len(Output(tmp_path / "out").rows()) == 12, out

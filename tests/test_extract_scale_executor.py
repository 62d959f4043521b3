"""--executor: datatrove runs the job as tasks, with its own marks, logs and retries."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import CHATS, TEACHER, Finished, run_script

from extract_logits import (
    ConfigError,
    ExtractionConfig,
    make_executor,
    parse_args,
    task_folder,
)

JOB = ["--model", TEACHER, "--dataset", CHATS, "--index-col", "id", "--limit", 12]
REQUIRED = ["--model", "m", "--dataset", "d", "--output", "./o"]
SLURM = ["--executor", "slurm", "--tasks", "8", "--slurm-partition", "gpu"]


def needs(name: str) -> None:
    """Skip, with the reason, where a part of the extra `scale` is not installed."""
    pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[scale]'")


def run_tasks(folder: Path, *options: object) -> Finished:
    """Run the job as tasks into folder/out."""
    cache = ["--cache-dir", folder / "cache", "--output", folder / "out", "--upload-every", 3]
    return run_script("extract_logits.py", *JOB, *cache, *options)


def read_ids(folder: Path) -> list[int]:
    """Return the ids of the rows in folder/out, sorted."""
    shards = sorted((folder / "out/data").glob("*.parquet"))
    return sorted(n for path in shards for n in pq.read_table(path)["index"].to_pylist())


def test_local_tasks_store_every_row_and_only_missing_ones_run_again(tmp_path: Path) -> None:
    needs("datatrove")
    job = ["--executor", "local", "--tasks", 3, "--workers", 2]
    done = run_tasks(tmp_path, *job)
    assert done.code == 0, done.stderr
    assert (done.summary["rows"], done.summary["tasks_left"]) == (12, 0)
    ids = read_ids(tmp_path)
    assert len(set(ids)) == len(ids) == 12
    logs = Path(done.summary["logs"])
    assert [path.name for path in sorted(logs.glob("completions/*"))] == ["00000", "00001", "00002"]
    assert "teacher" in (logs / "logs/task_00001.log").read_text()
    # the part of one task gets lost, and its mark
    (logs / "completions/00001").unlink()
    for path in tmp_path.glob("out/data/part-w01-*"):
        path.unlink()
    (logs / "logs/task_00002.log").unlink()
    done = run_tasks(tmp_path, *job)
    assert done.code == 0, done.stderr
    assert "1 of 3 tasks to run" in done.stderr
    assert read_ids(tmp_path) == ids
    assert not (logs / "logs/task_00002.log").exists()


@pytest.mark.slow
def test_tasks_on_a_ray_cluster_store_every_row_once(tmp_path: Path) -> None:
    needs("datatrove")
    needs("ray")
    job = ["--executor", "ray", "--tasks", 2, "--workers", 2]
    done = run_tasks(tmp_path, *job, "--cpus-per-task", 1, "--mem-per-cpu-gb", 1)
    assert done.code == 2  # this machine may have a GPU, but then the rest of the test says so
    assert "--gpus-per-task" in done.stderr.splitlines()[-1]
    job += ["--gpus-per-task", 0, "--cpus-per-task", 1, "--mem-per-cpu-gb", 1]
    done = run_tasks(tmp_path, *job)
    assert done.code == 0, done.stderr
    assert done.summary["tasks_left"] == 0
    assert len(set(read_ids(tmp_path))) == len(read_ids(tmp_path)) == 12


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("sinfo"), reason="no Slurm here")
def test_tasks_on_slurm_store_every_row_once(tmp_path: Path) -> None:
    needs("datatrove")
    import subprocess
    import time

    up = subprocess.run(["sinfo", "-h", "-t", "idle"], capture_output=True, text=True, timeout=20)
    if not up.stdout.split():
        pytest.skip(f"Slurm has no idle node: {up.stdout}{up.stderr}")
    partition = up.stdout.split()[0].rstrip("*")
    job = ["--executor", "slurm", "--tasks", 2, "--slurm-partition", partition]
    job += ["--gpus-per-task", 0, "--cpus-per-task", 1, "--mem-per-cpu-gb", 1]
    done = run_tasks(tmp_path, *job, "--slurm-time", "00:10:00")
    assert done.code == 0, done.stderr
    assert done.summary["tasks_submitted"] == 2
    end = time.monotonic() + 240
    logs = Path(done.summary["logs"])
    while len(list(logs.glob("completions/*"))) < 2 and time.monotonic() < end:
        time.sleep(1)
    out = "".join(path.read_text() for path in logs.glob("slurm_logs/*"))
    assert len(set(read_ids(tmp_path))) == len(read_ids(tmp_path)) == 12, out
    done = run_tasks(tmp_path, *job)
    assert done.summary["tasks_submitted"] == 0


def test_the_script_for_slurm_says_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("datatrove")
    import subprocess

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setattr(subprocess, "check_output", lambda *_: b"Submitted batch job 7")
    options = ["--workers", "4", "--gpus-per-task", "2", "--slurm-time", "02:00:00"]
    options += ["--slurm-options", '{"account": "llm"}', "--cpus-per-task", "6"]
    config = parse_args([*REQUIRED, *SLURM, *options])
    executor = make_executor(config, tmp_path / "logs", "abc", skip_completed=True)
    executor.run()
    script = (tmp_path / "logs/launch_script.slurm").read_text()
    for line in (
        "partition=gpu", "time=02:00:00", "array=0-7%4", "gpus=2", "cpus-per-task=6", "account=llm",
        "requeue", "signal=USR1@90",
    ):  # fmt: skip
        assert f"#SBATCH --{line}\n" in script
    assert "qos" not in script
    assert re.search(r"^export PATH=\S+:\$PATH PYTHONPATH=\S+$", script, re.MULTILINE)
    assert "launch_pickled_pipeline" in script
    (tmp_path / "logs/completions").mkdir()
    for rank in (0, 1, 2, 5):
        (tmp_path / f"logs/completions/{rank:05d}").touch()
    executor = make_executor(config, tmp_path / "logs", "abc", skip_completed=True)
    executor.run()
    assert "#SBATCH --array=0-3%4\n" in (tmp_path / "logs/launch_script.slurm").read_text()


def test_the_environment_of_slurm_tasks_can_be_given(tmp_path: Path) -> None:
    needs("datatrove")
    config = parse_args([*REQUIRED, *SLURM, "--slurm-setup", "module load cuda"])
    executor = make_executor(config, tmp_path, None, skip_completed=True)
    assert executor.env_command == "module load cuda"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--executor", "local"], "--tasks"),
        (["--tasks", "3"], "--executor"),
        (["--executor", "slurm", "--tasks", "3"], "--slurm-partition"),
        (["--executor", "local", "--tasks", "3", "--plan"], "--plan"),
        (["--executor", "local", "--tasks", "3", "--force-restart"], "empty the output"),
        (["--executor", "local", "--tasks", "3", "--rank", "0", "--world-size", "2"], "--rank"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_args([*REQUIRED, *options])


def test_a_launcher_around_the_one_that_submits_does_not_make_it_a_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    assert parse_args([*REQUIRED, *SLURM]).rank is None


def test_marks_of_done_tasks_belong_to_one_job(tmp_path: Path) -> None:
    def folder(**options: Any) -> Path:
        config: dict[str, Any] = {"model": "m", "dataset": "d", "output": "./o", "tasks": 2}
        return task_folder(ExtractionConfig(**{**config, "executor": "local", **options}))

    assert folder() == folder(workers=1, resume=True, max_batch_size=3)
    assert len({folder(), folder(limit=3), folder(tasks=3), folder(output="./p")}) == 4
    assert folder(executor_logs=str(tmp_path)).parent == tmp_path


def test_an_output_with_rows_of_another_job_needs_resume(tmp_path: Path) -> None:
    needs("datatrove")
    (tmp_path / "out/data").mkdir(parents=True)
    (tmp_path / "out/data/part-00000.parquet").write_bytes(b"PAR1")
    done = run_tasks(tmp_path, "--executor", "local", "--tasks", 2)
    assert done.code == 2
    assert "--resume" in done.stderr.splitlines()[-1]


def test_a_missing_datatrove_is_named_with_the_extra(tmp_path: Path) -> None:
    (tmp_path / "datatrove").mkdir()
    (tmp_path / "datatrove/__init__.py").write_text("raise ImportError('none')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    options = ["--cache-dir", tmp_path / "cache", "--output", tmp_path / "out"]
    options += ["--executor", "local", "--tasks", "2"]
    done = run_script("extract_logits.py", *JOB, *options, PYTHONPATH=path)
    assert done.code == 2
    assert "logit-extraction[scale]" in done.stderr.splitlines()[-1]

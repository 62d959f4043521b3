"""Kill and disturb runs at random until each job is complete, then compare the rows.

    python tests/chaos.py --runs 200 --seed 1       # ends in one line of JSON

A job extracts some embedded conversations into a repository of a loopback Hub, or now and then
into a folder. Its runs are killed (SIGKILL, SIGTERM, SIGINT, twice, or by the runtime limit) at
random moments while random requests meet random faults, and resumed until one says that everything
is stored; half of the time from an empty cache, else from that of one of the earlier runs.
After every run the output may hold no row twice and has to hold those it held before; in the end,
every row of an undisturbed run, the same to the bit.

Each run is a process of its own, forked with the imports done. The waits between tries are
shortened; nothing else is changed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "tests" / "teacher" / "model"
CHATS = ROOT / "tests" / "teacher" / "conversations.jsonl"
ROWS = 24
ENDS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGINT twice", "runtime limit")
FREE_RUNS = 0.1  # share of runs that nobody ends
FAULT_RATES = (0.0, 0.03, 0.1, 0.3)
EXPECTED_CODES = {0, 4, 75, 130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT}


@contextmanager
def serve_hub(folder: Path) -> Iterator[str]:
    """Run the loopback Hub in a process of its own and yield its address."""
    command = [sys.executable, str(ROOT / "tests/loopback_hub.py"), "--root", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            yield server.stdout.readline().split()[1]
        finally:
            server.kill()


def ask_hub(endpoint: str, path: str, content: Any = None) -> Any:
    """Send a request to the loopback Hub, past the faults."""
    data = None if content is None else json.dumps(content).encode()
    with urllib.request.urlopen(urllib.request.Request(endpoint + path, data)) as answer:
        return json.loads(answer.read())


@dataclass
class Tally:
    """What happened so far."""

    jobs: int = 0
    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    empty_caches: int = 0
    rows_lost: int = 0
    rows_twice: int = 0
    rows_different: int = 0
    unexpected: list[str] = field(default_factory=list)

    def compare(
        self, found: list[dict[str, Any]], wanted: dict[int, dict[str, Any]], needed: set[int]
    ) -> set[int]:
        """Count what is wrong with the rows of an output; return their ids."""
        counts = Counter(row["index"] for row in found)
        self.rows_lost += len(needed - counts.keys())
        self.rows_twice += sum(count - 1 for count in counts.values())
        self.rows_different += sum(row != wanted.get(row["index"]) for row in found)
        return set(counts)


def import_and_shorten_waits() -> Any:
    """Import the script and what a run imports later, and shorten every wait between tries."""
    sys.path.insert(0, str(ROOT))
    for name in ("datasets", "huggingface_hub", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    extract_logits = importlib.import_module("extract_logits")
    setattr(extract_logits, "RETRY_WAITS_S", (0.02, 0.05, 0.1, 0.2))  # noqa: B010
    clock = SimpleNamespace(sleep=lambda s: time.sleep(min(s, 0.05)), time=time.time)
    setattr(sys.modules["huggingface_hub.utils._http"], "time", clock)  # noqa: B010
    return extract_logits


class Driver:
    """Starts runs and ends them."""

    def __init__(self, script: Any, folder: Path, endpoint: str, seed: int) -> None:
        self.script = script
        self.folder = folder
        self.endpoint = endpoint
        self.random = random.Random(seed)
        self.tally = Tally()
        self.typical_s = 5.0  # of a run that ends by itself

    def run(self, output: str, cache: Path, *options: object) -> Any:
        """Start one run in a process of its own."""
        from forked import Child

        argv = [
            *("--model", TEACHER, "--dataset", CHATS, "--index-col", "id", "--limit", ROWS),
            *("--upload-every", 4, "--max-batch-size", 1, "--output", output),
            *("--cache-dir", cache, *options),
        ]

        def work(_: IO[str]) -> int:
            log = os.open(self.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                return int(self.script.main([str(word) for word in argv]))
            except KeyboardInterrupt:  # before the run has begun to listen
                return 130

        return Child(work)

    def disturb(self, output: str, cache: Path) -> int:
        """Run once with faults and an end at a random moment; return the exit code."""
        rate = self.random.choice(FAULT_RATES)
        chaos = {"rate": rate, "seed": self.random.getrandbits(32)}
        ask_hub(self.endpoint, "/_ctl/chaos", chaos)
        end = "none" if self.random.random() < FREE_RUNS else self.random.choice(ENDS)
        delay_s = self.random.uniform(0.0, self.typical_s)
        limit = ("--max-runtime-minutes", delay_s / 60) if end == "runtime limit" else ()
        begun = time.monotonic()
        child = self.run(output, cache, "--resume", *limit)
        if end.startswith("SIG"):
            end_by = time.monotonic() + delay_s
            while time.monotonic() < end_by and not child.ended():
                time.sleep(0.005)
            for _ in range(1 + end.endswith("twice")):
                child.send(signal.Signals[end.split()[0]])
                time.sleep(self.random.uniform(0, 0.05))
        code = child.wait()
        child.output.close()
        if code == 0:
            self.typical_s += 0.3 * (time.monotonic() - begun - self.typical_s)
        self.tally.runs += 1
        self.tally.codes[code] += 1
        if code != 0:
            self.tally.kills[end] += 1
        if code not in EXPECTED_CODES:
            self.tally.unexpected.append(f"{end}: exit code {code}")
        return int(code)

    def job(self, wanted: dict[int, dict[str, Any]]) -> None:
        """Run one job to its end and compare its rows."""
        self.tally.jobs += 1
        local = self.random.random() < 0.25
        name = f"job-{self.tally.jobs}"
        output = str(self.folder / name) if local else f"tester/{name}"
        caches: list[Path] = []
        held: set[int] = set()
        code = -1
        while code != 0:
            if not caches or self.random.random() < 0.5:
                caches.append(self.folder / "caches" / f"{name}-{len(caches)}")
                self.tally.empty_caches += 1
            code = self.disturb(output, self.random.choice(caches[-3:]))
            ask_hub(self.endpoint, "/_ctl/clear", {})
            rows = read_folder(Path(output)) if local else self.read_repo(output)
            held = self.tally.compare(rows, wanted, set(wanted) if code == 0 else held)

    def read_repo(self, repo: str) -> list[dict[str, Any]]:
        """Return the rows that a repository of the Hub lists."""
        repos = ask_hub(self.endpoint, "/_ctl/state")["repos"]
        files = repos.get(f"datasets/{repo}", {"files": []})["files"]
        folder = self.folder / "fetched"
        shutil.rmtree(folder, ignore_errors=True)
        for path in files:
            if path.startswith("data/"):
                url = f"{self.endpoint}/datasets/{repo}/resolve/main/{path}"
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                urllib.request.urlretrieve(url, folder / path)
        return read_folder(folder)


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of the shards in a folder."""
    import pyarrow.parquet as pq

    shards = sorted((folder / "data").glob("*.parquet"))
    return [row for shard in shards for row in pq.read_table(shard).to_pylist()]


def loopback_environment(folder: Path, endpoint: str) -> dict[str, str]:
    """Return the environment in which the clients speak to a loopback Hub and share the machine."""
    return {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": "hf_loopback",
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_chaos(runs: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run jobs until so many runs are done; return the figures."""
    started = time.monotonic()
    with serve_hub(folder / "hub") as endpoint:
        os.environ |= loopback_environment(folder, endpoint)
        driver = Driver(import_and_shorten_waits(), folder, endpoint, seed)
        for _ in range(2):  # the first one fills the caches of the libraries
            shutil.rmtree(folder / "wanted", ignore_errors=True)
            begun = time.monotonic()
            child = driver.run(str(folder / "wanted"), folder / "caches" / "wanted")
            assert child.wait() == 0, (folder / "log.txt").read_text()
            driver.typical_s = time.monotonic() - begun
        wanted = {row["index"]: row for row in read_folder(folder / "wanted")}
        assert len(wanted) == ROWS
        while driver.tally.runs < runs:
            driver.job(wanted)
        faults = ask_hub(endpoint, "/_ctl/state")["faults_met"]
    tally = driver.tally
    return {
        "jobs": tally.jobs,
        "runs": tally.runs,
        "kills": sum(tally.kills.values()),
        "kills_by": dict(tally.kills),
        "exit_codes": {str(code): count for code, count in sorted(tally.codes.items())},
        "faults": faults,
        "empty_caches": tally.empty_caches,
        "rows_lost": tally.rows_lost,
        "rows_twice": tally.rows_twice,
        "rows_different": tally.rows_different,
        "unexpected": tally.unexpected,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> int:
    """Print the figures; 1 when a row is lost, twice or different, or a run ended in a bug."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--runs", type=int, default=200, help="runs at least, over all jobs")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it there")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    figures = run_chaos(options.runs, options.seed, folder)
    bad = ("rows_lost", "rows_twice", "rows_different", "unexpected")
    failed = any(figures[name] for name in bad)
    if failed:
        log = (folder / "log.txt").read_text()
        sys.stderr.write("".join(re.findall(r"Traceback.*?(?=\n\S*\d\d:\d\d|\Z)", log, re.DOTALL)))
    if not options.keep:
        shutil.rmtree(folder)
    print(json.dumps(figures))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Kill and disturb runs at random until each job is complete, then compare every part.

    python tests/tools/chaos.py --runs 200 --seed 1       # ends in one line of JSON

A job extracts made-up conversations, some of which give no row, into a repository of a loopback
Hub or into a folder: by one process, or by 3, then 2, then 4 workers at the same time, now and then
one of them started twice; with parts of some rows or of some size; now and then `--limit` is raised
on the way. Runs are killed (SIGKILL, SIGTERM, SIGINT, twice, or by the runtime limit) at random
moments while random requests meet random faults, and resumed until all say that everything is
stored; half of the time from an empty cache, else from that of one of the earlier rounds.
After every round the output holds what it held before, and no part that an undisturbed run does not
write: the same names with the same sha256. In the end it holds all of them.

Each run is a process of its own, forked with the imports done. The waits between tries are
shortened; nothing else is changed.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import importlib
import io
import itertools
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]

from forked import Child  # noqa: E402

ENDS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGINT twice", "runtime limit")
FAULT_RATES = (0.0, 0.03, 0.1, 0.3)
TEAMS = (3, 2, 4)  # workers of one round after another
EXPECTED_CODES = {0, 4, 75, 130, 143, -signal.SIGTERM, -signal.SIGINT}
HANGS_S = 60.0  # of runs that take seconds


@dataclass(frozen=True)
class Shape:
    """Which parts a job has: the options, and `--limit` before and after it is raised."""

    name: str
    options: tuple[object, ...]
    limits: tuple[int, int]
    weight: int


SHAPES = (
    Shape("rows", ("--upload-every", 4), (14, 30), 6),
    Shape("size", ("--upload-size-mb", 0.01), (14, 30), 3),
    Shape("many", ("--upload-every", 70), (530, 600), 1),  # enough for processes that encode
)


@contextmanager
def serve_hub(folder: Path) -> Iterator[str]:
    """Run the loopback Hub in a process of its own and yield its address."""
    command = [sys.executable, str(TESTS / "loopback_hub.py"), "--root", str(folder)]
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


def loopback_environment(folder: Path, endpoint: str) -> dict[str, str]:
    """Return the environment in which the clients speak to a loopback Hub and share the machine."""
    return {
        "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_loopback", "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


def import_and_shorten_waits() -> Any:
    """Import the script and what a run imports later, and shorten every wait between tries."""
    llama = "transformers.models.llama.modeling_llama"
    for name in ("torch", "datasets", "huggingface_hub", llama):
        importlib.import_module(name)
    extract_logits = importlib.import_module("extract_logits")
    setattr(extract_logits, "RETRY_WAITS_S", (0.02, 0.05, 0.1, 0.2))  # noqa: B010
    clock = SimpleNamespace(sleep=lambda s: time.sleep(min(s, 0.05)), time=time.time)
    setattr(sys.modules["huggingface_hub.utils._http"], "time", clock)  # noqa: B010
    return extract_logits


def write_source(folder: Path, count: int) -> None:
    """Write a tiny teacher and short conversations.

    One in 11 has no assistant, one in 13 is too long, and four in a row are empty: a part of 4.
    """
    from tiny_teachers import save_teacher

    save_teacher(folder / "model", 300)
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        for n in range(count):
            chat = [{"role": "user", "content": "?"}]
            if n % 11 != 5:
                text = f"{n}" + "z" * (300 if n % 13 == 7 else n % 9)
                chat.append({"role": "assistant", "content": text})
            file.write(json.dumps({"messages": [] if 8 <= n < 12 else chat}) + "\n")


def name_source(folder: Path) -> list[object]:
    """Return the options that name what `write_source` has written."""
    files = ("--model", folder / "model", "--dataset", folder / "chats.jsonl")
    return [*files, "--max-seq-len", 100, "--max-batch-size", 1]  # the same shapes in every run


def start(script: Any, folder: Path, argv: Sequence[object], delay_s: float = 0.0) -> Child:
    """Run the script's `main` in a process of its own that logs into folder/log.txt."""

    def work(_: IO[str]) -> int:
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.dump_traceback_later(HANGS_S - 10, file=log)
        time.sleep(delay_s)
        try:
            return int(script.main([str(word) for word in argv]))
        except KeyboardInterrupt:  # before the run has begun to listen
            return 130

    return Child(work)


class Outputs:
    """What outputs hold: the sha256 of each part, and the rows of a part once they are wanted."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.known: dict[str, list[dict[str, Any]]] = {}  # rows by sha256

    def hashes(self, output: str) -> dict[str, str]:
        """Return the sha256 of each part that an output lists."""
        if Path(output).is_absolute():
            paths = [path for path in Path(output).glob("data/**/*.parquet") if path.is_file()]
            return {
                path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in paths
            }
        state = ask_hub(self.endpoint, "/_ctl/state")["repos"].get(f"datasets/{output}")
        files = state["files"] if state else {}
        return {path: found for path, found in files.items() if path.startswith("data/")}

    def rows(self, output: str, path: str, sha256: str) -> list[dict[str, Any]]:
        """Return the rows of a part."""
        import pyarrow.parquet as pq

        if sha256 not in self.known:
            if Path(output).is_absolute():
                data = (Path(output) / path).read_bytes()
            else:
                url = f"{self.endpoint}/datasets/{output}/resolve/main/{path}"
                with urllib.request.urlopen(url) as answer:
                    data = answer.read()
            file = pq.ParquetFile(io.BytesIO(data))  # without threads: this process forks
            self.known[sha256] = file.read(use_threads=False).to_pylist()
        return self.known[sha256]


@dataclass
class Tally:
    """What happened so far."""

    jobs: int = 0
    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    empty_caches: int = 0
    parts_compared: int = 0
    parts_different: int = 0
    rows_lost: int = 0
    rows_twice: int = 0
    rows_different: int = 0
    unexpected: list[str] = field(default_factory=list)

    def compare(
        self, outputs: Outputs, output: str, *, allowed: Mapping[str, set[str]],
        rows: Mapping[int, Any], held: Mapping[str, str], needed: Mapping[str, str],
    ) -> dict[str, str]:  # fmt: skip
        """Count what is wrong with the parts of an output; return their hashes.

        `allowed` are the parts of undisturbed runs, `rows` their rows; `held` were there before,
        `needed` have to be there now, exactly these.
        """
        found = outputs.hashes(output)
        counts: Counter[int] = Counter()
        for path, sha256 in found.items():
            there = outputs.rows(output, path, sha256)
            counts.update(row["index"] for row in there)
            if sha256 not in allowed.get(path, set()) or needed.get(path, sha256) != sha256:
                self.parts_different += 1
                self.rows_different += sum(row != rows.get(row["index"]) for row in there)
        wanted = [(path, sha) for path, sha in {**held, **needed}.items() if path not in found]
        gone = [row["index"] for path, sha in wanted for row in outputs.known.get(sha, [])]
        kept = [row["index"] for sha in held.values() for row in outputs.known[sha]]
        self.rows_lost += len({*gone, *kept} - counts.keys())
        self.rows_twice += sum(count - 1 for count in counts.values())
        self.parts_different += len(wanted)
        self.parts_compared += len(found)
        return found

    @property
    def bad(self) -> int:
        """How much of this must not be."""
        wrong = (self.parts_different, self.rows_lost, self.rows_twice, self.rows_different)
        return sum(wrong) + len(self.unexpected)


@dataclass
class Wanted:
    """The parts that undisturbed runs write, by limit, and their rows by id."""

    parts: dict[int, dict[str, str]]
    rows: dict[int, dict[str, Any]]
    seconds: float

    @property
    def allowed(self) -> dict[str, set[str]]:
        """The hashes that each part may have."""
        found: dict[str, set[str]] = {}
        for parts in self.parts.values():
            for path, sha256 in parts.items():
                found.setdefault(path, set()).add(sha256)
        return found


class Driver:
    """Starts rounds of runs and ends them."""

    def __init__(self, script: Any, folder: Path, endpoint: str, seed: int) -> None:
        self.script = script
        self.folder = folder
        self.outputs = Outputs(endpoint)
        self.endpoint = endpoint
        self.random = random.Random(seed)
        self.tally = Tally()
        count = max(max(shape.limits) for shape in SHAPES)
        assert Child(lambda _: write_source(folder, count)).wait() == 0  # its threads end with it
        self.source = name_source(folder)

    def run_alone(self, shape: Shape, output: str, limit: int) -> None:
        """Run without disturbance, to its end."""
        argv = [*self.source, *shape.options, "--output", output, "--limit", limit, "--resume"]
        child = start(self.script, self.folder, [*argv, "--cache-dir", self.folder / "alone"])
        assert child.wait() == 0, (self.folder / "log.txt").read_text()[-3000:]

    def learn(self, shape: Shape) -> Wanted:
        """Run undisturbed, raising the limit, and where parts have fixed sizes at once, too."""
        parts: dict[int, dict[str, str]] = {}
        output = str(self.folder / f"wanted-{shape.name}")
        for limit in shape.limits:
            begun = time.monotonic()
            self.run_alone(shape, output, limit)
            seconds = time.monotonic() - begun
            parts[limit] = self.outputs.hashes(output)
        found = [row for path, sha in parts[limit].items()
                 for row in self.outputs.rows(output, path, sha)]  # fmt: skip
        for path, sha in parts[shape.limits[0]].items():  # the last is longer now
            if sha not in self.outputs.known:
                rows = self.outputs.rows(output, path, parts[limit][path])
                ids = [row for row in rows if row["index"] < shape.limits[0]]
                self.outputs.known[sha] = ids
        if shape.name != "size":
            self.run_alone(shape, f"{output}-at-once", limit)
            if self.outputs.hashes(f"{output}-at-once") != parts[limit]:
                self.tally.unexpected.append(f"{shape.name}: a raised limit gives other parts")
        return Wanted(parts, {row["index"]: row for row in found}, max(seconds, 0.2))

    def round(
        self, argv: Sequence[object], team: int, cache: Path, run_s: float, calm: float
    ) -> bool:
        """Run a team of workers with faults, each with an end; True when all is stored."""
        rate = 0.0 if self.random.random() < calm else self.random.choice(FAULT_RATES)
        chaos = {"rate": rate, "seed": self.random.getrandbits(32)}
        ask_hub(self.endpoint, "/_ctl/chaos", chaos)
        ranks = list(range(team))
        if team > 1 and self.random.random() < 0.3:
            ranks.append(self.random.randrange(team))  # started twice, on another machine
            self.tally.kinds["started twice"] += 1
        runs, signals = [], []
        for place, rank in enumerate(ranks):
            worker = ("--rank", rank, "--world-size", team) if team > 1 else ()
            kept = cache if place < team else Path(f"{cache}-twin-{self.tally.runs}")
            end = "none" if self.random.random() < calm else self.random.choice(ENDS)
            delay_s = self.random.uniform(0.0, run_s)
            limit = ("--max-runtime-minutes", delay_s / 60) if end == "runtime limit" else ()
            run = start(self.script, self.folder, [*argv, "--cache-dir", kept, *worker, *limit])
            runs.append((rank, end, run))
            if end.startswith("SIG"):
                number = signal.Signals[end.split()[0]]
                at_s = time.monotonic() + delay_s
                signals.append((at_s, number, run))
                if end.endswith("twice"):
                    signals.append((at_s + self.random.uniform(0, 0.05), number, run))
        for at_s, number, run in sorted(signals, key=lambda entry: entry[0]):
            while time.monotonic() < at_s and not run.ended():
                time.sleep(0.002)
            run.send(number)
        stored = {rank for rank, end, run in runs if self.note(end, run) == 0}
        ask_hub(self.endpoint, "/_ctl/clear", {})
        return stored == set(range(team))

    def note(self, end: str, run: Child) -> int:
        """Wait for a run, count how it ended and return its code."""
        code = run.wait(HANGS_S)
        run.output.close()
        self.tally.runs += 1
        self.tally.codes[code] += 1
        if code != 0:
            self.tally.kills[end] += 1
        if code not in EXPECTED_CODES and (code, end) != (-signal.SIGKILL, "SIGKILL"):
            said = " after a minute: it hung" if code == -signal.SIGKILL else ""
            self.tally.unexpected.append(f"{end}: exit code {code}{said}")
        return code

    def job(self, shape: Shape, wanted: Wanted) -> None:
        """Run one job to its end and compare its parts."""
        tally = self.tally
        tally.jobs += 1
        local, workers, grows = (self.random.random() < share for share in (0.25, 0.4, 0.4))
        kind = ("folder" if local else "Hub", "workers" if workers else "one process", shape.name)
        tally.kinds.update([*kind, *["limit raised"] * grows])
        name = f"job-{tally.jobs}"
        output = str(self.folder / name) if local else f"tester/{name}"
        teams = itertools.cycle(TEAMS) if workers else itertools.repeat(1)
        low, high = shape.limits
        limit = low if grows else high
        caches: list[Path] = []
        held: dict[str, str] = {}
        for number, team in enumerate(teams):
            if not caches or self.random.random() < 0.5:
                caches.append(self.folder / "caches" / f"{name}-{len(caches)}")
                tally.empty_caches += 1
            argv = [*self.source, *shape.options, "--output", output, "--limit", limit, "--resume"]
            calm = 0.1 + 0.9 * number / (number + 6)
            cache = self.random.choice(caches[-3:])
            complete = self.round(argv, team, cache, wanted.seconds, calm)
            held = tally.compare(
                self.outputs, output, allowed=wanted.allowed, rows=wanted.rows, held=held,
                needed=wanted.parts[limit] if complete else {},
            )  # fmt: skip
            if complete and limit == high:
                break
            if complete or (held and self.random.random() < 0.4):
                limit = high
            if number == 40:
                tally.unexpected.append(f"{name} ({', '.join(kind)}): not complete in 40 rounds")
                break


def run_chaos(runs: int, seed: int, folder: Path) -> tuple[dict[str, Any], bool]:
    """Run jobs until there were so many runs; return the figures and whether they are good."""
    begun = time.monotonic()
    with serve_hub(folder / "hub") as endpoint:
        os.environ |= loopback_environment(folder, endpoint)
        driver = Driver(import_and_shorten_waits(), folder, endpoint, seed)
        wanted = {shape.name: driver.learn(shape) for shape in SHAPES}
        first = list(SHAPES)  # each at least once, if there are runs for it
        while driver.tally.runs < runs:
            weights = [shape.weight for shape in SHAPES]
            shape = first.pop(0) if first else driver.random.choices(SHAPES, weights)[0]
            driver.job(shape, wanted[shape.name])
        faults = ask_hub(endpoint, "/_ctl/state")["faults_met"]
    told: dict[str, Any] = dict(vars(driver.tally))
    kills, codes = told.pop("kills"), told.pop("codes")
    figures = {
        **told, "kills": sum(kills.values()), "kills_by": dict(kills),
        "exit_codes": {str(code): count for code, count in sorted(codes.items())},
        "faults": faults, "seed": seed, "seconds": round(time.monotonic() - begun, 1),
    }  # fmt: skip
    return figures, not driver.tally.bad


def main() -> int:
    """Print the figures; 1 when anything is lost, twice or different, or a run ended in a bug."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--runs", type=int, default=200, help="runs at least, over all jobs")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it there")
    options = parser.parse_args()
    folder = (options.keep or Path(tempfile.mkdtemp(prefix="chaos-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    figures, good = run_chaos(options.runs, options.seed, folder)
    if not good:
        log = (folder / "log.txt").read_text(errors="replace")
        sys.stderr.write("".join(re.findall(r"Traceback.*?(?=\n\S*\d\d:\d\d|\Z)", log, re.DOTALL)))
    if not options.keep:
        shutil.rmtree(folder)
    print(json.dumps(figures))
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())

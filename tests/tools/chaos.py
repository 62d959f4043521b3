"""Kill and disturb runs at random until each job is complete, then compare every part.

    python tests/tools/chaos.py --runs 200 --seed 1       # ends in one line of JSON
    python tests/tools/chaos.py --table                   # workers, a table, then a line of JSON

A job extracts made-up conversations, some of which give no row, into a repository of a loopback
Hub or into a folder: by one process, or by 3, then 2, then 4 workers at the same time, now and then
one of them started twice; with parts of some rows or of some size; now and then `--limit` is raised
on the way. Runs are killed (SIGKILL, SIGTERM, SIGINT, twice, or by the runtime limit) at random
moments while random requests meet random faults, and resumed until all say that everything is
stored; half of the time from an empty cache, else from that of one of the earlier rounds.
After every round the output holds what it held before, and no part that an undisturbed run does not
write: the same names with the same sha256. In the end it holds all of them.

The table is about workers with caches of their own, which are killed, doubled and changed in number
in the same way each time, on the embedded conversations. Each run is a process of its own, forked
with the imports done; the waits between tries are shortened.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
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
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NamedTuple

import pyarrow.parquet as pq
from bench import CHATS, TEACHER, TESTS, print_head, print_row
from outputs import Output
from processes import Child

ENDS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGINT twice", "runtime limit")
FAULT_RATES = (0.0, 0.03, 0.1, 0.3)
TEAMS = (3, 2, 4)  # workers of one round after another
EXPECTED_CODES = {0, 4, 75, 130, 143, -signal.SIGTERM, -signal.SIGINT}
HANGS_S = 100.0  # of runs that take seconds
SHAPES = {  # of parts: options, `--limit` before and after it is raised, how often
    "rows": (("--upload-every", 4), (14, 30), 6),
    "size": (("--upload-size-mb", 0.01), (14, 30), 3),
    "many": (("--upload-every", 70), (530, 600), 1),  # enough for processes that encode
}


@contextmanager
def serve_hub(folder: Path) -> Iterator[str]:
    """Run the loopback Hub in a process of its own and yield its address; it is ours from now on.

    The clients share the machine with each other: a thread each.
    """
    command = [sys.executable, str(TESTS / "loopback_hub.py"), "--root", str(folder / "hub")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            endpoint = server.stdout.readline().split()[1]
            os.environ |= {
                "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_loopback", "HF_HOME": str(folder / "home"),
                "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            }  # fmt: skip
            yield endpoint
        finally:
            server.kill()


def ask_hub(endpoint: str, path: str, content: Any = None) -> Any:
    """Send a request to the loopback Hub, past the faults."""
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(endpoint + path, data)
    with urllib.request.urlopen(request, timeout=HANGS_S) as answer:
        return json.loads(answer.read())


def import_and_shorten_waits() -> Any:
    """Import the script and what a run imports later, and shorten every wait between tries."""
    llama = "transformers.models.llama.modeling_llama"
    for name in ("torch", "datasets", "huggingface_hub", llama):
        importlib.import_module(name)
    extract_logits: Any = importlib.import_module("extract_logits")
    extract_logits.RETRY_WAITS_S = (0.02, 0.05, 0.1, 0.2)
    http: Any = sys.modules["huggingface_hub.utils._http"]
    http.time = SimpleNamespace(sleep=lambda s: time.sleep(min(s, 0.05)), time=time.time)
    return extract_logits


class Ledger:
    """The parts of undisturbed runs, and what is wrong with those of others."""

    def __init__(self, endpoint: str, ids: Any = None) -> None:
        self.endpoint = endpoint
        self.ids: dict[tuple[str, str], list[int]] = ids or {}  # by path and sha256 of a part
        self.parts_compared = self.parts_different = self.rows_lost = self.rows_twice = 0

    def hashes(self, output: str) -> dict[str, str]:
        """Return the sha256 of each part that an output lists."""
        if Path(output).is_absolute():
            return Output(output).hashes()
        files = ask_hub(self.endpoint, "/_ctl/state")["files"].get(output, {})
        return {path: found for path, found in files.items() if path.startswith("data/")}

    def learn(self, folder: str) -> dict[str, str]:
        """Take the parts of a folder for right; return their hashes."""
        parts = self.hashes(folder)
        for path, sha256 in parts.items():
            with pq.ParquetFile(Path(folder) / path) as file:  # no threads: this process forks
                ids = file.read(["index"], use_threads=False)["index"].to_pylist()
            self.ids[path, sha256] = ids
        return parts

    def compare(
        self, output: str, held: Mapping[str, str], needed: Mapping[str, str]
    ) -> dict[str, str]:
        """Count what is wrong with an output that held some parts before; return its hashes now."""
        found = self.hashes(output)
        strange = (found.items() - self.ids.keys()) | (needed.items() - found.items())
        gone = held.keys() - found.keys()
        counts = Counter(i for part in found.items() for i in self.ids.get(part, ()))
        before = {i for part in held.items() for i in self.ids.get(part, ())}
        self.parts_compared += len(found)
        self.parts_different += len(gone | {path for path, _ in strange})
        self.rows_lost += len(before - counts.keys())
        self.rows_twice += sum(count - 1 for count in counts.values())
        return found

    def wrong(self) -> int:
        return self.parts_different + self.rows_lost + self.rows_twice


class Worker(NamedTuple):
    """One process of a round, and what ends it."""

    rank: int
    team: int
    cache: Path = Path("cache")
    end: str = "none"  # a signal or the runtime limit, unless it has ended before
    at_s: float = 0.0  # when that comes
    again_s: float | None = None  # when the signal comes a second time
    delay_s: float = 0.0  # before it starts


class Runs:
    """Runs of the script in processes that log into folder/log.txt, and what becomes of parts."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder, self.endpoint, self.ledger = folder, endpoint, Ledger(endpoint)
        self.script = import_and_shorten_waits()

    def start(self, argv: Sequence[object], one: Worker) -> Child:
        words = [*argv, "--cache-dir", one.cache]
        if one.team > 1:
            words += ["--rank", one.rank, "--world-size", one.team]
        if one.end == "runtime limit":
            words += ["--max-runtime-minutes", one.at_s / 60]

        def work(_: IO[str]) -> int:
            log = os.open(self.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            faulthandler.dump_traceback_later(HANGS_S - 10, file=log)
            time.sleep(one.delay_s)
            try:
                return int(self.script.main([str(word) for word in words]))
            except KeyboardInterrupt:  # before the run has begun to listen
                return 130

        return Child(work)

    def round(self, argv: Sequence[object], workers: Sequence[Worker]) -> tuple[list[int], bool]:
        """Run workers at a time; return exit codes, and whether one of each rank stored all."""
        runs, begun = [self.start(argv, one) for one in workers], time.monotonic()
        signals = [
            (at_s, signal.Signals[one.end.split()[0]], place)
            for place, one in enumerate(workers)
            if one.end.startswith("SIG")
            for at_s in (one.at_s, one.again_s)
            if at_s is not None
        ]
        for at_s, number, place in sorted(signals):
            while time.monotonic() - begun < at_s and not runs[place].ended():
                time.sleep(0.002)
            runs[place].send(number)
        codes = []
        for run in runs:
            with run.output:
                codes.append(run.wait(HANGS_S))
        stored = {one[:2] for one, code in zip(workers, codes, strict=True) if code == 0}
        teams = {one.team for one in workers}
        return codes, any({(rank, team) for rank in range(team)} <= stored for team in teams)

    def learn(self, output: str, argv: Sequence[object]) -> tuple[dict[str, str], float]:
        """Run undisturbed; return hashes of the right parts, and seconds."""
        begun = time.monotonic()
        codes, _ = self.round([*argv, "--output", output], [Worker(0, 1, self.folder / "alone")])
        assert codes == [0], (self.folder / "log.txt").read_text()[-3000:]
        return self.ledger.learn(output), time.monotonic() - begun


# Jobs ---------------------------------------------------------------------------------------------


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


class Driver(Runs):
    def __init__(self, folder: Path, endpoint: str, seed: int) -> None:
        super().__init__(folder, endpoint)
        self.random = random.Random(seed)
        self.jobs = self.runs = self.empty_caches = 0
        self.kills = Counter[str]()
        self.unexpected: list[str] = []
        assert Child(lambda _: write_source(folder, 600)).wait() == 0  # its threads end with it
        self.learned = {
            (shape, limit): self.learn(f"{folder}/wanted-{shape}", self.words(shape, limit))
            for shape, (_, limits, _) in SHAPES.items() for limit in limits
        }  # fmt: skip

    def words(self, shape: str, limit: int) -> list[object]:
        """Return the options of a job; batches have the same shapes in every run."""
        return ["--model", self.folder / "model", "--dataset", self.folder / "chats.jsonl",
                "--max-seq-len", 100, "--max-batch-size", 1, *SHAPES[shape][0], "--limit", limit,
                "--resume"]  # fmt: skip

    def disturb(
        self, argv: Sequence[object], team: int, cache: Path, run_s: float, calm: float
    ) -> bool:
        """Run a team of workers with faults, each with an end; True when all is stored."""
        rate = 0.0 if self.random.random() < calm else self.random.choice(FAULT_RATES)
        chaos = {"rate": rate, "seed": self.random.getrandbits(32)}
        ask_hub(self.endpoint, "/_ctl/chaos", chaos)
        ranks, workers = list(range(team)), []
        if team > 1 and self.random.random() < 0.3:
            ranks.append(self.random.randrange(team))  # started twice, on another machine
        for place, rank in enumerate(ranks):
            kept = cache if place < team else Path(f"{cache}-twin-{self.runs}")
            end = "none" if self.random.random() < calm else self.random.choice(ENDS)
            at_s = self.random.uniform(0.0, run_s)
            again_s = at_s + self.random.uniform(0, 0.05) if end.endswith("twice") else None
            workers.append(Worker(rank, team, kept, end, at_s, again_s))
        codes, complete = self.round(argv, workers)
        ask_hub(self.endpoint, "/_ctl/clear", {})
        self.runs += len(codes)
        for one, code in zip(workers, codes, strict=True):
            self.kills[one.end] += code != 0
            if code not in EXPECTED_CODES and (code, one.end) != (-signal.SIGKILL, "SIGKILL"):
                self.unexpected.append(f"{one.end}: exit code {code} (-9: it hung)")
        return complete

    def job(self, shape: str) -> None:
        self.jobs += 1
        local, workers, grows = (self.random.random() < share for share in (0.25, 0.4, 0.4))
        name = f"job-{self.jobs}"
        output = str(self.folder / name) if local else f"tester/{name}"
        low, high = SHAPES[shape][1]
        limit = low if grows else high
        run_s = max(self.learned[shape, high][1], 0.2)
        caches: list[Path] = []
        held: dict[str, str] = {}
        for number, team in enumerate(itertools.cycle(TEAMS if workers else (1,))):
            if not caches or self.random.random() < 0.5:
                caches.append(self.folder / "caches" / f"{name}-{len(caches)}")
                self.empty_caches += 1
            calm = 0.1 + 0.9 * number / (number + 6)
            cache = self.random.choice(caches[-3:])
            words = [*self.words(shape, limit), "--output", output]
            complete = self.disturb(words, team, cache, run_s, calm)
            needed = self.learned[shape, limit][0] if complete else {}
            held = self.ledger.compare(output, held, needed)
            if complete and limit == high:
                break
            if complete or (held and self.random.random() < 0.4):
                limit = high
            if number == 40:
                self.unexpected.append(f"{output}: not complete in 40 rounds")
                break


def run_chaos(runs: int, seed: int) -> int:
    """Run jobs until there were so many runs; print figures and return whether they are bad."""
    begun, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="chaos-"))
    with serve_hub(folder) as endpoint:
        driver = Driver(folder, endpoint, seed)
        first = list(SHAPES)  # each at least once, if there are runs for it
        while driver.runs < runs:
            weights = [weight for _, _, weight in SHAPES.values()]
            driver.job(first.pop(0) if first else driver.random.choices([*SHAPES], weights)[0])
        faults = ask_hub(endpoint, "/_ctl/state")["faults_met"]
    if bad := bool(driver.ledger.wrong() or driver.unexpected):
        log = (folder / "log.txt").read_text(errors="replace")
        sys.stderr.write("".join(re.findall(r"Traceback.*?(?=\n\S*\d\d:\d\d|\Z)", log, re.DOTALL)))
        sys.stderr.write(f"\nleft for a look: {folder}\n")
    else:
        shutil.rmtree(folder)
    ledger = {k: v for k, v in vars(driver.ledger).items() if k.startswith(("parts", "rows"))}
    print(json.dumps({
        "jobs": driver.jobs, "runs": driver.runs, "kills": driver.kills.total(),
        "kills_by": driver.kills, "empty_caches": driver.empty_caches, "faults": faults, **ledger,
        "unexpected": driver.unexpected, "seed": seed,
        "seconds": round(time.monotonic() - begun, 1),
    }))  # fmt: skip
    return int(bad)


# Workers killed, doubled and changed in number, as a table ----------------------------------------


def make_jobs(seed: int, run_s: float) -> dict[str, list[list[Worker]]]:
    """Return teams that run one after another; kills come at random moments of a run."""
    chance = random.Random(seed)

    def team(count: int, **options: Any) -> list[Worker]:
        return [Worker(rank, count, **options) for rank in range(count)]

    def killed(count: int) -> list[Worker]:
        moments = [chance.uniform(0.2, 1.0) * run_s for _ in range(count)]
        return [Worker(rank, count, end="SIGKILL", at_s=at) for rank, at in enumerate(moments)]

    one_killed = [Worker(0, 2), Worker(1, 2, end="SIGKILL", at_s=0.6 * run_s)]
    return {
        **{f"{n} worker{'s' * (n > 1)}": [team(n)] for n in (1, 2, 3, 4)},
        "2 workers, one killed": [one_killed, team(2)],
        "3 → 2 → 4 workers, all killed": [killed(3), killed(2), team(4)],
        "2 workers, each started twice": [[*team(2), *team(2, delay_s=0.05)]],
        "2 and 3 workers at the same time": [[*team(2), *team(3)]],
    }


def print_table(seed: int) -> int:
    """Print a table and its figures; return whether a job is not as it should be.

    A job ends when every worker of a round says that its parts are stored.
    """
    argv = ("--model", TEACHER, "--dataset", CHATS, "--index-col", "id", "--limit", 24,
            "--upload-every", 3, "--max-batch-size", 1, "--resume")  # fmt: skip
    lines, bad, caches = [], 0, itertools.count()
    with tempfile.TemporaryDirectory(prefix="scale-") as place, serve_hub(Path(place)) as endpoint:
        runs = Runs(Path(place), endpoint)
        wanted, run_s = runs.learn(f"{place}/wanted", argv)
        print_head("launcher", "job", "output", "runs", "kills", "lost", "twice", "different")
        jobs = enumerate(make_jobs(seed, run_s).items())
        for (number, (job, rounds)), kind in itertools.product(jobs, ("folder", "Hub")):
            output = f"{place if kind == 'folder' else 'tester'}/job-{number}"
            ledger, held, codes = Ledger(endpoint, runs.ledger.ids), dict[str, str](), list[int]()
            for workers in [*rounds, *[rounds[-1]] * 3]:  # who refused starts again
                own = [one._replace(cache=Path(f"{place}/fresh/{next(caches)}")) for one in workers]
                ended, complete = runs.round([*argv, "--output", output], own)
                codes += ended
                held = ledger.compare(output, held, wanted if complete else {})
                if complete and workers is rounds[-1]:
                    break
            figures = [ledger.rows_lost, ledger.rows_twice, ledger.parts_different]
            bad += ledger.wrong() > 0 or not complete
            kills = codes.count(-signal.SIGKILL)
            lines.append(["processes", job, kind, len(codes), kills, *figures])
            print_row(*lines[-1])
    print(json.dumps({"lines": lines, "bad": bad}))
    return int(bad > 0)


def main() -> int:
    """Print the figures; 1 when anything is lost, twice or different, or a run ended in a bug."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--runs", type=int, default=200, help="runs at least, over all jobs")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--table", action="store_true", help="the table of jobs instead")
    options = parser.parse_args()
    if options.table:
        return print_table(options.seed)
    return run_chaos(options.runs, options.seed)


if __name__ == "__main__":
    sys.exit(main())

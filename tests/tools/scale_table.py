"""Share a job among workers, kill some, change their number, and compare the rows.

    python tests/tools/scale_table.py      # a table, then one line of JSON

Every job extracts the same embedded conversations into a repository of a loopback Hub or into a
folder. Workers are processes of their own with caches of their own; after a kill, and whenever the
number of workers changes, caches are empty, as on another machine. A job ends when every worker
of a round says that its parts are stored. Then the output has to hold the parts of an undisturbed
run by one process: the same names with the same sha256.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos import (
    TESTS,
    Outputs,
    Tally,
    ask_hub,
    import_and_shorten_waits,
    loopback_environment,
    serve_hub,
    start,
)
from forked import Child

TEACHER = TESTS / "teacher" / "model"
CHATS = TESTS / "teacher" / "conversations.jsonl"
ROWS = 24
OUTPUTS = ("folder", "Hub")


@dataclass(frozen=True)
class Worker:
    """One process of a round."""

    rank: int
    world_size: int
    kill_after_s: float | None = None  # SIGKILL, unless it has ended
    delay_s: float = 0.0


@dataclass(frozen=True)
class Case:
    """A job: rounds of workers that run at the same time, one round after another."""

    name: str
    rounds: Sequence[Sequence[Worker]]


def workers(count: int, **options: Any) -> list[Worker]:
    """Return the workers of a whole round."""
    return [Worker(rank, count, **options) for rank in range(count)]


def cases(seed: int, run_s: float) -> list[Case]:
    """Return the jobs of the table; kills come at random moments of a run of `run_s` seconds."""
    chance = random.Random(seed)

    def killed(count: int) -> list[Worker]:
        return [Worker(rank, count, chance.uniform(0.2, 1.0) * run_s) for rank in range(count)]

    one_of_two = [Worker(0, 2), Worker(1, 2, 0.6 * run_s)]
    return [
        *(Case(f"{n} worker{'s' * (n > 1)}", [workers(n)]) for n in (1, 2, 3, 4)),
        Case("2 workers, one killed", [one_of_two, workers(2)]),
        Case("3 → 2 → 4 workers, all killed", [killed(3), killed(2), workers(4)]),
        Case("2 workers, each started twice", [[*workers(2), *workers(2, delay_s=0.05)]]),
        Case("2 and 3 workers at the same time", [[*workers(2), *workers(3)]]),
    ]


class Pool:
    """Starts the workers of a round as processes and waits for them."""

    def __init__(self, script: Any, folder: Path) -> None:
        self.script = script
        self.folder = folder
        self.started = 0
        self.kills = 0
        self.codes: list[int] = []

    def start(self, output: str, worker: Worker | None, rows: int = ROWS) -> Child:
        """Start one worker, or None: one process without workers."""
        self.started += 1
        argv = [
            *("--model", TEACHER, "--dataset", CHATS, "--index-col", "id", "--limit", rows),
            *("--upload-every", 3, "--max-batch-size", 1, "--output", output, "--resume"),
            *("--cache-dir", self.folder / "caches" / f"{self.started}"),
        ]
        if worker is not None:
            argv += ["--rank", worker.rank, "--world-size", worker.world_size]

        return start(self.script, self.folder, argv, worker.delay_s if worker else 0.0)

    def run(self, output: str, team: Sequence[Worker]) -> bool:
        """Run a round; True when every part is stored: some process of each rank ended with 0."""
        begun = time.monotonic()
        children = [(worker, self.start(output, worker)) for worker in team]
        left = list(children)
        while left:
            for worker, child in list(left):
                limit_s = worker.kill_after_s
                if child.ended():
                    left.remove((worker, child))
                elif limit_s is not None and time.monotonic() - begun > limit_s:
                    child.send(signal.SIGKILL)
                    self.kills += 1
                    child.wait()
            time.sleep(0.005)
        codes = [(worker, child.wait()) for worker, child in children]
        self.codes += [code for _, code in codes]
        stored = {(worker.rank, worker.world_size) for worker, code in codes if code == 0}
        return any(
            {(rank, count) for rank in range(count)} <= stored
            for count in {worker.world_size for worker in team}
        )


def run_case(
    case: Case, output: str, pool: Pool, outputs: Outputs, wanted: dict[str, str]
) -> Tally:
    """Run a job to its end; count what is wrong with its parts after every round.

    `wanted` are the parts of an undisturbed run.
    """
    tally = Tally()
    complete = False
    rounds = [*case.rounds, *[case.rounds[-1]] * 3]  # workers that refused are started again
    held: dict[str, str] = {}
    allowed = {path: {sha256} for path, sha256 in wanted.items()}
    rows = {row["index"]: row for found in outputs.known.values() for row in found}
    for number, team in enumerate(rounds):
        complete = pool.run(output, team)
        tally.runs += len(team)
        held = tally.compare(
            outputs, output, allowed=allowed, rows=rows, held=held,
            needed=wanted if complete else {},
        )  # fmt: skip
        if complete and number >= len(case.rounds) - 1:
            break
    if not complete:
        tally.unexpected.append(f"{case.name}: not complete after {len(rounds)} rounds")
    return tally


def measure_speed_up(folder: Path, pool: Pool, rows: int = 200) -> dict[str, Any]:
    """Time one process and two workers on the same rows, in turn, one thread each."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for number in range(3):
        for count, times in seconds.items():
            begun = time.monotonic()
            output = str(folder / f"speed-{count}-{number}")
            children = [pool.start(output, worker, rows) for worker in workers(count)]
            assert [child.wait() for child in children] == [0] * count
            times.append(time.monotonic() - begun)
    best = {count: min(times) for count, times in seconds.items()}
    return {
        "rows": rows, "seconds_of_1": round(best[1], 2), "seconds_of_2": round(best[2], 2),
        "speed_up": round(best[1] / best[2], 2), "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def run_table(
    folder: Path, *, seed: int, names: Sequence[str] = (), kinds: Sequence[str] = OUTPUTS
) -> list[dict[str, Any]]:
    """Run the cases on folder and Hub; return a line of figures each."""
    lines = []
    with serve_hub(folder / "hub") as endpoint:
        os.environ |= loopback_environment(folder, endpoint)
        script = import_and_shorten_waits()
        outputs = Outputs(endpoint)
        pool = Pool(script, folder)
        begun = time.monotonic()
        alone = str(folder / "wanted")
        assert pool.start(alone, None).wait() == 0
        run_s = time.monotonic() - begun
        wanted = outputs.hashes(alone)
        assert sum(len(outputs.rows(alone, *part)) for part in wanted.items()) == ROWS
        for number, case in enumerate(cases(seed, run_s)):
            if names and case.name not in names:
                continue
            for kind in kinds:
                pool = Pool(script, folder)
                begun = time.monotonic()
                place = folder if kind == "folder" else Path("tester")
                tally = run_case(case, str(place / f"job-{number}"), pool, outputs, wanted)
                shutil.rmtree(folder / "caches", ignore_errors=True)
                lines.append({
                    "launcher": "processes", "job": case.name, "output": kind, "runs": tally.runs,
                    "kills": pool.kills, "lost": tally.rows_lost, "twice": tally.rows_twice,
                    "different": tally.parts_different, "exit_codes": pool.codes,
                    "seconds": round(time.monotonic() - begun, 1), "unexpected": tally.unexpected,
                })  # fmt: skip
                sys.stderr.write(f"{lines[-1]}\n")
        ask_hub(endpoint, "/_ctl/clear", {})
        if not names:
            speed = measure_speed_up(folder, Pool(script, folder))
            sys.stderr.write(f"{json.dumps(speed)}\n")
            lines[0]["speed"] = speed
    return lines


def format_table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the lines as a Markdown table."""
    columns = ("launcher", "job", "output", "runs", "kills", "lost", "twice", "different")
    rows = [" | ".join(str(line[name]) for name in columns) for line in lines]
    return "\n".join(
        f"| {row} |" for row in (" | ".join(columns), "|".join(["---"] * len(columns)), *rows)
    )


def main() -> int:
    """Print the table and the figures; 1 when a row is lost or twice, or a part different."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--job", action="append", default=[], help="only this one")
    parser.add_argument("--output", choices=OUTPUTS, help="only there")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it there")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="scale-"))
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [options.output] if options.output else OUTPUTS
    lines = run_table(folder, seed=options.seed, names=options.job, kinds=kinds)
    bad = [n for n in lines if n["lost"] or n["twice"] or n["different"] or n["unexpected"]]
    if not options.keep:
        shutil.rmtree(folder)
    print(format_table(lines))
    speed = lines[0].get("speed")
    if speed:
        print("\nspeed-up of 2 processes against 1, one thread each:", speed["speed_up"])
    print(json.dumps({"lines": lines, "bad": len(bad), "speed": speed}))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

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
import itertools
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import CHATS, TEACHER, print_head, print_row
from chaos import Ledger, import_and_shorten_waits, send_signals, serve_hub, start

COLUMNS = ("launcher", "job", "output", "runs", "kills", "lost", "twice", "different")
OUTPUTS = ("folder", "Hub")


class Worker(NamedTuple):
    """One process of a round."""

    rank: int
    world_size: int
    kill_after_s: float | None = None  # SIGKILL, unless it has ended
    delay_s: float = 0.0


Rounds = Sequence[Sequence[Worker]]  # teams that run one after another


def team(count: int, **options: Any) -> list[Worker]:
    """Return the workers of a whole round."""
    return [Worker(rank, count, **options) for rank in range(count)]


def make_jobs(seed: int, run_s: float) -> dict[str, Rounds]:
    """Return the jobs of the table; kills come at random moments of a run of `run_s` seconds."""
    chance = random.Random(seed)

    def killed(count: int) -> list[Worker]:
        return [Worker(rank, count, chance.uniform(0.2, 1.0) * run_s) for rank in range(count)]

    return {
        **{f"{n} worker{'s' * (n > 1)}": [team(n)] for n in (1, 2, 3, 4)},
        "2 workers, one killed": [[Worker(0, 2), Worker(1, 2, 0.6 * run_s)], team(2)],
        "3 → 2 → 4 workers, all killed": [killed(3), killed(2), team(4)],
        "2 workers, each started twice": [[*team(2), *team(2, delay_s=0.05)]],
        "2 and 3 workers at the same time": [[*team(2), *team(3)]],
    }


class Table:
    """Runs jobs in a folder, each as the line of a table."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder, self.endpoint = folder, endpoint
        self.script, self.caches = import_and_shorten_waits(), itertools.count()
        begun = time.monotonic()
        self.run_team(str(folder / "wanted"), team(1))
        self.run_s = time.monotonic() - begun

    def run_team(self, output: str, workers: Sequence[Worker]) -> tuple[list[int], bool]:
        """Run a round; return exit codes, and whether some process of each rank stored its part."""
        words = [
            *("--model", TEACHER, "--dataset", CHATS, "--index-col", "id", "--limit", 24),
            *("--upload-every", 3, "--max-batch-size", 1, "--output", output, "--resume"),
        ]
        runs = []
        for one in workers:
            own = ("--cache-dir", self.folder / "caches" / f"{next(self.caches)}")
            argv = [*words, *own, "--rank", one.rank, "--world-size", one.world_size]
            runs.append((one, start(self.script, self.folder, argv, one.delay_s)))
        send_signals((one.kill_after_s, signal.SIGKILL, run) for one, run in runs
                     if one.kill_after_s)  # fmt: skip
        codes = [run.wait() for _, run in runs]
        stored = {one[:2] for one, run in runs if run.wait() == 0}
        counts = {one.world_size for one in workers}
        return codes, any({(rank, n) for rank in range(n)} <= stored for n in counts)

    def line(self, job: str, rounds: Rounds, kind: str, output: str) -> dict[str, Any]:
        """Run a job to its end; count what is wrong with its parts after every round."""
        begun, ledger, unexpected = time.monotonic(), Ledger(self.endpoint), []
        wanted = ledger.learn(str(self.folder / "wanted"))
        held: dict[str, str] = {}
        codes: list[int] = []
        for number, workers in enumerate([*rounds, *[rounds[-1]] * 3]):  # who refused starts again
            ended, complete = self.run_team(output, workers)
            codes += ended
            held = ledger.compare(output, held, wanted if complete else {})
            if complete and number >= len(rounds) - 1:
                break
        else:
            unexpected.append(f"not complete after {number + 1} rounds")
        return {
            "launcher": "processes", "job": job, "output": kind, "runs": len(codes),
            "kills": codes.count(-signal.SIGKILL), "lost": ledger.rows_lost,
            "twice": ledger.rows_twice, "different": ledger.parts_different, "exit_codes": codes,
            "seconds": round(time.monotonic() - begun, 1), "unexpected": unexpected,
        }  # fmt: skip


def main() -> int:
    """Print the table and the figures; 1 when a row is lost or twice, or a part different."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--job", help="only this one")
    parser.add_argument("--output", choices=OUTPUTS, help="only there")
    options = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory(prefix="scale-") as place, serve_hub(Path(place)) as endpoint:
        table = Table(Path(place), endpoint)
        print_head(*COLUMNS)
        for number, (job, rounds) in enumerate(make_jobs(options.seed, table.run_s).items()):
            if options.job in (None, job):
                for kind in [options.output] if options.output else OUTPUTS:
                    parent = place if kind == "folder" else "tester"
                    lines.append(table.line(job, rounds, kind, f"{parent}/job-{number}"))
                    print_row(*(lines[-1][name] for name in COLUMNS))
    wrong = ("lost", "twice", "different", "unexpected")
    bad = sum(any(line[name] for name in wrong) for line in lines)
    print(json.dumps({"lines": lines, "bad": bad}))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

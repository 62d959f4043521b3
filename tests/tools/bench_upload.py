"""How much longer a run takes when every request to the Hub takes 200 ms.

    python tests/tools/bench_upload.py        # ends in one line of JSON

The same run into a loopback Hub, without latency and with it, in turn; each a process of its own
that has its imports done. Reported: the best time of each; the part of it that the run waits for
the uploader (opening the output, room in the queue, the end), which other load on the machine
hardly changes; and by how much the run gets longer, by either.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from chaos import ROOT, ask_hub, import_and_shorten_waits, loopback_environment, serve_hub
from forked import Child

TEACHER = ROOT / "tests/teacher/model"
CHATS = ROOT / "tests/teacher/conversations.jsonl"


def copy_conversations(path: Path, copies: int) -> None:
    """Write the embedded conversations several times, under ids of their own."""
    rows = [json.loads(line) for line in CHATS.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for copy in range(copies):
            for number, row in enumerate(rows):
                row["id"] = copy * len(rows) + number
                file.write(json.dumps(row) + "\n")


def measure(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Return the function, noting how long each call takes."""

    def timed(*args: Any, **options: Any) -> Any:
        begun = time.monotonic()
        try:
            return function(*args, **options)
        finally:
            seconds.append(time.monotonic() - begun)

    return timed


def time_run(script: Any, folder: Path, name: str, *options: object) -> dict[str, float]:
    """Return the seconds of a run, and those of them that it waited for the uploader."""
    argv = [
        *("--model", TEACHER, "--dataset", folder / "chats.jsonl", "--index-col", "id"),
        *("--upload-every", 150, "--output", f"tester/{name}", "--cache-dir", folder / name),
        *options,
    ]

    def work(output: IO[str]) -> int:
        os.dup2(os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        waited: list[float] = []
        uploader = script.StreamingHFUploader
        for method in ("__init__", "flush", "shutdown"):
            setattr(uploader, method, measure(getattr(uploader, method), waited))
        begun = time.monotonic()
        code = int(script.main([str(word) for word in argv]))
        ended = time.monotonic()
        output.write(json.dumps({"run": ended - begun, "waited": sum(waited)}))
        return code

    code, said = Child(work).finish()
    assert code == 0, (folder / "log.txt").read_text()[-2000:]
    return dict(json.loads(said.splitlines()[-1]))


def main() -> int:
    """Run, print the figures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--copies", type=int, default=6, help="of the 400 conversations")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--latency-ms", type=float, default=200)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-upload-"))
    copy_conversations(folder / "chats.jsonl", options.copies)
    times: dict[str, list[dict[str, float]]] = {"none": [], "latency": []}
    with serve_hub(folder / "hub") as endpoint:
        os.environ |= loopback_environment(folder, endpoint)
        script = import_and_shorten_waits()
        time_run(script, folder, "warm-up", "--limit", 20)
        for repeat in range(options.repeats):
            for kind in times:
                ask_hub(endpoint, "/_ctl/clear", {})
                if kind == "latency":
                    fault = {"match": "", "count": 10**9, "latency": options.latency_ms / 1000}
                    ask_hub(endpoint, "/_ctl/fault", fault)
                name = f"{kind}-{repeat}"
                times[kind].append(time_run(script, folder, name))
    best = {
        part: {kind: min(run[part] for run in runs) for kind, runs in times.items()}
        for part in ("run", "waited")
    }
    more_s = best["waited"]["latency"] - best["waited"]["none"]
    figures = {
        "latency_ms": options.latency_ms,
        "run_s": {kind: round(value, 2) for kind, value in best["run"].items()},
        "waited_s": {kind: round(value, 2) for kind, value in best["waited"].items()},
        "longer_by_clock": round(best["run"]["latency"] / best["run"]["none"] - 1, 4),
        "longer_by_waiting": round(more_s / best["run"]["none"], 4),
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())

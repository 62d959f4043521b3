"""How much longer a run takes when every request to the Hub takes 200 ms.

    python tests/tools/bench_upload.py        # ends in one line of JSON

The same run into a loopback Hub, without latency and with it, in turn, twice each; each a process
of its own that has its imports done. Reported: the best time of each; the part of it that the run
waits for the uploader (opening the output, room in the queue, the end), which other load on the
machine hardly changes; and by how much the run gets longer, by either.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from bench import CHATS, TEACHER
from chaos import ask_hub, import_and_shorten_waits, serve_hub
from processes import Child

COPIES, LATENCY_S = 6, 0.2  # of the 400 embedded conversations


def copy_conversations(path: Path) -> None:
    """Write the embedded conversations several times, under ids of their own."""
    rows = [json.loads(line) for line in CHATS.read_text(encoding="utf-8").splitlines()] * COPIES
    lines = [json.dumps({**row, "id": number}) for number, row in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Return the function, noting how long each call takes."""

    def timed(*args: Any, **options: Any) -> Any:
        begun = time.monotonic()
        try:
            return function(*args, **options)
        finally:
            seconds.append(time.monotonic() - begun)

    return timed


def time_run(script: Any, folder: Path, name: str, *options: object) -> tuple[float, float]:
    """Return the seconds of a run, and those of them that it waited for the uploader."""
    argv = [
        *("--model", TEACHER, "--dataset", folder / "chats.jsonl", "--index-col", "id"),
        *("--upload-every", 150, "--output", f"tester/{name}", "--cache-dir", folder / name),
        *options,
    ]

    def work(output: IO[str]) -> int:
        os.dup2(os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        waited: list[float] = []
        for method in ("__init__", "flush", "shutdown"):
            plain = getattr(script.StreamingHFUploader, method)
            setattr(script.StreamingHFUploader, method, measure(plain, waited))
        begun = time.monotonic()
        code = int(script.main([str(word) for word in argv]))
        output.write(json.dumps([time.monotonic() - begun, sum(waited)]))
        return code

    code, said = Child(work).finish()
    assert code == 0, (folder / "log.txt").read_text()[-2000:]
    run_s, waited_s = json.loads(said.splitlines()[-1])
    return run_s, waited_s


def main() -> None:
    """Run, print the figures."""
    times: dict[str, list[tuple[float, float]]] = {"none": [], "latency": []}
    with tempfile.TemporaryDirectory() as place, serve_hub(Path(place)) as endpoint:
        folder, script = Path(place), import_and_shorten_waits()
        copy_conversations(folder / "chats.jsonl")
        time_run(script, folder, "warm-up", "--limit", 20)
        for kind in [*times] * 2:
            ask_hub(endpoint, "/_ctl/clear", {})
            if kind == "latency":
                fault = {"match": "", "count": 10**9, "latency": LATENCY_S}
                ask_hub(endpoint, "/_ctl/fault", fault)
            name = f"{kind}-{len(times[kind])}"
            times[kind].append(time_run(script, folder, name))
    run = {kind: min(run_s for run_s, _ in runs) for kind, runs in times.items()}
    waited = {kind: min(waited_s for _, waited_s in runs) for kind, runs in times.items()}
    print(json.dumps({
        "latency_ms": 1000 * LATENCY_S, "run_s": run, "waited_s": waited,
        "longer_by_clock": round(run["latency"] / run["none"] - 1, 4),
        "longer_by_waiting": round((waited["latency"] - waited["none"]) / run["none"], 4),
    }))  # fmt: skip


if __name__ == "__main__":
    main()

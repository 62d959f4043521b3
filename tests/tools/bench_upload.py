"""What delivery to a Hub costs: latency, a resume over many parts, memory over many rows.

    python tests/tools/bench_upload.py                  # how much longer a run takes by 200 ms
    python tests/tools/bench_upload.py --parts 5000     # requests and bytes of a resume
    python tests/tools/bench_upload.py --rows 1000000   # ids and tiny rows, into a folder

Each ends in one line of JSON. The first is the same run into a loopback Hub without latency on
every request and with it: the time of each, and what it waits for the uploader, which other load on
the machine hardly changes. The others run no teacher: rows are made up (tests/shard_rows.py).
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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bench import CHATS, TEACHER, peak_bytes, timed
from chaos import ask_hub, import_and_shorten_waits, serve_hub
from loopback_hub import LoopbackHub
from outputs import Output, fill, finish, open_uploader
from processes import Child
from shard_rows import make_rows

COPIES, LATENCY_S = 16, 0.2  # of the 400 embedded conversations


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

        def note_seconds(function: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*args: Any, **options: Any) -> Any:
                seconds, result = timed(lambda: function(*args, **options), time.monotonic)
                waited.append(seconds)
                return result

            return noted

        for method in ("__init__", "flush", "shutdown"):
            plain = getattr(script.StreamingHFUploader, method)
            setattr(script.StreamingHFUploader, method, note_seconds(plain))
        seconds, code = timed(lambda: script.main([str(word) for word in argv]), time.monotonic)
        output.write(json.dumps([seconds, sum(waited)]))
        return int(code)

    code, said = Child(work).finish()
    assert code == 0, (folder / "log.txt").read_text()[-2000:]
    return tuple(json.loads(said.splitlines()[-1]))


def measure_latency() -> dict[str, Any]:
    run, waited = {}, {}
    with tempfile.TemporaryDirectory() as place, serve_hub(Path(place)) as endpoint:
        folder, script = Path(place), import_and_shorten_waits()
        rows = [json.loads(line) for line in CHATS.read_text(encoding="utf-8").splitlines()]
        lines = [json.dumps({**row, "id": n}) for n, row in enumerate(rows * COPIES)]
        (folder / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        time_run(script, folder, "warm-up", "--limit", 20)
        for kind, latency_s in (("none", 0.0), ("latency", LATENCY_S)):
            if latency_s:
                fault = {"match": "", "count": 10**9, "latency": latency_s}
                ask_hub(endpoint, "/_ctl/fault", fault)
            run[kind], waited[kind] = time_run(script, folder, kind)
    return {
        "latency_ms": 1000 * LATENCY_S, "run_s": run, "waited_s": waited,
        "longer_by_clock": round(run["latency"] / run["none"] - 1, 4),
        "longer_by_waiting": round((waited["latency"] - waited["none"]) / run["none"], 4),
    }  # fmt: skip


def measure_resume(parts: int) -> dict[str, Any]:
    """Fill a repository, and open it again from an empty cache."""
    with LoopbackHub() as hub, tempfile.TemporaryDirectory() as cache:
        os.environ |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token}
        output = Output("tester/many", hub)
        uploader = open_uploader(output, Path(cache) / "first")
        for number in range(parts):
            fill(uploader, number, [number])
        finish(uploader)
        hub.clear()
        started = time.monotonic()
        uploader = open_uploader(output, Path(cache) / "second")
        left = sum(len(uploader.begin_part(number, [number])) for number in range(parts))
        seconds = time.monotonic() - started
        uploader.shutdown()
        return {
            "parts": parts, "rows_left": left, "requests": len(hub.log),
            "bytes": sum(int(request["sent"]) for request in hub.log),
            "checkpoint_bytes": len(output.read("checkpoint.json")), "seconds": round(seconds, 2),
        }  # fmt: skip


class PlainEncoder:
    """Stands for the tokenizer: every conversation is three tokens, two of them extracted."""

    max_seq_len = None

    def encode_all(self, rows: Any) -> list[Any]:
        ids, wanted = np.arange(3, dtype=np.int32), np.asarray([1, 2], np.int32)
        return [sys.modules["extract_logits"].EncodedRow(index, ids, wanted) for index, _ in rows]


def measure_rows(rows: int) -> dict[str, Any]:
    """Read, batch, store and deliver many tiny rows; time the first tenth and the last."""
    import datasets  # here: its Hub is the one of the environment that it is imported in

    import extract_logits as el
    from explore_logits import ConversationColumns

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "rows.parquet"
        ids = np.random.default_rng(1).permutation(rows).astype(np.int32)
        pq.write_table(pa.table({"id": ids, "messages": pa.array(["[]"] * rows)}), file)
        source = datasets.load_dataset(
            "parquet", data_files=str(file), split="train", cache_dir=f"{place}/cache"
        )
        config = el.ExtractionConfig(model="m", dataset="d", output="./o", index_col="id")
        columns = ConversationColumns(messages="messages", index="id")
        uploader = open_uploader(Output(Path(place) / "out"), Path(place) / "local")
        windows = el.ConversationDataset(
            el.prepare_dataset(config, source, columns), PlainEncoder(), rows_per_part=5000,
            begin_part=uploader.begin_part,
        )  # fmt: skip
        row, times, done = make_rows([0], tokens=2), [time.monotonic()], [0]
        for window in windows:
            table = pa.concat_tables([row] * len(window.rows))
            indices = pa.array([encoded.index for encoded in window.rows], pa.int32())
            uploader.add_sample(table.set_column(0, "index", indices))
            uploader.flush()
            done.append(done[-1] + len(window.rows))
            times.append(time.monotonic())
        tenth = np.interp([0, 0.1 * rows, 0.9 * rows, rows], done, times)  # seconds at these rows
        return {
            "rows": rows, "stored": finish(uploader)["rows"],
            "rows_per_second_first_tenth": round(0.1 * rows / (tenth[1] - tenth[0])),
            "rows_per_second_last_tenth": round(0.1 * rows / (tenth[3] - tenth[2])),
            "peak_mb": round(peak_bytes() / 2**20),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=int)
    parser.add_argument("--rows", type=int)
    args = parser.parse_args()
    if args.parts:
        figures = measure_resume(args.parts)
    else:
        figures = measure_rows(args.rows) if args.rows else measure_latency()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

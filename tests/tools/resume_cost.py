"""Count the requests and bytes of a resume over many parts, and watch memory over many rows.

    python tests/tools/resume_cost.py --parts 5000      # on a loopback Hub
    python tests/tools/resume_cost.py --rows 1000000    # ids and tiny rows, into a folder

Each ends in one line of JSON. Nothing of a teacher is run: rows are made up (tests/shard_rows.py).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # the loopback Hub speaks plain LFS


def measure_resume(parts: int) -> dict[str, Any]:
    """Fill a repository, and open it again from an empty cache."""
    from loopback_hub import LoopbackHub
    from outputs import Output, fill, open_uploader

    with LoopbackHub() as hub, tempfile.TemporaryDirectory() as cache:
        os.environ |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token}
        output = Output("tester/many", hub)
        uploader = open_uploader(output, Path(cache) / "first")
        for number in range(parts):
            fill(uploader, number, [number])
        uploader.flush(final=True)
        uploader.shutdown()
        hub.clear()
        started, before = time.monotonic(), len(hub.log)
        uploader = open_uploader(output, Path(cache) / "second")
        left = sum(len(uploader.begin_part(number, [number])) for number in range(parts))
        seconds = time.monotonic() - started
        uploader.shutdown()
        requests = hub.log[before:]
        return {
            "parts": parts,
            "rows_left": left,
            "requests": len(requests),
            "bytes": sum(int(request["sent"]) for request in requests),
            "checkpoint_bytes": len(output.read("checkpoint.json")),
            "seconds": round(seconds, 2),
        }


class PlainEncoder:
    """Stands for the tokenizer: every conversation is three tokens, two of them extracted."""

    max_seq_len = None

    def encode_all(self, rows: Any) -> list[Any]:
        """Return encoded rows."""
        from extract_logits import EncodedRow

        ids, wanted = np.arange(3, dtype=np.int32), np.asarray([1, 2], np.int32)
        return [EncodedRow(index, ids, wanted) for index, _ in rows]


def measure_rows(rows: int) -> dict[str, Any]:
    """Read, batch, store and deliver many tiny rows; time the first tenth and the last."""
    import datasets
    from outputs import Output, open_uploader
    from shard_rows import make_rows

    from explore_logits import ConversationColumns
    from extract_logits import ConversationDataset, ExtractionConfig, prepare_dataset

    with tempfile.TemporaryDirectory() as place:
        file, output = Path(place) / "rows.parquet", Output(Path(place) / "out")
        ids = np.random.default_rng(1).permutation(rows).astype(np.int32)
        pq.write_table(pa.table({"id": ids, "messages": pa.array(["[]"] * rows)}), file)
        source = datasets.load_dataset(
            "parquet", data_files=str(file), split="train", cache_dir=f"{place}/cache"
        )
        config = ExtractionConfig(model="m", dataset="d", output="./o", index_col="id")
        columns = ConversationColumns(messages="messages", index="id")
        selection = prepare_dataset(config, source, columns)
        uploader = open_uploader(output, Path(place) / "local")
        windows = ConversationDataset(
            selection, PlainEncoder(), rows_per_part=5000, begin_part=uploader.begin_part
        )
        row, marks, done = make_rows([0], tokens=2), [(0, time.monotonic())], 0
        for window in windows:
            table = pa.concat_tables([row] * len(window.rows))
            indices = pa.array([encoded.index for encoded in window.rows], pa.int32())
            uploader.add_sample(table.set_column(0, "index", indices))
            uploader.flush()
            done += len(window.rows)
            marks.append((done, time.monotonic()))
        uploader.flush(final=True)
        uploader.shutdown()
        return {
            "rows": rows,
            "stored": uploader.summary()["rows"],
            "rows_per_second_first_tenth": round(rate(marks, 0.0, 0.1)),
            "rows_per_second_last_tenth": round(rate(marks, 0.9, 1.0)),
            "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }


def rate(marks: list[tuple[int, float]], first: float, last: float) -> float:
    """Return rows per second between two shares of all rows."""
    total = marks[-1][0]
    inside = [mark for mark in marks if first * total <= mark[0] <= last * total]
    (rows_a, at_a), (rows_b, at_b) = inside[0], inside[-1]
    return (rows_b - rows_a) / max(1e-9, at_b - at_a)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=int)
    parser.add_argument("--rows", type=int)
    args = parser.parse_args()
    if args.parts:
        print(json.dumps(measure_resume(args.parts)))
    if args.rows:
        print(json.dumps(measure_rows(args.rows)))


if __name__ == "__main__":
    main()

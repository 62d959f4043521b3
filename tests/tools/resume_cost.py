"""Count the requests and bytes of a resume over many parts, and watch memory over many rows.

    python tests/tools/resume_cost.py --parts 5000      # on a loopback Hub
    python tests/tools/resume_cost.py --rows 1000000    # ids and tiny rows, into a folder

Each ends in one line of JSON. Nothing of a teacher is run: rows are made up (tests/shard_rows.py).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bench import peak_bytes
from loopback_hub import LoopbackHub
from outputs import Output, fill, finish, open_uploader
from shard_rows import make_rows


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
            "parts": parts,
            "rows_left": left,
            "requests": len(hub.log),
            "bytes": sum(int(request["sent"]) for request in hub.log),
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
    import datasets  # here: its Hub is the one of the environment that it is imported in

    from explore_logits import ConversationColumns
    from extract_logits import ConversationDataset, ExtractionConfig, prepare_dataset

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "rows.parquet"
        ids = np.random.default_rng(1).permutation(rows).astype(np.int32)
        pq.write_table(pa.table({"id": ids, "messages": pa.array(["[]"] * rows)}), file)
        source = datasets.load_dataset(
            "parquet", data_files=str(file), split="train", cache_dir=f"{place}/cache"
        )
        config = ExtractionConfig(model="m", dataset="d", output="./o", index_col="id")
        columns = ConversationColumns(messages="messages", index="id")
        uploader = open_uploader(Output(Path(place) / "out"), Path(place) / "local")
        windows = ConversationDataset(
            prepare_dataset(config, source, columns), PlainEncoder(), rows_per_part=5000,
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
            "rows": rows,
            "stored": finish(uploader)["rows"],
            "rows_per_second_first_tenth": round(0.1 * rows / (tenth[1] - tenth[0])),
            "rows_per_second_last_tenth": round(0.1 * rows / (tenth[3] - tenth[2])),
            "peak_mb": round(peak_bytes() / 2**20),
        }


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

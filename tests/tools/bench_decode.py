"""Decode the nuclei of 1,000,000 stored tokens, all at once and token by token.

    python tests/tools/bench_decode.py

Ends in one JSON line, whose times are of the processor, so that other jobs hardly matter: seconds
for the million tokens by whole rows (ids, logits and probabilities), and for the same by a loop
over tokens, which is timed on every 20th row, must give the same sums, and is scaled up. Then
seconds for `validate_output` of 10,000 faulty shards of one row each, and for `compare_outputs` of
two outputs of 2,000 rows in different orders.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from bench import machine
from bench_loader import write_rows
from small_output import random_rows, rows_to_table, write_output

from explore_logits import (
    Sample,
    compare_outputs,
    dequantize_top_logits,
    iter_blocks,
    logits_to_probs,
    validate_output,
)

TOKENS, ROW_TOKENS, EVERY, FAULTS = 1_000_000, 1000, 20, 10_000


def decode_at_once(path: Path) -> tuple[float, dict[int, float], int]:
    """Return seconds, a checksum of each row by its index, and the number of entries."""
    start, sums, entries = time.process_time(), {}, 0
    for block in iter_blocks(path):
        check = block.top.probs + block.top.ids
        first = block.top.starts[block.row_starts[:-1]]
        sums |= zip(block.index.tolist(), np.add.reduceat(check, first).tolist(), strict=True)
        entries += check.size
    return time.process_time() - start, sums, entries


def decode_by_token(path: Path) -> tuple[float, dict[int, float]]:
    """Return seconds for all rows and checksums, from a loop over the tokens of some rows."""
    seconds, sums = 0.0, {}
    for block in iter_blocks(path):
        for row in np.flatnonzero(block.index % EVERY == 0):
            sample, check = Sample(block.row(row)), 0.0
            start = time.process_time()
            for t in range(sample["num_tokens"]):
                ids, logits = dequantize_top_logits(sample, t)
                probs = logits_to_probs(logits, sample["logsumexp"][t])
                check += float(probs.sum()) + float(ids.sum(dtype=np.int64))
            seconds += time.process_time() - start
            sums[int(block.index[row])] = check
    return seconds * EVERY, sums


def time_validation(folder: Path) -> float:
    """Return the seconds that it takes to validate an output of faulty shards."""
    first = folder / "data" / "part-00000.parquet"
    first.parent.mkdir(parents=True)
    pq.write_table(rows_to_table([{**random_rows(1, tokens=4)[0], "num_tokens": 99}]), first)
    for number in range(1, FAULTS):
        shutil.copyfile(first, first.with_name(f"part-{number:05d}.parquet"))
    start = time.process_time()
    report = validate_output(folder)
    assert report.counts["length"] >= FAULTS
    return time.process_time() - start


def time_comparison(folder: Path) -> float:
    """Return the seconds that it takes to compare two outputs of other orders."""
    rows = random_rows(2000, tokens=20)
    order = np.random.default_rng(0).permutation(len(rows))
    for name, chosen in (("one", rows), ("two", [rows[i] for i in order])):
        write_output(folder / name, chosen, rows_per_shard=500, rows_per_group=500)
    start = time.process_time()
    seen = compare_outputs(folder / "one", folder / "two")
    assert seen.common_rows == len(rows)
    assert not seen.max_divergence
    return time.process_time() - start


def main() -> None:
    """Run the benchmark and print its JSON line."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path = write_rows(folder / "whole", TOKENS, row_tokens=ROW_TOKENS, tail=0)
        at_once_s, all_sums, entries = decode_at_once(path)
        by_token_s, sums = decode_by_token(path)
        assert all(np.isclose(sums[index], all_sums[index], rtol=1e-9) for index in sums)
        print(json.dumps({
            "benchmark": "decode", "tokens": TOKENS, "entries": entries,
            "at_once_s": round(at_once_s, 3), "by_token_s": round(by_token_s, 3),
            "ratio": round(by_token_s / at_once_s, 1), "faulty_shards": FAULTS,
            "validate_s": round(time_validation(folder / "faulty"), 2),
            "compare_permuted_s": round(time_comparison(folder), 2), **machine(),
        }))  # fmt: skip


if __name__ == "__main__":
    main()

"""Section 6 of `extract_logits.py`: results become Arrow rows, beside the next forward."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import extract_logits
from explore_logits import SCHEMA, shard_schema
from extract_logits import AsyncPostProcessor, Batch, EncodedRow, GPUBatchResult

HIGHEST_ID = 2**18 - 1


def random_batch(rng: np.random.Generator, sizes: list[int]) -> Batch:
    """Return conversations of sizes[i] extracted tokens each, at ascending places."""
    rows = []
    for number, size in enumerate(sizes):
        length = size + int(rng.integers(1, 30))
        positions = 1 + np.sort(rng.choice(length - 1, size, replace=False))
        ids = rng.integers(0, HIGHEST_ID + 1, length)
        rows.append(EncodedRow(17 * number - 5, ids.astype(np.int32), positions.astype(np.int32)))
    return Batch(rows)


def random_result(rng: np.random.Generator, n: int, k: int, m: int) -> GPUBatchResult:
    """Return a host result of n tokens; entries beyond a token's count hold other numbers."""

    def entries(part: str, width: int) -> dict[str, Any]:
        return {
            f"{part}_ids": rng.integers(0, HIGHEST_ID + 1, (n, width)).astype(np.int32),
            f"{part}_q": rng.integers(0, 65536, (n, width)).astype(np.int32),
            f"{part}_min": rng.normal(size=n).astype(np.float32),
            f"{part}_max": rng.normal(size=n).astype(np.float32),
        }

    logsumexp = rng.normal(20, 2, n)
    return GPUBatchResult(
        **entries("top", k), **entries("sampled", m),
        top_counts=rng.integers(1, k + 1, n).astype(np.int32),
        sampled_counts=np.full(n, m, np.int32),
        logsumexp=logsumexp, nucleus_mass=rng.uniform(0.9, 1, n),
        actual_logits=(logsumexp - rng.exponential(3, n)).astype(np.float32),
        usable=np.ones(n, bool),
    )  # fmt: skip


def pack_by_loops(result: GPUBatchResult, batch: Batch) -> list[dict[str, Any]]:
    """Pack token by token, as the format's description reads."""
    rows, token = [], 0
    for conversation in batch.rows:
        n = conversation.token_positions.size
        row: dict[str, Any] = {name: [] for name in SCHEMA.names}
        row |= {"index": conversation.index, "num_tokens": n, "_mass": 0.0, "_actual": 0.0}
        ids: dict[str, list[int]] = {"top": [], "sampled": []}
        for t in range(token, token + n):
            row["top_counts"].append(int(result.top_counts[t]))
            for kind, count in (("top", row["top_counts"][-1]),
                                ("sampled", result.sampled_ids.shape[1])):  # fmt: skip
                for entry in range(count):
                    ids[kind].append(int(getattr(result, f"{kind}_ids")[t, entry]))
                    q = int(getattr(result, f"{kind}_q")[t, entry])
                    row[f"{kind}_logits_quantized"].append(q)
                for end in ("min", "max") if count else ():
                    row[f"{kind}_{end}"].append(float(getattr(result, f"{kind}_{end}")[t]))
            row["logsumexp"].append(float(result.logsumexp[t]))
            row["_mass"] += float(result.nucleus_mass[t])
            row["_actual"] += float(np.exp(result.actual_logits[t] - result.logsumexp[t]))
        for kind, found in ids.items():
            row[f"{kind}_indices_low"] = [i % 65536 for i in found]
            high = [0] * ((len(found) + 3) // 4)
            for place, i in enumerate(found):
                high[place // 4] += (i // 65536) << (2 * (place % 4))
            row[f"{kind}_indices_high"] = bytes(high)
        row["input_ids"] = conversation.input_ids.tolist()
        row["token_positions"] = conversation.token_positions.tolist()
        if result.usable[token : token + n].all():
            rows.append(row)
        token += n
    return rows


@pytest.mark.parametrize(("k", "m"), [(1, 0), (7, 1), (255, 24)])
@pytest.mark.parametrize(
    ("sizes", "bad"),
    [([1, 1, 1], []), ([], []), *(([3, 1, 40, 2, 6], bad) for bad in
     ([], [0], [1, 3, 4], [0, 1, 2, 3, 4]))],
)  # fmt: skip
def test_packing_equals_a_loop_over_tokens(sizes, bad, k, m):
    """Rows with an unusable token are left out and handed back."""
    rng = np.random.default_rng([k, m, *sizes, *bad])
    batch, result = random_batch(rng, sizes), random_result(rng, sum(sizes), k, m)
    starts = np.cumsum([0, *sizes])
    for row in bad:
        token = int(rng.integers(starts[row], starts[row + 1]))
        result.usable[token] = False
        result.logsumexp[token] = result.actual_logits[token] = np.nan
    schema = shard_schema(store_tokens=True)
    packed = extract_logits.cpu_postprocess_batch(result, batch, schema=schema)
    assert packed.table.select(schema.names).schema.equals(schema, check_metadata=True)
    assert [row.index for row in packed.unusable] == [batch.rows[row].index for row in bad]
    for row, wanted in zip(packed.table.to_pylist(), pack_by_loops(result, batch), strict=True):
        for name in ("_mass", "_actual"):
            assert row.pop(name) == pytest.approx(wanted.pop(name), rel=1e-6)
        assert row == wanted


def test_depth_results_are_processed_beside_the_caller_and_submit_waits_for_more():
    gate, last, meeting = threading.Event(), threading.Event(), threading.Barrier(3, timeout=30)

    def process(number: int) -> bool:
        if number < 2:
            meeting.wait()
        return (last if number else gate).wait(timeout=30)

    delivered: list[bool] = []
    post = AsyncPostProcessor(process, delivered.append, depth=2)
    post.submit(0)
    post.submit(1)
    meeting.wait()  # both wait for this thread
    third = threading.Thread(target=post.submit, args=(2,))
    third.start()
    third.join(timeout=0.2)
    assert third.is_alive()
    gate.set()
    third.join(timeout=30)
    assert not third.is_alive()
    assert delivered == [True]
    threading.Timer(0.05, last.set).start()
    post.flush()  # of two that are under way
    post.shutdown()
    assert delivered == [True] * 3


@pytest.mark.parametrize("by", ["submit", "flush", "delivery"])
def test_an_error_in_the_background_or_of_delivery_is_raised_in_the_loop(by):
    def divide(number: float) -> float:
        return 1 / number

    delivered: list[float] = []
    before = threading.active_count()
    post = AsyncPostProcessor(divide, divide if by == "delivery" else delivered.append, depth=1)
    post.submit(1)
    post.submit(float("inf") if by == "delivery" else 0)
    with pytest.raises(ZeroDivisionError):
        post.submit(2) if by == "submit" else post.flush()
    assert delivered == ([] if by == "delivery" else [1.0])
    post.submit(5)
    post.shutdown()  # drops what was not delivered
    post.flush()
    assert len(delivered) < 2
    assert threading.active_count() == before

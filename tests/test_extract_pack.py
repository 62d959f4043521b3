"""Section 6 of `extract_logits.py`: results become Arrow rows, beside the next forward."""

from __future__ import annotations

import threading
import time
import tracemalloc
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import explore_logits
from explore_logits import SCHEMA, shard_schema
from extract_logits import (
    AsyncPostProcessor,
    Batch,
    EncodedRow,
    GPUBatchResult,
    cpu_postprocess_batch,
    pack_indices,
    packed_schema,
)

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

    def ids(width: int) -> Any:
        return rng.integers(0, HIGHEST_ID + 1, (n, width)).astype(np.int32)

    def quantized(width: int) -> Any:
        return rng.integers(0, 65536, (n, width)).astype(np.int32)

    def floats() -> Any:
        return rng.normal(size=n).astype(np.float32)

    logsumexp = rng.normal(20, 2, n)
    return GPUBatchResult(
        logsumexp=logsumexp, nucleus_mass=rng.uniform(0.9, 1, n), top_ids=ids(k),
        top_q=quantized(k), top_counts=rng.integers(1, k + 1, n).astype(np.int32),
        top_min=floats(), top_max=floats(), sampled_ids=ids(m), sampled_q=quantized(m),
        sampled_min=floats(), sampled_max=floats(), sampled_counts=np.full(n, m, np.int32),
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
        top_ids: list[int] = []
        tail_ids: list[int] = []
        usable = True
        for t in range(token, token + n):
            usable &= bool(result.usable[t])
            count = int(result.top_counts[t])
            row["top_counts"].append(count)
            for entry in range(count):
                top_ids.append(int(result.top_ids[t, entry]))
                row["top_logits_quantized"].append(int(result.top_q[t, entry]))
            for entry in range(result.sampled_ids.shape[1]):
                tail_ids.append(int(result.sampled_ids[t, entry]))
                row["sampled_logits_quantized"].append(int(result.sampled_q[t, entry]))
            row["top_min"].append(float(result.top_min[t]))
            row["top_max"].append(float(result.top_max[t]))
            if result.sampled_ids.shape[1]:
                row["sampled_min"].append(float(result.sampled_min[t]))
                row["sampled_max"].append(float(result.sampled_max[t]))
            row["logsumexp"].append(float(result.logsumexp[t]))
            row["_mass"] += float(result.nucleus_mass[t])
            row["_actual"] += float(np.exp(result.actual_logits[t] - result.logsumexp[t]))
        token += n
        for name, ids in (("top", top_ids), ("sampled", tail_ids)):
            row[f"{name}_indices_low"] = [i % 65536 for i in ids]
            high = [0] * ((len(ids) + 3) // 4)
            for place, i in enumerate(ids):
                high[place // 4] += (i // 65536) << (2 * (place % 4))
            row[f"{name}_indices_high"] = bytes(high)
        row["input_ids"] = conversation.input_ids.tolist()
        row["token_positions"] = conversation.token_positions.tolist()
        if usable:
            rows.append(row)
    return rows


@pytest.mark.parametrize(("k", "m"), [(1, 0), (7, 1), (255, 24)])
@pytest.mark.parametrize("sizes", [[5], [3, 1, 40, 2], [1, 1, 1], []])
def test_packing_equals_a_loop_over_tokens(sizes: list[int], k: int, m: int) -> None:
    rng = np.random.default_rng([k, m, *sizes])
    batch, result = random_batch(rng, sizes), random_result(rng, sum(sizes), k, m)
    packed = cpu_postprocess_batch(result, batch, schema=shard_schema(store_tokens=True))
    assert_same_rows(packed.table, pack_by_loops(result, batch))
    assert packed.unusable == []


def assert_same_rows(table: pa.Table, wanted: list[dict[str, Any]]) -> None:
    rows = table.to_pylist()
    assert len(rows) == len(wanted)
    for row, other in zip(rows, wanted, strict=True):
        for name in ("_mass", "_actual"):
            assert row.pop(name) == pytest.approx(other.pop(name), rel=1e-6)
        assert row == {name: other[name] for name in row}


@pytest.mark.parametrize("m", [0, 3])
@pytest.mark.parametrize("bad", [[0], [4], [3], [0, 1, 2, 3, 4], [1, 3]])
def test_rows_with_an_unusable_token_are_left_out_and_handed_back(bad: list[int], m: int) -> None:
    sizes = [3, 1, 40, 2, 6]
    starts = np.cumsum([0, *sizes])
    rng = np.random.default_rng([m, *bad])
    batch, result = random_batch(rng, sizes), random_result(rng, sum(sizes), 9, m)
    for row in bad:
        token = int(rng.integers(starts[row], starts[row + 1]))
        result.usable[token] = False
        result.logsumexp[token] = result.actual_logits[token] = np.nan
    packed = cpu_postprocess_batch(result, batch, schema=shard_schema(store_tokens=True))
    assert [row.index for row in packed.unusable] == [batch.rows[row].index for row in bad]
    assert_same_rows(packed.table, pack_by_loops(result, batch))


def test_usable_results_are_packed_without_a_copy_of_all_of_them() -> None:
    sizes, k, m = [40_000], 255, 24
    rng = np.random.default_rng(0)
    batch, result = random_batch(rng, sizes), random_result(rng, sum(sizes), k, m)
    result.top_counts[:] = 1  # nearly nothing of what a copy would hold is kept
    tracemalloc.start()
    cpu_postprocess_batch(result, batch, schema=SCHEMA)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < result.top_ids.nbytes  # 41 MB; 24 MB are the tail's and the mask


@pytest.mark.parametrize("store_tokens", [False, True])
def test_the_schema_is_that_of_a_shard_with_two_figures_behind(store_tokens: bool) -> None:
    schema = shard_schema(store_tokens=store_tokens, settings={"seed": 1})
    rng = np.random.default_rng(0)
    batch, result = random_batch(rng, [2, 3]), random_result(rng, 5, 4, 2)
    table = cpu_postprocess_batch(result, batch, schema=schema).table
    assert table.schema.equals(packed_schema(schema), check_metadata=True)
    assert table.column_names[-2:] == ["_mass", "_actual"]
    assert table.select(schema.names).schema.equals(schema, check_metadata=True)
    table.validate(full=True)
    assert not any(column.null_count for column in table.columns)
    assert pack_indices is explore_logits.pack_indices


# In the background --------------------------------------------------------------------------------


def test_outcomes_are_delivered_in_order_in_the_thread_of_the_caller() -> None:
    delivered: list[tuple[int, bool]] = []
    threads = set()

    def process(number: int, delay_s: float) -> int:
        threads.add(threading.current_thread())
        time.sleep(delay_s)
        return number

    def deliver(number: int) -> None:
        delivered.append((number, threading.current_thread() is threading.main_thread()))

    post = AsyncPostProcessor(process, deliver)
    for number in range(20):
        post.submit(number, 0.003 * (number % 3))
    post.flush()
    post.shutdown()
    assert delivered == [(number, True) for number in range(20)]
    assert threading.main_thread() not in threads


def test_processing_overlaps_with_what_the_caller_does_next() -> None:
    started, released = threading.Event(), threading.Event()

    def process(_: int) -> bool:
        started.set()
        return released.wait(timeout=30)

    delivered: list[bool] = []
    post = AsyncPostProcessor(process, delivered.append)
    post.submit(1)  # returns while the work waits for this thread
    post.submit(2)
    assert started.wait(timeout=30)
    released.set()
    post.flush()
    post.shutdown()
    assert delivered == [True, True]


def test_depth_results_are_processed_at_once_and_submit_waits_for_more() -> None:
    gate, meeting = threading.Event(), threading.Barrier(3, timeout=30)

    def process(number: int) -> bool:
        if number < 2:
            meeting.wait()
        return gate.wait(timeout=30)

    post = AsyncPostProcessor(process, lambda _: None, depth=2)
    post.submit(0)
    post.submit(1)
    meeting.wait()
    third = threading.Thread(target=post.submit, args=(2,))
    third.start()
    third.join(timeout=0.2)
    assert third.is_alive()
    gate.set()
    third.join(timeout=30)
    assert not third.is_alive()
    post.flush()
    post.shutdown()


def divide(number: int) -> float:
    return 1 / number


@pytest.mark.parametrize("by", ["submit", "flush"])
def test_an_error_in_the_background_or_of_delivery_is_raised_in_the_loop(by: str) -> None:
    delivered: list[float] = []
    post = AsyncPostProcessor(divide, delivered.append, depth=1)
    post.submit(1)
    post.submit(0)
    with pytest.raises(ZeroDivisionError):
        post.submit(2) if by == "submit" else post.flush()
    assert delivered == [1.0]
    post.shutdown()
    post = AsyncPostProcessor(divide, divide)
    post.submit(1)
    post.submit(float("inf"))
    with pytest.raises(ZeroDivisionError):
        post.flush()
    post.shutdown()


def test_shutdown_drops_what_was_not_delivered_and_ends_the_thread() -> None:
    delivered: list[float] = []
    before = threading.active_count()
    post = AsyncPostProcessor(divide, delivered.append, depth=5)
    for number in range(1, 5):
        post.submit(number)
    delivered.clear()
    post.shutdown()
    post.flush()
    assert delivered == []
    assert threading.active_count() == before

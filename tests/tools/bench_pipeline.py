"""Where the time of a run goes, stage by stage and all together, before and after.

    python tests/bench_pipeline.py            # a minute on 2 cores; ends in one JSON line
    python tests/bench_pipeline.py 0.5B 8B    # teachers of these shapes, on a GPU
    python tests/bench_pipeline.py --budgets  # batches of 1k to 32k tokens on a CPU, 8 minutes

Teachers have random weights; the head is scaled so that its logits are as peaked as a trained
model's, or flat. Conversations have the lengths of a chat dataset. Without a GPU, times are those
of the processor, which other jobs disturb less. "Before" is the same work as one writes it from the
definition: extraction in float64 over the whole vocabulary, a Python loop over tokens, pandas.
Before any time is printed, extraction is compared with the reference and the shards with what went
into them.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bench_extraction import SEED, TOP_P, VOCAB, K, M, machine
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

sys.path.insert(0, str(Path(__file__).parent.parent))

import extract_logits as el
from explore_logits import encode_conversation, shard_schema, unpack_indices

# (hidden, layers, intermediate, heads, key-value heads), conversations
SHAPES = {
    "tiny": ((64, 2, 256, 4, 2), 6),
    "100M": ((768, 12, 3072, 12, 12), 6),
    "0.5B": ((896, 24, 4864, 14, 2), 2000),
    "8B": ((4096, 36, 12288, 32, 8), 600),
    "32B": ((5120, 64, 25600, 64, 8), 200),
}
SPREADS = {"peaked": 8.0, "flat": 2.0}  # standard deviation of a row of logits, in nats
SETTINGS = {"top_p": TOP_P, "top_p_max": K, "sampled_n": M, "seed": SEED}
BEFORE_TOKENS = 96  # the plain way is timed on so many and scaled
TEACHER = Path(__file__).parent / "teacher"


def make_teacher(shape: str, device: str) -> el.Teacher:
    """Return a teacher of random weights; float32 on a CPU, bfloat16 on a GPU."""
    (hidden, layers, intermediate, heads, kv_heads), _ = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, num_hidden_layers=layers, head_dim=hidden // heads,
        intermediate_size=intermediate, num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=32_768, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(1)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if device == "cpu" else torch.bfloat16
        )
    return el.Teacher(model, vocab_size=VOCAB)


def spread_logits(teacher: el.Teacher, batch: el.Batch, spread: float) -> None:
    """Scale the head so that a row of logits has this standard deviation."""
    with torch.no_grad():
        now = float(next(first_logits(teacher, batch, 64)).std(-1).mean())
        teacher.model.lm_head.weight.mul_(spread / now)


def first_logits(teacher: el.Teacher, batch: el.Batch, count: int) -> Iterator[torch.Tensor]:
    """Yield the first logits of a batch, `count` positions."""
    row = batch.rows[0]
    return teacher.iter_logits([row.input_ids], [row.token_positions[:count]])


def draw_lengths(count: int) -> Any:
    """Return tokens of conversations as chat datasets have them: median 450, few above 4,000."""
    draw = np.random.default_rng(3)
    return draw.lognormal(np.log(450), 1.0, count).astype(int).clip(16, 8192)


def make_batches(count: int, budget: int) -> list[el.Batch]:
    """Return the batches that a run forms of conversations whose last three fifths are wanted."""
    draw, rows = np.random.default_rng(4), []
    lengths = draw_lengths(count)
    for index, length in enumerate(lengths):
        ids = draw.integers(0, VOCAB, length, np.int32)
        rows.append(el.EncodedRow(index, ids, np.arange(2 * length // 5, length, dtype=np.int32)))
    sampler = el.TokenBudgetBatchSampler(lengths, max_batch_tokens=budget)
    return [el.Batch([rows[i] for i in batch]) for batch in sampler]


def padding_share(budget: int, count: int = 20_000) -> float:
    """Return the share of what is processed that is padding, in a dataset of that many."""
    lengths = draw_lengths(count)
    sampler = el.TokenBudgetBatchSampler(lengths, max_batch_tokens=budget)
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in sampler.batches)
    return float(1 - lengths.sum() / padded)


class Clock:
    """Adds up seconds by stage, waiting for the device where there is one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        wait_for_device()
        started = seconds_now()
        yield
        wait_for_device()
        self.seconds[name] += seconds_now() - started


def seconds_now() -> float:
    """Return seconds by the clock beside a GPU, of the processor without: other jobs count less."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_in_turn(teacher: el.Teacher, batches: list[el.Batch], folder: Path) -> dict[str, float]:
    """Run every stage by itself, one after the other, and return the seconds of each."""
    clock, schema = Clock(), bench_schema()
    writer = el.ShardWriter(folder, schema, nucleus_cap=K)
    for batch in batches:
        rows = [torch.from_numpy(row.input_ids.astype(np.int64)) for row in batch.rows]
        wanted = [torch.from_numpy(row.token_positions.astype(np.int64)) - 1 for row in batch.rows]
        with clock.stage("forward"):
            inputs, starts = teacher._lay_out(rows)
            hidden, outputs = teacher._hidden(inputs, el.flatten(wanted, starts))
        size = el.HEAD_CHUNK_BYTES // (4 * VOCAB)
        served = Served(clock, teacher, hidden.split(size), outputs)
        with clock.stage("extraction"):
            result = el.gpu_process_batch(served, batch, **SETTINGS)
        clock.seconds["extraction"] -= served.seconds
        with clock.stage("fetching"):
            host = result.to_host()
        with clock.stage("packing"):
            packed = el.cpu_postprocess_batch(host, batch, schema=schema)
        with clock.stage("encoding"):
            writer.add(packed.table)
            writer._wait(groups=0)
    with clock.stage("encoding"):
        writer.close(folder / "shard.parquet")
    return dict(clock.seconds)


class Served:
    """The head alone, in a teacher's place: its time is taken out of extraction's."""

    def __init__(self, clock: Clock, teacher: el.Teacher, parts: Any, outputs: Any) -> None:
        self.clock, self.teacher, self.parts, self.outputs = clock, teacher, parts, outputs
        self.seconds = 0.0

    def iter_logits(self, *_: Any) -> Iterator[torch.Tensor]:
        for part in self.parts:
            before = self.clock.seconds["head"]
            with self.clock.stage("head"):
                logits = self.teacher._head_logits(part, self.outputs)
            self.seconds += self.clock.seconds["head"] - before
            yield logits


def run_together(
    teacher: el.Teacher, batches: list[el.Batch], folder: Path
) -> tuple[float, float | None]:
    """Run as a run does; return its seconds and the share in which a GPU stood between batches."""
    schema, events = bench_schema(), []
    writer = el.ShardWriter(folder, schema, nucleus_cap=K)

    def deliver(packed: el.PackedBatch) -> None:
        writer.add(packed.table)

    post = el.AsyncPostProcessor(partial(el.fetch_and_pack, schema=schema), deliver)
    wait_for_device()
    started = seconds_now()
    for batch in batches:
        events.append(mark())
        post.submit(batch, el.gpu_process_batch(teacher, batch, **SETTINGS))
        events.append(mark())
    post.flush()
    writer.close(folder / "together.parquet")
    seconds = seconds_now() - started
    post.shutdown()
    if events[0] is None:
        return seconds, None
    pairs = zip(events[1::2], events[2::2], strict=False)  # of one batch's end, the next's start
    idle = sum(end.elapsed_time(start) for end, start in pairs)
    return seconds, idle / events[0].elapsed_time(events[-1])


def mark() -> Any:
    """Return an event on the GPU's time line, None without one."""
    return torch.cuda.current_stream().record_event(
        torch.cuda.Event(enable_timing=True)
    ) if torch.cuda.is_available() else None  # fmt: skip


def bench_schema() -> pa.Schema:
    return shard_schema(
        store_tokens=False, settings={"logit_bits": 16, "vocab_size": VOCAB, "top_p_max": K}
    )


def run_before(teacher: el.Teacher, batch: el.Batch, folder: Path) -> dict[str, float]:
    """Do everything after the head plainly on a few tokens; return seconds per stage and token."""
    logits = next(first_logits(teacher, batch, BEFORE_TOKENS))
    clock, n = Clock(), torch.arange(len(logits), device=logits.device)
    with clock.stage("extraction"):
        got = el.extract_tokens(logits, n * 0, n + 1, **SETTINGS, reference=True)
    with clock.stage("packing"):
        row = pack_by_loop(got)
    with clock.stage("encoding"):
        pd.DataFrame([row]).to_parquet(folder / "before.parquet")
    return {name: seconds / len(logits) for name, seconds in clock.seconds.items()}


def pack_by_loop(got: el.ExtractedTokens) -> dict[str, Any]:
    """Pack token by token in Python, from the definition of the format."""
    row: dict[str, Any] = defaultdict(list)
    row |= {"index": 0, "num_tokens": len(got.logsumexp)}
    high: dict[str, list[int]] = {"top": [], "sampled": []}
    for t in range(len(got.logsumexp)):
        count = int(got.top_counts[t])
        for name, ids, values in (
            ("top", got.top_ids[t, :count].tolist(), got.top_logits[t, :count].tolist()),
            ("sampled", got.sampled_ids[t].tolist(), got.sampled_logits[t].tolist()),
        ):
            low, span = min(values), max(values) - min(values)
            row[f"{name}_indices_low"] += [i & 0xFFFF for i in ids]
            high[name] += [i >> 16 for i in ids]
            row[f"{name}_logits_quantized"] += [
                round((x - low) / span * 65535) if span else 0 for x in values
            ]
            row[f"{name}_min"].append(low)
            row[f"{name}_max"].append(low + span)
        row["top_counts"].append(count)
        row["logsumexp"].append(float(got.logsumexp[t]))
    for name, parts in high.items():
        parts += [0] * (-len(parts) % 4)
        quads = zip(*(parts[i::4] for i in range(4)), strict=True)
        row[f"{name}_indices_high"] = bytes(a | b << 2 | c << 4 | d << 6 for a, b, c, d in quads)
    return dict(row)


def check(teacher: el.Teacher, batch: el.Batch, shard: Path) -> None:
    """Compare extraction with the reference, and the shard with the extraction."""
    logits = next(first_logits(teacher, batch, 48))
    n = torch.arange(len(logits), device=logits.device)
    got, want = (
        el.extract_tokens(logits, n * 0, n + 1, **SETTINGS, reference=plain)
        for plain in (False, True)
    )
    assert got.usable.all()
    assert (got.logsumexp - want.logsumexp).abs().max() < 5e-8
    assert torch.equal(got.top_counts, want.top_counts)
    inside = torch.arange(K, device=logits.device) < want.top_counts.unsqueeze(1)
    assert torch.equal(got.top_ids[inside], want.top_ids[inside])
    host = el.gpu_process_batch(teacher, batch, **SETTINGS).to_host()
    rows = pq.read_table(shard).to_pylist()
    stored = {row["index"]: row for row in rows}
    start = 0
    for row in batch.rows:
        kept = stored[row.index]
        counts = np.asarray(kept["top_counts"])
        ids = unpack_indices(
            np.asarray(kept["top_indices_low"], np.uint16), kept["top_indices_high"], counts
        )
        for t, token_ids in enumerate(ids):
            assert counts[t] == host.top_counts[start + t]
            np.testing.assert_array_equal(token_ids, host.top_ids[start + t, : counts[t]])
        start += counts.size


def best(times: int, run: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return the least seconds of each stage in several runs."""
    runs = [run() for _ in range(times)]
    return {name: min(one[name] for one in runs) for name in runs[0]}


def bench(teacher: el.Teacher, shape: str, kind: str, *, budget: int) -> dict[str, Any]:
    """Measure one teacher with peaked or flat logits."""
    batches = make_batches(SHAPES[shape][1], budget)
    spread_logits(teacher, batches[0], SPREADS[kind])
    wanted = sum(batch.num_tokens for batch in batches)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_in_turn(teacher, batches[-1:], folder)  # warms up
        check(teacher, batches[-1], folder / "shard.parquet")
        stages = best(2, lambda: run_in_turn(teacher, batches, folder))
        together, idle = min(run_together(teacher, batches, folder) for _ in range(2))
        before = run_before(teacher, batches[0], folder)
    return {
        "shape": shape,
        "kind": kind,
        "tokens": sum(row.input_ids.size for batch in batches for row in batch.rows),
        "wanted": wanted,
        "padding": padding_share(budget),
        "stages_s": stages,
        "before_s": before | {n: stages[n] / wanted for n in ("forward", "head")},
        "together_s": together,
        "idle": idle,
        "of_own_rate": (stages["forward"] + stages["head"]) / together,
    }


def print_figures(figures: dict[str, Any]) -> None:
    """Print a table of one teacher: milliseconds per 1,000 stored tokens, before and after."""
    after = {n: s / figures["wanted"] for n, s in figures["stages_s"].items()}
    total, total_before = sum(after.values()), sum(figures["before_s"].values())
    print(
        f"\n{figures['shape']}, {figures['kind']} logits: {figures['tokens']:,} tokens, "
        f"{figures['wanted']:,} of them stored, padding {figures['padding']:.2%} of what is run"
    )
    unit = "ms" if torch.cuda.is_available() else "processor ms"
    print(f"{unit + ' per 1,000 tokens':<28}{'before':>10}{'share':>8}{'after':>10}{'share':>8}")
    for name, seconds in after.items():
        old = figures["before_s"].get(name)
        left = f"{old * 1e6:10,.1f}{old / total_before:8.1%}" if old else " " * 18
        print(f"{name:<28}{left}{seconds * 1e6:10,.1f}{seconds / total:8.1%}")
    print(f"{'one after the other':<28}{total_before * 1e6:10,.1f}{'':8}{total * 1e6:10,.1f}")
    each = figures["together_s"] / figures["wanted"]
    print(f"{'end to end, overlapped':<28}{'':18}{each * 1e6:10,.1f}")
    print(f"end to end runs at {figures['of_own_rate']:.0%} of the rate of forward and head alone")
    if figures["idle"] is not None:
        print(f"the GPU stood idle between batches for {figures['idle']:.2%} of the time")


# Beside the teacher -------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def host_rates() -> dict[str, float]:
    """Return the stored tokens per second that a thread packs, encodes, and the loop hands on.

    The batch has 50,000 tokens of real nuclei: one teacher's, with other ids and levels each time.
    """
    batch, result = repeat_result(16)
    schema, rates = bench_schema(), {}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(3):
            for stage, tokens_per_s in stage_rates(batch, result, schema, Path(name)):
                rates[stage] = max(tokens_per_s, rates.get(stage, 0.0))
    return rates


def stage_rates(
    batch: el.Batch, result: el.GPUBatchResult, schema: pa.Schema, folder: Path
) -> Iterator[tuple[str, float]]:
    """Yield the rate of each stage on the way of one result into a shard."""
    clock = Clock()
    with clock.stage("packing"):
        packed = el.cpu_postprocess_batch(result, batch, schema=schema)
    writer = el.ShardWriter(folder, schema, nucleus_cap=K)
    groups = [packed.table.slice(at, 16) for at in range(0, packed.table.num_rows, 16)]
    with clock.stage("encoding"):
        for group in groups:
            writer._encode([(group, place) for place in range(group.num_rows)])
    for stage, seconds in clock.seconds.items():
        yield stage, batch.num_tokens / seconds
    threads = el.encode_threads()
    started = time.perf_counter()
    writer = el.ShardWriter(folder, schema, nucleus_cap=K)
    writer.add(packed.table)
    writer.close(folder / "rate.parquet")
    yield (
        f"a shard by the clock, {threads} encoding",
        batch.num_tokens / (time.perf_counter() - started),
    )
    yield "the loop, by its own time", loop_rate(batch, result, schema, folder)


def loop_rate(batch: el.Batch, result: el.GPUBatchResult, schema: pa.Schema, folder: Path) -> float:
    """Return the tokens per second of the loop's thread, which hands on and notes rows."""
    uploader = el.StreamingHFUploader(
        str(folder / "out"), schema=schema, settings={"top_p_max": K}, cache_dir=folder / "cache",
        force_restart=True,
    )  # fmt: skip

    def deliver(packed: el.PackedBatch) -> None:
        uploader.add_sample(packed.table)
        if uploader.should_flush():
            uploader.flush()

    post = el.AsyncPostProcessor(
        lambda rows: el.cpu_postprocess_batch(result, rows, schema=schema), deliver
    )
    turns, started = 6, time.thread_time()
    for turn in range(turns):
        rows = [replace(row, index=row.index + 10**6 * turn) for row in batch.rows]
        post.submit(el.Batch(rows))
    post.flush()
    uploader.flush(final=True)
    seconds = time.thread_time() - started
    post.shutdown()
    uploader.shutdown()
    return turns * batch.num_tokens / seconds


def repeat_result(copies: int) -> tuple[el.Batch, el.GPUBatchResult]:
    """Return a batch of peaked logits several times over, no two copies alike."""
    teacher = make_teacher("tiny", "cpu")
    batches = make_batches(SHAPES["tiny"][1], el.DEFAULT_BATCH_TOKENS["cpu"])
    batch = el.Batch([row for one in batches for row in one.rows])
    spread_logits(teacher, batch, SPREADS["peaked"])
    once = el.gpu_process_batch(teacher, batch, **SETTINGS).to_host()
    draw, parts = np.random.default_rng(5), defaultdict(list)
    for copy in range(copies):
        for entry in fields(once):
            values = getattr(once, entry.name)
            if entry.name.endswith("_ids"):
                values = values ^ (67 * copy)
            elif entry.name.endswith("_q"):
                values = values ^ draw.integers(0, 64, values.shape, values.dtype)
            elif values.dtype.kind == "f":
                values = values + draw.normal(0, 0.01, values.shape).astype(values.dtype)
            parts[entry.name].append(values)
    rows = [
        replace(row, index=copy * 1000 + row.index) for copy in range(copies) for row in batch.rows
    ]
    return el.Batch(rows), el.GPUBatchResult(**{n: np.concatenate(p) for n, p in parts.items()})


def tokenizing_rates() -> dict[str, float]:
    """Return the tokens per second that one worker process renders, tokenizes and aligns."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER / "model")
    lines = (TEACHER / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    short = [json.loads(line)["messages"] for line in lines]
    long = join_conversations(short, draw_lengths(100))
    cases = {
        "short, template with marks": (short[:200], None),
        "chat lengths, template with marks": (long, None),
        "chat lengths, template without": (long, CHATML),
    }
    return {name: tokenizing_rate(tokenizer, *case) for name, case in cases.items()}


def join_conversations(chats: list[Any], lengths: Any) -> list[Any]:
    """Return conversations of about these lengths, in tokens, made of several others each."""
    turns = iter(
        message
        for chat in chats * 1000
        for message in chat
        if message["role"] in ("user", "assistant") and isinstance(message["content"], str)
    )
    joined = []
    for length in lengths:
        joined.append([next(turns)])
        while sum(len(m["content"]) for m in joined[-1]) < 4 * length:  # about 4 letters a token
            joined[-1].append(next(turns))
    return joined


def tokenizing_rate(tokenizer: Any, chats: list[Any], template: str | None) -> float:
    """Return the tokens per second of conversations under a template."""
    rate = 0.0
    for _ in range(2):
        started = seconds_now()
        tokens = sum(
            encode_conversation(chat, tokenizer, chat_template=template).input_ids.size
            for chat in chats
        )
        rate = max(rate, tokens / (seconds_now() - started))
    return rate


def print_rates(rates: dict[str, float], tokenizing: dict[str, float]) -> None:
    """Print what one thread or process does in a second."""
    print(f"\n{'of one thread or process':<48}{'tokens/s':>12}")
    for name, rate in (rates | {f"tokenizing, {n}": r for n, r in tokenizing.items()}).items():
        print(f"{name:<48}{rate:12,.0f}")
    cores = el.count_processors()
    print(
        f"a run on these {cores} processors encodes in {el.encode_threads()}, packs in 2 threads "
        f"and tokenizes in {min(el.worker_processes(10**9), max(1, cores * 3 // 4))} processes"
    )


def bench_budgets(shapes: list[str]) -> list[dict[str, Any]]:
    """Measure the forward pass of conversations of 450 tokens in batches of 1k to 32k tokens."""
    runs: list[dict[str, Any]] = []
    for shape in shapes:
        teacher = make_teacher(shape, "cpu")
        for budget in (1024, 2048, 4096, 8192, 16384, 32768):
            batch = el.longest_batch(budget // 450, 450, VOCAB)
            ids = [torch.from_numpy(row.input_ids.astype(np.int64)) for row in batch.rows]
            repeats, before = max(1, 4096 // budget), peak_memory()
            started = seconds_now()
            for _ in range(repeats):
                inputs, starts = teacher._lay_out(ids)
                teacher._hidden(inputs, torch.tensor(starts))
            rate = repeats * len(ids) * 450 / (seconds_now() - started)
            runs.append(
                {"shape": shape, "budget": budget, "tokens_per_s": rate,
                 "more_memory_mb": peak_memory() - before}
            )  # fmt: skip
            print(
                f"{shape}, batches of {budget:6,} tokens: {rate:8,.0f} tokens/s, "
                f"{runs[-1]['more_memory_mb']:6,.0f} MB more at the peak", flush=True,
            )  # fmt: skip
    return runs


def peak_memory() -> float:
    """Return the largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    usual = ["0.5B", "8B", "32B"] if gpu else ["tiny"]
    parser.add_argument("shapes", nargs="*", default=usual, help=", ".join(SHAPES))
    parser.add_argument("--budgets", action="store_true", help="batch sizes on a CPU, no more")
    args = parser.parse_args()
    figures: dict[str, Any] = {"benchmark": "pipeline", "machine": machine(), "runs": []}
    print("\n".join(f"{name:8} {value}" for name, value in figures["machine"].items()))
    if args.budgets:
        figures["runs"] = bench_budgets(["tiny", "100M"])
        print(json.dumps(figures))
        return
    for shape in args.shapes:
        teacher = make_teacher(shape, "cuda" if gpu else "cpu")
        for kind in SPREADS:
            measured = bench(
                teacher, shape, kind, budget=el.DEFAULT_BATCH_TOKENS[teacher.device.type]
            )
            print_figures(measured)
            figures["runs"].append(measured)
        del teacher
    figures["tokens_per_s"] = host_rates()
    figures["tokenizing_tokens_per_s"] = tokenizing_rates()
    print_rates(figures["tokens_per_s"], figures["tokenizing_tokens_per_s"])
    if not gpu:
        print("no CUDA device: nothing was measured on one")
    assert all(math.isfinite(run["together_s"]) for run in figures["runs"])
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

"""What a whole run costs beside the teacher's bare forward, by the shape of the teacher.

    python tests/tools/bench_pipeline.py    # three sizes on a GPU; a small one, 2 minutes of a CPU

Teachers have the shape of models that people use and random weights, made on the device. Logits are
"flat" as they come, "peaked" where the last norm is scaled until they spread like a trained one's.
The run is what N conversations more take of it, from 2N and N of them, so that start, loading and
first batches do not count. What the columns are: docs/benchmarks.md. Ends in one JSON line.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import torch
from bench import CHATS, TEACHER, best_in_turn, machine, print_head, print_row, timed
from storage_table import encode_rows
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

import extract_logits as el

SPREAD = 4.5  # nats, of a row's logits: a token is torn between some dozens of 150,000
GPU = torch.cuda.is_available()
CONVERSATIONS, BATCH_TOKENS = (600, 32_768) if GPU else (24, 4_096)
DTYPE = "bfloat16" if GPU else "float32"
SHAPES = {  # width, layers, heads, of keys, of a head, inner width, vocabulary
    "small": (256, 4, 4, 2, 64, 1024, 32_000),
    "0.5B": (896, 24, 14, 2, 64, 4864, 151_936),
    "8B": (4096, 36, 32, 8, 128, 12_288, 151_936),
    "32B": (5120, 64, 64, 8, 128, 25_600, 151_936),
}
NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "intermediate_size", "vocab_size")  # fmt: skip


def make_teacher(folder: Path, shape: str) -> Any:
    """Write what a run reads of a teacher beside its weights; return it, made on the device.

    The tokenizer has as many ids as the head.
    """
    shutil.copytree(TEACHER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = dict(zip(NAMES, SHAPES[shape], strict=True))
    tied = {"tie_word_embeddings": shape == "0.5B", "max_position_embeddings": 32_768}
    config = AutoConfig.for_model("qwen3", **sizes, **tied)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    known = len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"])
    tokenizer["model"]["vocab"] |= {f"filler {n}": n for n in range(known, sizes["vocab_size"])}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    torch.manual_seed(0)
    with torch.device("cuda" if GPU else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, DTYPE)).eval()


@torch.no_grad()
def spread_logits(model: Any) -> None:
    """Scale the last norm until logits of random tokens spread like a trained model's."""
    ids = torch.randint(5_000, (4, 64), device=model.device)
    found = model(input_ids=ids).logits.float().std(-1).mean()
    model.model.norm.weight.mul_(SPREAD / found)


def write_chats(path: Path, count: int) -> None:
    """Write conversations whose answers are two to thirty of the embedded ones."""
    lines = CHATS.read_text(encoding="utf-8").splitlines()
    texts = [m["content"] for line in lines for m in json.loads(line)["messages"]]
    said = itertools.cycle(text for text in texts if isinstance(text, str) and text)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            answer = " ".join(itertools.islice(said, 2 + 7 * number % 29))
            messages = [{"role": "user", "content": next(said)},
                        {"role": "assistant", "content": answer}]  # fmt: skip
            file.write(json.dumps({"id": number, "messages": messages}) + "\n")


def clock() -> float:
    """Tell the seconds once the device has done its work."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def forward(model: Any, batch: el.Batch) -> None:
    """Run layers and head as one writes it: padded on the right, wanted positions alone."""
    ids = pad_sequence([torch.from_numpy(row.input_ids).long() for row in batch.rows], True)
    places = [torch.from_numpy(row.token_positions) + n * ids.shape[1] - 1
              for n, row in enumerate(batch.rows)]  # fmt: skip
    states = model.model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    wanted = states.flatten(0, 1)[torch.cat(places).to(model.device)]
    for part in wanted.split(2048):
        model.lm_head(part)


def configure(folder: Path, count: int, output: str) -> el.ExtractionConfig:
    return el.ExtractionConfig(
        model=str(folder / "teacher"), dataset=str(folder / "chats.jsonl"), index_col="id",
        limit=count, output=str(folder / output), cache_dir=str(folder / "cache"), dtype=DTYPE,
        max_batch_tokens=BATCH_TOKENS, force_restart=True,
    )  # fmt: skip


def open_extraction(folder: Path, model: Any) -> Any:
    """Return an extraction by a model, its rows and their batches."""
    job = el.open_job(configure(folder, CONVERSATIONS, "unused"))
    rows = encode_rows(job, CONVERSATIONS)
    extraction = el.Extraction(job, mock.Mock())
    extraction.teacher = el.Teacher(model, vocab_size=job.vocab_size)
    return extraction, rows, list(el.token_budget_batches(job.config, rows, BATCH_TOKENS))


def compare(folder: Path, model: Any, kind: str) -> dict[str, float]:
    """Return the figures of one teacher and kind of rows."""

    def give_teacher(_: Any, __: Any, ___: Any, vocab_size: int | None) -> el.Teacher:
        return el.Teacher(model, vocab_size=vocab_size)

    def run(count: int) -> tuple[float, int]:
        config = configure(folder, count, f"{kind}-{count}")
        with mock.patch.object(el, "make_teacher", give_teacher):
            seconds, summary = timed(lambda: el.run_extraction(config), clock)
        assert summary["exit_code"] == 0, summary
        return seconds, summary["tokens"]

    extraction, _, batches = open_extraction(folder, model)
    ways: dict[str, Callable[[], Any]] = {
        "forward": lambda: [forward(model, batch) for batch in batches],
        "on the device": lambda: [extraction.forward(batch).to_host() for batch in batches],
    }
    best = best_in_turn(ways, 3, clock)
    extraction.close()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    run(8)
    few, many = run(CONVERSATIONS), run(2 * CONVERSATIONS)
    seconds, tokens = (more - less for less, more in zip(few, many, strict=True))
    peak = torch.cuda.max_memory_allocated() / 1e9 if GPU else 0.0
    return {"stored tokens": tokens, **best, "the run": seconds, "tokens/s": tokens / seconds,
            "peak memory, GB": peak}  # fmt: skip


def keep_up(folder: Path, model: Any) -> dict[str, float]:
    """Return stored tokens per processor second of each stage beside the teacher."""
    extraction, rows, batches = open_extraction(folder, model)
    job = extraction.job
    part = next(job.selection.parts(CONVERSATIONS))
    source = list(part.read(range(part.ids.size)))
    pairs = [(extraction.forward(batch).to_host(), batch) for batch in batches]
    extraction.close()

    def pack() -> list[pa.Table]:
        return [el.cpu_postprocess_batch(*pair, schema=job.schema).table for pair in pairs]

    stages: dict[str, Callable[[], Any]] = {
        "tokenizing": lambda: [job.encoder.encode(row, 0) for row in source],
        "packing": pack,
        "encoding": partial(
            el.write_part, folder / "part.parquet", pa.concat_tables(pack()), job.schema
        ),
    }
    tokens = sum(row.token_positions.size for row in rows)
    best = best_in_turn(stages, 3, time.process_time)
    return {name: tokens / seconds for name, seconds in best.items()}


def main() -> None:
    shapes = ["0.5B", "8B", "32B"] if GPU else ["small"]
    print(json.dumps(machine()))
    print_head("teacher", "logits", "stored tokens", "forward, s", "on the device, s", "the run, s",
               "forward / run", "tokens/s", "peak memory, GB")  # fmt: skip
    figures, beside = dict[str, dict[str, float]](), dict[str, dict[str, float]]()
    for shape in shapes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_chats(folder / "chats.jsonl", 2 * CONVERSATIONS)
            model = make_teacher(folder / "teacher", shape)
            for kind in ("flat", "peaked"):
                if kind == "peaked":
                    spread_logits(model)
                found = figures[f"{shape} {kind}"] = compare(folder, model, kind)
                tokens, alone, device_s, run_s, rate, peak = found.values()
                print_row(shape, kind, f"{tokens:,}", f"{alone:.2f}", f"{device_s:.2f}",
                          f"{run_s:.2f}", f"{alone / run_s:.0%}", f"{rate:,.0f}",
                          f"{peak:.1f}")  # fmt: skip
            beside[shape] = keep_up(folder, model)
            del model
    print()
    print_head("teacher", *(f"{name}, tokens/s" for name in beside[shapes[0]]))
    for shape, rates in beside.items():
        print_row(shape, *(f"{rate:,.0f}" for rate in rates.values()))
    print(json.dumps({"pipeline": figures, "tokens per processor second": beside}))


if __name__ == "__main__":
    main()

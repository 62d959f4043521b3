"""What a whole run costs beside the teacher's bare forward, by the shape of the teacher.

    python tests/tools/bench_pipeline.py    # three sizes on a GPU; a small one, 2 minutes of a CPU

Teachers have the shape of models that people use and random weights, made on the device. Logits are
"flat" as they come, "peaked" where the last norm is scaled until they spread like a trained one's.
Conversations are long answers of the embedded ones. For each teacher and kind of rows it times

- forward: the model's own layers over the run's batches, and the head in the model's type at the
  wanted positions, nothing kept;
- on the device: the same batches to nucleus, tail and log-sum-exp, as the run has them;
- the run: what N conversations more take of it, from 2N and N of them; so start, loading and
  first batches do not count, reading, packing and writing do.

Then what stands beside the teacher and must keep up with it: stored tokens that one processor
tokenizes, packs and encodes in a second. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import torch
from bench import CHATS, TEACHER, cpu_seconds, machine, print_head, print_row
from storage_table import encode_rows
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

import extract_logits as el

SPREAD = 4.5  # nats, of a row's logits: a token is torn between some dozens of 150,000
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 1024,
              "vocab_size": 32_000},
    "0.5B": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 4864,
             "vocab_size": 151_936, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12_288,
           "vocab_size": 151_936},
    "32B": {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 25_600,
            "vocab_size": 151_936},
}  # fmt: skip


def make_folder(folder: Path, shape: str) -> None:
    """Write what a run reads of a teacher beside its weights: the tokenizer has as many ids."""
    shutil.copytree(TEACHER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.for_model("qwen3", max_position_embeddings=32_768, **SHAPES[shape])
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    known = len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"])
    new = range(known, SHAPES[shape]["vocab_size"])
    tokenizer["model"]["vocab"] |= {f"filler {number}": number for number in new}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def make_model(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a model of a folder's configuration with random weights, made on the device."""
    torch.manual_seed(0)
    with device:
        config = AutoConfig.from_pretrained(folder)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


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


@contextmanager
def timed(device: torch.device) -> Iterator[Callable[[], float]]:
    """Give a function that returns the seconds that the block took, the device's work included."""
    started, taken = time.perf_counter(), [0.0]
    yield lambda: taken[0]
    if device.type == "cuda":
        torch.cuda.synchronize()
    taken[0] = time.perf_counter() - started


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


def configure(folder: Path, args: Any, count: int, output: str) -> el.ExtractionConfig:
    return el.ExtractionConfig(
        model=str(folder / "teacher"), dataset=str(folder / "chats.jsonl"), index_col="id",
        limit=count, output=str(folder / output), cache_dir=str(folder / "cache"),
        device=args.device, dtype=args.dtype, max_batch_tokens=args.batch_tokens,
        force_restart=True,
    )  # fmt: skip


def open_extraction(
    folder: Path, model: Any, args: Any
) -> tuple[el.Extraction, list[el.EncodedRow], list[el.Batch]]:
    """Return an extraction by a model, its rows and their batches."""
    job = el.open_job(configure(folder, args, args.conversations, "unused"))
    rows = encode_rows(job, args.conversations)
    extraction = el.Extraction(job, mock.Mock())
    extraction.teacher = el.Teacher(model, vocab_size=job.vocab_size)
    return extraction, rows, list(el.token_budget_batches(job.config, rows, args.batch_tokens))


def compare(folder: Path, model: Any, kind: str, args: argparse.Namespace) -> dict[str, float]:
    """Return the figures of one teacher and kind of rows."""
    device = model.device

    def run(count: int) -> tuple[float, int]:
        config = configure(folder, args, count, f"{kind}-{count}")
        with mock.patch.object(el, "make_teacher", give_teacher), timed(device) as seconds:
            summary = el.run_extraction(config)
        assert summary["exit_code"] == 0, summary
        return seconds(), summary["tokens"]

    def give_teacher(_: Any, __: Any, ___: Any, vocab_size: int | None) -> el.Teacher:
        return el.Teacher(model, vocab_size=vocab_size)

    extraction, _, batches = open_extraction(folder, model, args)
    ways: dict[str, Callable[[el.Batch], Any]] = {
        "forward": lambda batch: forward(model, batch),
        "on the device": lambda batch: extraction.forward(batch).to_host(),
    }
    best = dict.fromkeys(ways, 1e9)
    for name, way in [*ways.items()] * (1 + args.repeats):  # the first warms up
        with timed(device) as seconds:
            for batch in batches:
                way(batch)
        best[name] = min(best[name], seconds())
    extraction.close()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run(8)
    few, many = run(args.conversations), run(2 * args.conversations)
    seconds, tokens = (more - less for less, more in zip(few, many, strict=True))
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return {"stored tokens": tokens, **best, "the run": seconds, "tokens/s": tokens / seconds,
            "peak memory, GB": peak}  # fmt: skip


def keep_up(folder: Path, model: Any, args: argparse.Namespace) -> dict[str, float]:
    """Return stored tokens per processor second of each stage beside the teacher."""
    extraction, rows, batches = open_extraction(folder, model, args)
    job = extraction.job
    part = next(job.selection.parts(args.conversations))
    source = list(part.read(range(part.ids.size)))
    pairs = [(extraction.forward(batch).to_host(), batch) for batch in batches]
    extraction.close()

    def pack() -> list[pa.Table]:
        return [el.cpu_postprocess_batch(*pair, schema=job.schema).table for pair in pairs]

    table = pa.concat_tables(pack())
    stages: dict[str, Callable[[], Any]] = {
        "tokenizing": lambda: [job.encoder.encode(row, 0) for row in source],
        "packing": pack,
        "encoding": lambda: el.write_part(folder / "part.parquet", table, job.schema),
    }
    tokens = sum(row.token_positions.size for row in rows)
    best = {name: min(cpu_seconds(work) for _ in range(3)) for name, work in stages.items()}
    return {name: tokens / seconds for name, seconds in best.items()}


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    shapes = ["0.5B", "8B", "32B"] if gpu else ["small"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes)
    parser.add_argument("--conversations", type=int, default=600 if gpu else 24, help="N")
    parser.add_argument("--batch-tokens", type=int, default=32_768 if gpu else 4_096)
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    print(json.dumps(machine()))
    print_head("teacher", "logits", "stored tokens", "forward, s", "on the device, s", "the run, s",
               "forward / run", "tokens/s", "peak memory, GB")  # fmt: skip
    figures, beside = dict[str, dict[str, float]](), dict[str, dict[str, float]]()
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_folder(folder / "teacher", shape)
            write_chats(folder / "chats.jsonl", 2 * args.conversations)
            device = el.resolve_device(args.device)
            model = make_model(folder / "teacher", device, getattr(torch, args.dtype))
            for kind in ("flat", "peaked"):
                if kind == "peaked":
                    spread_logits(model)
                found = figures[f"{shape} {kind}"] = compare(folder, model, kind, args)
                tokens, alone, device_s, run_s, rate, peak = found.values()
                print_row(shape, kind, f"{tokens:,}", f"{alone:.2f}", f"{device_s:.2f}",
                          f"{run_s:.2f}", f"{alone / run_s:.0%}", f"{rate:,.0f}",
                          f"{peak:.1f}")  # fmt: skip
            beside[shape] = keep_up(folder, model, args)
            del model
    print()
    print_head("teacher", *(f"{name}, tokens/s" for name in beside[args.shapes[0]]))
    for shape, rates in beside.items():
        print_row(shape, *(f"{rate:,.0f}" for rate in rates.values()))
    print(json.dumps({"pipeline": figures, "tokens per processor second": beside}))


if __name__ == "__main__":
    main()

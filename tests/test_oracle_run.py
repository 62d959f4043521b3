"""Whole runs of the command, every row checked by the oracle.

The embedded teacher with its conversations of every kind, and random teachers with vocabularies
from 300 to 262,144 ids whose conversations use the lowest and the highest of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import oracle
import pytest
from conftest import TEACHER, chat
from tiny_teachers import save_teacher

import extract_logits


def run_checked(
    folder: Path, model: Path, records: Iterable[Any], *options: object
) -> tuple[Path, oracle.Report]:
    """Run the command in this process; return its output and what the oracle says of every row."""
    dataset, output = folder / "chats.jsonl", folder / "output"
    dataset.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    words = ["--model", model, "--dataset", dataset, "--output", output, *options]
    words += ["--cache-dir", folder / "cache", "--device", "cpu"]
    assert extract_logits.main(list(map(str, words))) == 0
    said = json.loads((output / "extraction_config.json").read_text(encoding="utf-8"))
    conversations = oracle.read_conversations(dataset, said)
    return output, oracle.check_run(output, *oracle.load_reference(str(model)), conversations)


@pytest.fixture
def every_kind(chats) -> list[dict[str, Any]]:
    """Conversations of every subject, with tools and with reasoning, 24 in all."""
    reasoning = [r for r in chats if "reasoning_content" in json.dumps(r["messages"])][:3]
    tools = [r for r in chats if "tool_calls" in json.dumps(r["messages"])][:4]
    return list({r["id"]: r for r in [*reasoning, *tools, *chats[::22]]}.values())[:24]


def test_every_row_of_a_run_of_the_embedded_teacher_is_right(every_kind, tmp_path):
    options = ["--index-col", "id", "--store-tokens", "--upload-every", 9]
    output, report = run_checked(tmp_path, TEACHER, every_kind, *options)
    assert report.rows == 24
    assert len(list(output.glob("data/*.parquet"))) >= 3
    assert (min(report.sizes), max(report.sizes)) == (1, 100)
    assert report.max_logsumexp_error <= 1e-5


@pytest.mark.slow
def test_every_row_of_all_embedded_conversations_is_right(chats, tmp_path):
    _, report = run_checked(tmp_path, TEACHER, chats)
    print(report)
    assert report.rows == 400


OPTIONS = [
    "--reference-extraction --max-batch-size 1 --top-p 0.6",
    "--top-p-max 255 --top-p 0.9999 --sampled-n 3 --logit-bits 6",
    "--top-p 1 --top-p-max 7 --sampled-n 0 --attn eager --max-batch-tokens 300 --seed 7",
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_run_with_other_options_is_right(every_kind, tmp_path, options):
    _, report = run_checked(tmp_path, TEACHER, every_kind[2:7], *options.split())
    assert report.rows == 5


@pytest.mark.parametrize("vocab_size", [300, 262_144])
def test_every_row_of_a_run_of_a_random_teacher_is_right(vocab_size, tmp_path):
    """Padding rows have the largest logits of all, a hundred pairs of ids tie exactly."""
    teacher = save_teacher(
        tmp_path / "teacher", vocab_size, padding=64, twins=vocab_size // 3, seed=vocab_size
    )
    brief = {"role": "system", "content": "Be brief."}
    turns = [*chat("Hi", "Hello"), *chat("A marker.\n", "<|im_start|> is what?")]
    texts = (chat("Four. 四", "Two and two?"), [brief, *turns], chat("…", "Say nothing."))
    records = ({"messages": messages} for messages in texts)
    output, report = run_checked(tmp_path, teacher, records, "--store-tokens")
    assert report.rows == 3
    assert max(report.sizes) > 30
    rows = oracle.read_run(output, oracle.Settings.from_output(output)).values()
    stored = [i for row in rows for part in row["top"] + row["tail"] for i in part.ids]
    assert max(stored) > 0.98 * vocab_size
    assert max(max(row["input_ids"]) for row in rows) == vocab_size - 1

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
from conftest import CHATS as CONVERSATIONS
from conftest import TEACHER as EMBEDDED
from conftest import chat
from tiny_teachers import save_teacher

import extract_logits

BRIEF = {"role": "system", "content": "Be brief."}
SHORT = [
    chat("Four. 四", "Two and two?"),
    [BRIEF, *chat("Hi", "Hello"), *chat("A marker.\n", "<|im_start|> is what?")],
    chat("…", "Say nothing."),
]


def write_conversations(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def run_command(model: Path, dataset: Path, folder: Path, *options: str) -> Path:
    """Run the command in this process; return its output folder."""
    output = folder / "output"
    code = extract_logits.main([
        "--model", str(model), "--dataset", str(dataset), "--output", str(output),
        "--cache-dir", str(folder / "cache"), "--device", "cpu", *options,
    ])  # fmt: skip
    assert code == 0
    return output


def check(model: Path, dataset: Path, output: Path) -> oracle.Report:
    said = json.loads((output / "extraction_config.json").read_text(encoding="utf-8"))
    conversations = oracle.read_conversations(dataset, said)
    return oracle.check_run(output, *oracle.load_reference(str(model)), conversations)


# The embedded teacher -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def every_kind(chats: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write conversations of every subject, with tools and with reasoning, 24 in all."""
    reasoning = [r for r in chats if "reasoning_content" in json.dumps(r["messages"])][:3]
    tools = [r for r in chats if "tool_calls" in json.dumps(r["messages"])][:4]
    chosen = {r["id"]: r for r in [*reasoning, *tools, *chats[::22]]}
    folder = tmp_path_factory.mktemp("source")
    return write_conversations(folder / "some.jsonl", list(chosen.values())[:24])


def test_every_row_of_a_run_of_the_embedded_teacher_is_right(
    every_kind: Path, tmp_path: Path
) -> None:
    options = ["--index-col", "id", "--store-tokens", "--upload-every", "9"]
    output = run_command(EMBEDDED, every_kind, tmp_path, *options)
    report = check(EMBEDDED, every_kind, output)
    assert report.rows == 24
    assert len(list(output.glob("data/*.parquet"))) >= 3
    assert (report.nucleus_min, report.nucleus_max) == (1, 100)
    assert report.max_logsumexp_error <= 1e-5


@pytest.mark.slow
def test_every_row_of_all_embedded_conversations_is_right(tmp_path: Path) -> None:
    output = run_command(EMBEDDED, CONVERSATIONS, tmp_path)
    report = check(EMBEDDED, CONVERSATIONS, output)
    print(json.dumps(report.figures()))
    assert report.rows == 400


@pytest.mark.parametrize(
    "options",
    [
        "--reference-extraction --max-batch-size 1 --top-p 0.6",
        "--top-p-max 255 --top-p 0.9999 --sampled-n 3 --logit-bits 6",
        "--top-p 1 --top-p-max 7 --sampled-n 0 --attn eager --max-batch-tokens 300 --seed 7",
    ],
)
def test_a_run_with_other_options_is_right(every_kind: Path, tmp_path: Path, options: str) -> None:
    lines = every_kind.read_text(encoding="utf-8").splitlines()[2:7]
    few = write_conversations(tmp_path / "few.jsonl", map(json.loads, lines))
    output = run_command(EMBEDDED, few, tmp_path, *options.split())
    assert check(EMBEDDED, few, output).rows == 5


def test_every_row_of_a_run_on_question_and_answer_columns_is_right(tmp_path: Path) -> None:
    records = [
        {"question": "One?", "answer": "Two.", "rules": "Add one.", "number": 900},
        {"question": "Three?", "answer": "Four.\n", "rules": "", "number": 17},
    ]
    dataset = write_conversations(tmp_path / "qa.jsonl", records)
    columns = ["--system-col", "rules", "--index-col", "number"]
    output = run_command(EMBEDDED, dataset, tmp_path, *columns)
    assert check(EMBEDDED, dataset, output).rows == 2


# Random teachers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [300, 262_144])
def test_every_row_of_a_run_of_a_random_teacher_is_right(vocab_size: int, tmp_path: Path) -> None:
    """Padding rows have the largest logits of all, a hundred pairs of ids tie exactly."""
    dataset = write_conversations(tmp_path / "short.jsonl", ({"messages": m} for m in SHORT))
    teacher = save_teacher(
        tmp_path / "teacher", vocab_size, padding=64, twins=vocab_size // 3, seed=vocab_size
    )
    output = run_command(teacher, dataset, tmp_path, "--store-tokens")
    report = check(teacher, dataset, output)
    assert report.rows == 3
    assert report.nucleus_max > 30
    rows = oracle.read_run(output, oracle.Settings.from_output(output))
    stored = [i for r in rows.values() for t in r.tokens for i in t.top.ids + t.tail.ids]
    assert max(stored) > 0.98 * vocab_size
    assert max(max(row.input_ids or []) for row in rows.values()) == vocab_size - 1

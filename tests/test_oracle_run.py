"""Whole runs of the command, every row checked by the oracle.

The embedded teacher with its conversations of every kind, and random teachers with vocabularies
from 300 to 262,144 ids whose conversations use the lowest and the highest of them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from conftest import CHATS as CONVERSATIONS
from conftest import TEACHER as EMBEDDED
from conftest import chat
from tiny_teachers import save_teacher

import extract_logits

SHORT = [
    chat("Four. 四", "Two and two?"),
    [
        {"role": "system", "content": "Be brief."},
        *chat("Hi", "Hello"),
        *chat("A marker.\n", "<|im_start|> is what?"),
    ],
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
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write conversations of every subject, with tools and with reasoning, 24 in all."""
    lines = CONVERSATIONS.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    reasoning = [r for r in records if "reasoning_content" in json.dumps(r["messages"])][:3]
    tools = [r for r in records if "tool_calls" in json.dumps(r["messages"])][:4]
    chosen = {r["id"]: r for r in [*reasoning, *tools, *records[::22]]}
    folder = tmp_path_factory.mktemp("source")
    return write_conversations(folder / "some.jsonl", list(chosen.values())[:24])


def test_every_row_of_a_run_of_the_embedded_teacher_is_right(
    every_kind: Path, tmp_path: Path
) -> None:
    output = run_command(
        EMBEDDED, every_kind, tmp_path,
        "--index-col", "id", "--store-tokens", "--upload-every", "9",
    )  # fmt: skip
    report = check(EMBEDDED, every_kind, output)
    assert report.rows == 24
    assert report.shards >= 3
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
        ["--reference-extraction"],
        ["--max-batch-size", "1", "--top-p", "0.6"],
        ["--top-p-max", "255", "--top-p", "0.9999", "--sampled-n", "3"],
        ["--top-p", "1", "--top-p-max", "7", "--sampled-n", "0"],
        ["--logit-bits", "6"],
        ["--attn", "eager", "--max-batch-tokens", "300", "--seed", "7"],
    ],
    ids=" ".join,
)
def test_a_run_with_other_options_is_right(
    every_kind: Path, tmp_path: Path, options: list[str]
) -> None:
    lines = every_kind.read_text(encoding="utf-8").splitlines()[2:7]
    few = write_conversations(tmp_path / "few.jsonl", map(json.loads, lines))
    output = run_command(EMBEDDED, few, tmp_path, *options)
    assert check(EMBEDDED, few, output).rows == 5


def test_every_row_of_a_run_on_question_and_answer_columns_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        {"question": "One?", "answer": "Two.", "rules": "Add one.", "number": 900},
        {"question": "Three?", "answer": "Four.\n", "rules": "", "number": 17},
    ]
    dataset = write_conversations(tmp_path / "qa.jsonl", records)
    columns = ["--system-col", "rules", "--index-col", "number"]
    output = run_command(EMBEDDED, dataset, tmp_path, *columns)
    capsys.readouterr()
    arguments = ["--model", str(EMBEDDED), "--dataset", str(dataset), "--output", str(output)]
    assert oracle.main(arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 2


# Faults planted in the script ---------------------------------------------------------------------


def position_of_the_token_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take each distribution one position early, as if p stood for p - 1."""
    right = extract_logits.Teacher.iter_logits

    def iter_logits(self: Any, sequences: Any, positions: Any, **options: Any) -> Any:
        early = [np.maximum(p - 1, 1) for p in positions]
        return right(self, sequences, early, **options)

    monkeypatch.setattr(extract_logits.Teacher, "iter_logits", iter_logits)


def logits_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    right = extract_logits.Teacher.iter_logits

    def iter_logits(self: Any, sequences: Any, positions: Any, **options: Any) -> Any:
        for logits in right(self, sequences, positions, **options):
            yield logits.bfloat16().float()

    monkeypatch.setattr(extract_logits.Teacher, "iter_logits", iter_logits)


def change_extraction(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    right = extract_logits.extract_tokens

    def extract_tokens(*args: Any, **options: Any) -> Any:
        return change(right(*args, **options))

    monkeypatch.setattr(extract_logits, "extract_tokens", extract_tokens)


def crossing_token_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    change_extraction(
        monkeypatch, lambda t: dataclasses.replace(t, top_counts=(t.top_counts - 1).clamp(min=1))
    )


def tail_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(tokens: Any) -> Any:
        logits, order = tokens.sampled_logits.sort(dim=1, descending=True)
        ids = tokens.sampled_ids.gather(1, order)
        return dataclasses.replace(tokens, sampled_ids=ids, sampled_logits=logits)

    change_extraction(monkeypatch, change)


def range_of_all_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    right = extract_logits.quantize_rows

    def quantize_rows(values: Any, counts: Any = None, **options: Any) -> Any:
        return right(values, None, **options)

    monkeypatch.setattr(extract_logits, "quantize_rows", quantize_rows)


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (position_of_the_token_itself, "row 0 token 0: logsumexp"),
        (logits_in_bf16, "row 0 token 0: "),
        (crossing_token_left_out, "is below top_p"),
        (tail_sorted, "not drawn by its law"),
        (range_of_all_candidates, "nucleus min"),
    ],
)
def test_a_fault_planted_in_the_script_is_found(
    plant: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [chat("Four, of course. " * 8)]
    dataset = write_conversations(tmp_path / "d.jsonl", ({"messages": m} for m in SHORT + long))
    teacher = save_teacher(tmp_path / "teacher", 300)
    plant(monkeypatch)
    output = run_command(teacher, dataset, tmp_path)
    with pytest.raises(oracle.Violation, match=reason):
        check(teacher, dataset, output)


# Random teachers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [300, 70_000, 262_144])
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
    settings = oracle.Settings.from_output(output)
    _, rows = oracle.read_run(output, settings)
    stored = [i for r in rows.values() for t in r.tokens for i in t.top_ids + t.sampled_ids]
    assert max(stored) > 0.98 * vocab_size
    assert max(max(row.input_ids or []) for row in rows.values()) == vocab_size - 1

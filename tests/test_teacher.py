"""The embedded teacher is a real, trained model, and its conversations exercise every path."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

TEACHER = Path(__file__).parent / "teacher"
MODEL = TEACHER / "model"
sys.path.insert(0, str(TEACHER))

import make_conversations  # noqa: E402
import train_teacher  # noqa: E402

MARGIN_NATS = 2.0
BANDS = [(1, 2), (2, 5), (5, 20), (20, 100), (100, 5_000)]
SCRIPTS = ["ARABIC", "ARMENIAN", "CJK", "CYRILLIC", "DEVANAGARI", "GEORGIAN", "GREEK", "HANGUL"]
SCRIPTS += ["HEBREW", "HIRAGANA", "KATAKANA", "THAI"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    lines = (TEACHER / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def encoded(rows: list[dict[str, Any]], tokenizer: Any) -> list[train_teacher.Encoded]:
    return train_teacher.encode_all(rows, tokenizer, longest=1_024)


# 1 Conversations ----------------------------------------------------------------------------------


def test_committed_conversations_are_what_the_script_writes(rows: list[dict[str, Any]]) -> None:
    assert rows == make_conversations.make_held_out()


def test_every_row_is_a_conversation_with_an_assistant_turn(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 400
    for row in rows:
        assert list(row) == ["id", "subject", "messages"]
        assert row["messages"][-1]["role"] == "assistant"
        assert {turn["role"] for turn in row["messages"]} <= {"system", "user", "assistant", "tool"}
        assert all(isinstance(turn["content"], str) for turn in row["messages"])
    ids = {row["id"] for row in rows}
    assert len(ids - set(range(400))) == 400  # unique, and no row numbers


def test_no_held_out_conversation_is_trained_on(rows: list[dict[str, Any]]) -> None:
    held_out = {make_conversations.key_of(row["messages"]) for row in rows}
    training = make_conversations.make_training(seed=1, count=2_000)
    assert not held_out & {make_conversations.key_of(row["messages"]) for row in training}


def test_conversations_hold_every_kind_of_turn(rows: list[dict[str, Any]]) -> None:
    turns = [turn for row in rows for turn in row["messages"]]
    lengths = [len(row["messages"]) for row in rows]
    assert lengths.count(2) > 100
    assert sum(length > 4 for length in lengths) > 50
    for role in ("system", "tool"):
        assert sum(turn["role"] == role for turn in turns) > 30
    assert sum("tool_calls" in turn for turn in turns) > 30
    assert any("reasoning_content" in turn for turn in turns)
    assert any("<think>" in turn["content"] for turn in turns)


def test_conversations_are_written_in_many_scripts(rows: list[dict[str, Any]]) -> None:
    letters = {letter for row in rows for turn in row["messages"] for letter in turn["content"]}
    assert set(SCRIPTS) <= {unicodedata.name(letter, "?").split()[0] for letter in letters}


def test_lengths_are_mixed(encoded: list[train_teacher.Encoded]) -> None:
    lengths = np.array([len(sample.input_ids) for sample in encoded])
    assert len(lengths) == 400  # none is longer than the model
    assert lengths.min() < 20
    assert np.sum(lengths > 250) >= 10
    assert lengths.max() > 400


# 2 Tokenizer and template -------------------------------------------------------------------------


def test_tokenizer_cuts_text_as_it_did_in_training(tokenizer: Any) -> None:
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1 == 4_999
    assert len(tokenizer("731", add_special_tokens=False)["input_ids"]) == 1
    for text in ("Ἀθῆναι 🚀 नमस्ते", "  def f(x):\n\treturn x\n", "\x00\uffff"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.eos_token == "<|im_end|>"


def test_generated_text_and_tokens_are_the_assistant_turns_up_to_their_end(
    rows: list[dict[str, Any]], encoded: list[train_teacher.Encoded], tokenizer: Any
) -> None:
    turn_pattern = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)\n", re.DOTALL)
    for row, sample in zip(rows, encoded, strict=True):
        text, spans = train_teacher.render(row, tokenizer.chat_template)
        expected = "".join(text[first:last] for first, last in spans)
        assert tokenizer.decode(sample.input_ids[sample.generated]) == expected
        turns = [match.span(1) for match in turn_pattern.finditer(text)]
        assert [tuple(span) for span in spans] == turns
        assert len(turns) == sum(turn["role"] == "assistant" for turn in row["messages"])


def test_conversations_render_the_same_after_a_trip_through_datasets(
    rows: list[dict[str, Any]], tokenizer: Any, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        "json", data_files=str(TEACHER / "conversations.jsonl"), cache_dir=str(tmp_path)
    )["train"]
    for row, again in zip(rows, loaded, strict=True):
        assert row["id"] == again["id"]
        rendered = train_teacher.render(again, tokenizer.chat_template)
        assert rendered == train_teacher.render(row, tokenizer.chat_template)


def test_template_renders_tools_and_the_start_of_a_turn(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(
        messages, tools=[{"name": "f"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        '<|im_start|>system\nBe kind.\n\nYou can call these tools:\n{"name": "f"}<|im_end|>\n'
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(Exception, match="no such role: narrator"):
        tokenizer.apply_chat_template([{"role": "narrator", "content": "x"}], tokenize=False)


# 3 Model ------------------------------------------------------------------------------------------


def test_held_out_loss_is_as_stated_and_far_below_the_unigram_entropy(
    model: PreTrainedModel, encoded: list[train_teacher.Encoded]
) -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 6_000_000
    readme = (TEACHER / "README.md").read_text(encoding="utf-8")
    (stated,) = (json.loads(line) for line in readme.splitlines() if line.startswith('{"'))
    measured = train_teacher.evaluate(model, encoded)
    assert measured["held_out_loss"] < measured["unigram_entropy"] - MARGIN_NATS
    for name, value in measured.items():
        assert stated[name] == pytest.approx(value, abs=0.002), name


def test_nuclei_spread_from_one_token_to_beyond_the_cap(
    model: PreTrainedModel, encoded: list[train_teacher.Encoded], tokenizer: Any
) -> None:
    sizes = train_teacher.nucleus_sizes(model, encoded[:60], vocab_size=len(tokenizer))
    shares = [np.mean((sizes >= low) & (sizes < high)) for low, high in BANDS]
    assert min(shares) > 0.01, dict(zip(BANDS, shares, strict=True))

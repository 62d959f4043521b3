"""The embedded teacher is a real, trained model, and its conversations exercise every path."""

import json
import sys
import unicodedata

import numpy as np
import oracle
import pytest
from conftest import TEACHER as MODEL

TEACHER = MODEL.parent
sys.path.insert(0, str(TEACHER))

import make_conversations  # noqa: E402
import train_teacher  # noqa: E402

SCRIPTS = ["ARABIC", "ARMENIAN", "CJK", "CYRILLIC", "DEVANAGARI", "GEORGIAN", "GREEK", "HANGUL"]
SCRIPTS += ["HEBREW", "HIRAGANA", "KATAKANA", "THAI"]


@pytest.fixture(scope="module")
def teacher():
    return oracle.load_reference(str(MODEL))


@pytest.fixture(scope="module")
def encoded(chats, teacher):
    return train_teacher.encode_all(chats, teacher[1])


def test_committed_conversations_are_what_the_script_writes(chats):
    assert chats == make_conversations.make_held_out()
    training = make_conversations.make_training(seed=1, count=2_000)
    keys = (
        {make_conversations.key_of(row["messages"]) for row in rows} for rows in (chats, training)
    )
    assert set.isdisjoint(*keys), "a held-out conversation is trained on"


def test_conversations_hold_every_kind_of_turn_length_and_script(chats, encoded):
    for row in chats:
        assert list(row) == ["id", "subject", "messages"]
        assert row["messages"][-1]["role"] == "assistant"
    assert len({row["id"] for row in chats} - set(range(400))) == 400  # unique, no row numbers
    turns = [turn for row in chats for turn in row["messages"]]
    sizes = [len(row["messages"]) for row in chats]
    assert sizes.count(2) > 100
    assert sum(size > 4 for size in sizes) > 50
    for role in ("system", "tool"):
        assert sum(turn["role"] == role for turn in turns) > 30
    assert sum("tool_calls" in turn for turn in turns) > 30
    assert any("reasoning_content" in turn for turn in turns)
    assert any("<think>" in turn["content"] for turn in turns)
    letters = {letter for turn in turns for letter in turn["content"]}
    assert set(SCRIPTS) <= {unicodedata.name(letter, "?").split()[0] for letter in letters}
    lengths = np.array([len(sample.input_ids) for sample in encoded])
    assert len(lengths) == 400  # none is longer than the model
    assert lengths.min() < 20
    assert np.sum(lengths > 250) >= 10
    assert lengths.max() > 400


def test_held_out_loss_is_as_stated_and_far_below_the_unigram_entropy(teacher, encoded):
    assert (MODEL / "model.safetensors").stat().st_size <= 6_000_000
    readme = (TEACHER / "README.md").read_text(encoding="utf-8")
    (stated,) = (json.loads(line) for line in readme.splitlines() if line.startswith('{"'))
    measured = train_teacher.evaluate(teacher[0], encoded)
    assert measured["held_out_loss"] < measured["unigram_entropy"] - 2.0
    for name, value in measured.items():
        assert stated[name] == pytest.approx(value, abs=0.002), name


def test_nuclei_spread_from_one_token_to_beyond_the_cap(teacher, encoded):
    assert len(teacher[1]) == train_teacher.VOCAB
    sizes = train_teacher.nucleus_sizes(teacher[0], encoded[:60])
    assert min(np.histogram(sizes, (1, 2, 5, 20, 100, 5_000))[0]) > 0.01 * len(sizes)

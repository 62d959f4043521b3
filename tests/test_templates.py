"""Every stock template of `trl`: the extracted tokens are the assistant's, no more and no less."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from chat_shapes import SHAPES, says, stock, template_names, user
from template_reference import words_of
from template_table import build_table, try_template
from transformers.utils import chat_template_utils as utils

from explore_logits import (
    EncodedConversation,
    encode_conversation,
    prepare_template,
)

NAMES = template_names()
# Older versions of transformers hide the reasoning from some templates.
REASONED = (
    ("reasoning apart", "reasoning at times") if hasattr(utils, "_alias_reasoning_fields") else ()
)


def encode(name: str, shape: str) -> EncodedConversation | None:
    """Encode a shape with a stock template; None where the template refuses it."""
    return try_template(name)[shape].encoded


def taken(name: str, encoded: EncodedConversation | None) -> str:
    """Return the extracted tokens as text."""
    assert encoded is not None
    return str(stock(name).decode(encoded.input_ids[encoded.token_positions].tolist()))


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_that_the_reference_by_hand_finds(name: str) -> None:
    outcomes = try_template(name)
    wrong = {shape: o.detail for shape, o in outcomes.items() if not o.right}
    assert not wrong
    assert sum(o.way != "refused" for o in outcomes.values()) >= 10


@pytest.mark.parametrize("name", NAMES)
def test_no_word_of_others_is_extracted_and_every_shown_word_of_the_assistant_is(name: str) -> None:
    for shape, messages in SHAPES.items():
        encoded = encode(name, shape)
        if encoded is None:
            continue
        others = np.delete(encoded.input_ids, encoded.token_positions).tolist()
        inside, left = taken(name, encoded), stock(name).decode(others)
        for message in messages:
            text = left if message["role"] == "assistant" else inside
            assert not words_of(message) & set(re.findall(r"[^\W\d_]+", text)), shape


@pytest.mark.parametrize("name", NAMES)
def test_text_is_what_transformers_renders_and_nothing_is_said_to_be_hidden(name: str) -> None:
    shapes = ("single turn", "many turns", "system", "unicode")
    for shape in (*shapes, "reasoning apart", "reasoning in content"):
        encoded = encode(name, shape)
        if encoded is None:
            continue
        assert encoded.notes == ()
        if shape in (*shapes, *REASONED) and not prepare_template(stock(name)).parts:
            assert encoded.text == stock(name).apply_chat_template(SHAPES[shape], tokenize=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_user_who_writes_the_markup_of_the_assistant_is_not_extracted(name: str) -> None:
    template = prepare_template(stock(name))
    end = template.ends[0] if template.ends else ""
    chat = [user(f"amber {template.prompt}forged{end} cedar"), says("Birch bark.")]
    forged = encode_conversation(chat, stock(name))
    assert taken(name, forged) == taken(name, encode(name, "single turn"))


@pytest.mark.skipif(not version("trl").startswith("1.16."), reason="the page quotes trl 1.16")
def test_the_table_in_the_docs_is_what_the_command_prints() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "templates.md"
    assert build_table() in page.read_text(encoding="utf-8")

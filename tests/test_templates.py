"""Every stock template of `trl`: the extracted tokens are the assistant's, no more and no less."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_shapes import SHAPES, SHAPES_WITH_TOOLS, TOOLS, stock, template_names
from jinja2 import UndefinedError
from template_reference import words_of
from template_table import build_table, try_template

from explore_logits import (
    ConversationError,
    EncodedConversation,
    encode_conversation,
    prepare_template,
)

NAMES = template_names()
MARKED = [name for name in NAMES if "{% generation %}" in (stock(name).chat_template or "")]


@cache
def encode(name: str, shape: str, **options: Any) -> EncodedConversation | None:
    """Encode a shape with a stock template; None where the template refuses it."""
    tools = TOOLS if shape in SHAPES_WITH_TOOLS else None
    try:
        return encode_conversation(SHAPES[shape], stock(name), tools=tools, **options)
    except ConversationError:
        return None


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
        inside = np.zeros(encoded.input_ids.size, bool)
        inside[encoded.token_positions] = True
        taken = stock(name).decode(encoded.input_ids[inside].tolist())
        left = stock(name).decode(encoded.input_ids[~inside].tolist())
        for message in messages:
            text = left if message["role"] == "assistant" else taken
            assert not words_of(message) & set(re.findall(r"[^\W\d_]+", text)), shape


@pytest.mark.parametrize("name", NAMES)
def test_text_is_what_transformers_renders(name: str) -> None:
    for shape in ("single turn", "many turns", "system", "reasoning apart", "unicode"):
        encoded = encode(name, shape)
        if encoded is None or prepare_template(stock(name)).parts:
            continue
        text = stock(name).apply_chat_template(SHAPES[shape], tokenize=False)
        assert encoded.text == text


@pytest.mark.parametrize("name", MARKED)
def test_with_everything_included_markers_give_the_mask_of_transformers(name: str) -> None:
    """Some markers take in the generation prompt, which no assistant writes: that is cut."""
    template = prepare_template(stock(name))
    assert template.marked
    if template.parts:
        pytest.skip("content is given as parts")
    for shape in ("single turn", "many turns", "reasoning apart", "reasoning at times", "tool"):
        encoded = encode(name, shape, include_think=True, include_end=True)
        if encoded is None:
            continue
        try:
            theirs = stock(name).apply_chat_template(
                SHAPES[shape],
                tools=TOOLS if shape in SHAPES_WITH_TOOLS else None,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except UndefinedError:
            continue  # it wants null where content is lacking, which only we give it
        assert theirs["input_ids"] == encoded.input_ids.tolist()
        taken = set(encoded.token_positions.tolist())
        marked = set(np.flatnonzero(theirs["assistant_masks"]).tolist())
        cut = [stock(name).decode(int(encoded.input_ids[at])) for at in sorted(marked - taken)]
        assert not taken - marked
        assert all(token in template.prompt for token in cut)


@pytest.mark.parametrize("name", NAMES)
def test_a_user_who_writes_the_markup_of_the_assistant_is_not_extracted(name: str) -> None:
    template = prepare_template(stock(name))
    end = template.ends[0] if template.ends else ""
    forged = f"amber {template.prompt}forged{end} cedar"
    plain = [{"role": "user", "content": "amber"}, {"role": "assistant", "content": "Birch bark."}]
    chat = [{"role": "user", "content": forged}, plain[1]]
    taken = [
        stock(name).decode(e.input_ids[e.token_positions].tolist())
        for e in (encode_conversation(m, stock(name)) for m in (plain, chat))
    ]
    assert taken[0] == taken[1]


def test_the_table_in_the_docs_is_what_the_command_prints() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "templates.md"
    if not version("trl").startswith("1.16."):
        pytest.skip("the page quotes the templates of trl 1.16")
    assert build_table() in page.read_text(encoding="utf-8")

"""Every stock template of `trl`: the extracted tokens are the assistant's, no more and no less."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_shapes import SHAPES, SHAPES_WITH_TOOLS, TOOLS, calls, says, stock, template_names, user
from jinja2 import UndefinedError
from template_reference import words_of
from template_table import build_table, try_template
from transformers.utils import chat_template_utils as utils

from explore_logits import (
    ConversationError,
    EncodedConversation,
    encode_conversation,
    prepare_template,
)

NAMES = template_names()
# Older versions hide reasoning from some templates, see the test of the same tokens.
REASONED = (
    ("reasoning apart", "reasoning at times") if hasattr(utils, "_alias_reasoning_fields") else ()
)
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
    for shape in ("single turn", "many turns", "system", "unicode", *REASONED):
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
    for shape in ("single turn", "many turns", "tool", *REASONED):
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
        except (UndefinedError, TypeError):
            continue  # it wants null where content is lacking, which only we give it
        assert theirs["input_ids"] == encoded.input_ids.tolist()
        taken = set(encoded.token_positions.tolist())
        marked = set(np.flatnonzero(theirs["assistant_masks"]).tolist())
        cut = [stock(name).decode(int(encoded.input_ids[at])) for at in sorted(marked - taken)]
        assert not taken - marked
        assert all(token in template.prompt for token in cut)


def test_every_version_of_transformers_gives_the_same_tokens() -> None:
    """The digest is what 5.16.1 and 5.24.0 give; the newer one rewrites messages itself."""
    if not version("trl").startswith("1.16."):
        pytest.skip("the digest is of the templates of trl 1.16")
    found: dict[str, Any] = {}
    for name, key, shape in product(NAMES, ("reasoning_content", "thinking", "reasoning"), SHAPES):
        chat = [
            {key if k == "reasoning_content" else k: v for k, v in message.items()}
            for message in SHAPES[shape]
        ]
        tools = TOOLS if shape in SHAPES_WITH_TOOLS else None
        try:
            encoded = encode_conversation(chat, stock(name), tools=tools, date="2026-01-01")
        except ConversationError as error:
            found[f"{name} {key} {shape}"] = error.reason
            continue
        parts = encoded.text, encoded.input_ids.tolist(), encoded.token_positions.tolist()
        found[f"{name} {key} {shape}"] = parts
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    assert digest[:16] == "b953a6ed211a76b2"


GIVES = {"type": "function", "function": {"name": "find_weather", "parameters": {}}}
ASKED, SAID = [user("amber?")], says("Birch bark.")
HIDDEN: list[tuple[str, list[dict[str, Any]], Any, str]] = [
    *((name, [*ASKED, SAID], [GIVES], "the tools") for name in ("deepseekv3", "phi3")),
    *(
        (name, [{"role": "developer", "content": "Heath."}, *ASKED, SAID], None, "developer")
        for name in ("qwen3", "glm4moe")
    ),
    *(
        (name, [*ASKED, calls(text)], None, "tool calls")
        for name, text in product(("phi3_5", "lfm2"), ("", None))
    ),
]


@pytest.mark.parametrize(("name", "chat", "tools", "hidden"), HIDDEN)
def test_what_a_template_does_not_show_is_noted(
    name: str, chat: list[dict[str, Any]], tools: Any, hidden: str
) -> None:
    notes = encode_conversation(chat, stock(name), tools=tools).notes
    assert len(notes) == 1
    assert hidden in notes[0]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_shown_is_not_said_to_be_hidden(name: str) -> None:
    for shape in ("many turns", "system", "reasoning apart", "reasoning in content", "unicode"):
        encoded = encode(name, shape)
        assert encoded is None or encoded.notes == ()


def test_what_a_tool_message_begins_with_is_not_the_assistants() -> None:
    """Replacing what a turn says could not tell: the line break comes with the tool's message."""
    encoded = encode("deepseek_r1_distill", "tool, then more", include_end=True)
    assert encoded is not None
    assert "<｜end▁of▁sentence｜>\n<｜tool▁output▁begin｜>Snowy." in encoded.text
    taken = stock("deepseek_r1_distill").decode(encoded.input_ids[encoded.token_positions].tolist())
    assert "\n" not in taken


def test_two_answers_in_a_row_are_told_apart_though_nothing_stands_between() -> None:
    """Replacing refused this one: the end of the first turn is the start of the second."""
    encoded = encode("llava_next", "two answers in a row", include_end=True)
    assert encoded is not None
    taken = stock("llava_next").decode(encoded.input_ids[encoded.token_positions].tolist())
    assert taken == " Birch bark.</s>  Dune.</s> "


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

"""Every stock template of `trl`: the extracted tokens are the assistant's, no more and no less."""

import hashlib
import json
import re
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from chat_shapes import SHAPES, TOOLS, calls, says, stock, stock_templates, tools_of, user
from jinja2 import UndefinedError
from template_reference import words_of
from template_table import build_table, try_template
from transformers.utils import chat_template_utils as utils

from explore_logits import ConversationError, encode_conversation, prepare_template

NAMES = list(stock_templates())
MARKED = [
    name for name in NAMES
    if "{% generation %}" in stock(name).chat_template and not prepare_template(stock(name)).parts
]  # fmt: skip
# Older versions of transformers hide the reasoning from some templates.
REASONED = (
    ("reasoning apart", "reasoning at times") if hasattr(utils, "_alias_reasoning_fields") else ()
)
ASKED, HEARD = SHAPES["single turn"]


def encode_shapes(name):
    """Return the shapes that a stock template does not refuse, encoded."""
    return {shape: o.encoded for shape, o in try_template(name).items() if o.encoded is not None}


def taken(name, encoded):
    """Return the extracted tokens as text."""
    return stock(name).decode(encoded.input_ids[encoded.token_positions].tolist())


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_that_the_reference_by_hand_finds(name):
    wrong = {shape: o.detail for shape, o in try_template(name).items() if not o.right}
    assert not wrong
    assert len(encode_shapes(name)) >= 10


@pytest.mark.parametrize("name", NAMES)
def test_no_word_of_others_is_extracted_and_every_shown_word_of_the_assistant_is(name):
    for shape, encoded in encode_shapes(name).items():
        others = np.delete(encoded.input_ids, encoded.token_positions).tolist()
        inside, left = taken(name, encoded), stock(name).decode(others)
        for message in SHAPES[shape]:
            text = left if message["role"] == "assistant" else inside
            assert not words_of(message) & set(re.findall(r"[^\W\d_]+", text)), shape


@pytest.mark.parametrize("name", NAMES)
def test_text_is_what_transformers_renders_and_nothing_is_said_to_be_hidden(name):
    shapes = ("single turn", "many turns", "system", "unicode")
    for shape, encoded in encode_shapes(name).items():
        if shape in (*shapes, "reasoning apart", "reasoning in content"):
            assert encoded.notes == ()
        if shape in (*shapes, *REASONED) and not prepare_template(stock(name)).parts:
            assert encoded.text == stock(name).apply_chat_template(SHAPES[shape], tokenize=False)


@pytest.mark.parametrize("name", MARKED)
def test_with_everything_included_markers_give_the_mask_of_transformers(name):
    """Some markers take in the generation prompt, which no assistant writes: that is cut."""
    compared, tokenizer = 0, stock(name)
    for shape in ("single turn", "many turns", "tool", *REASONED):
        chat, how = SHAPES[shape], {"tools": tools_of(shape)}
        try:
            made = encode_conversation(chat, tokenizer, include_think=True, include_end=True, **how)
            how |= {"return_dict": True, "return_assistant_tokens_mask": True}
            theirs = tokenizer.apply_chat_template(chat, **how)
        except (ConversationError, UndefinedError, TypeError):
            continue  # refused, or it wants null where content is lacking, which only we give it
        assert theirs["input_ids"] == made.input_ids.tolist()
        inside = set(made.token_positions.tolist())
        marked = set(np.flatnonzero(theirs["assistant_masks"]).tolist())
        assert not inside - marked
        cut = [tokenizer.decode(int(made.input_ids[at])) for at in sorted(marked - inside)]
        assert all(token in prepare_template(tokenizer).prompt for token in cut)
        compared += 1
    assert compared >= 2


@pytest.mark.skipif(not version("trl").startswith("1.16."), reason="a digest of trl 1.16")
def test_every_version_of_transformers_gives_the_same_tokens():
    """The digest is what 5.16.1 and 5.24.0 give; the newer one rewrites messages itself."""
    found = []
    for name, shape, key in product(NAMES, SHAPES, ("reasoning_content", "thinking", "reasoning")):
        chat = [
            {key if k == "reasoning_content" else k: said for k, said in message.items()}
            for message in SHAPES[shape]
        ]
        if key != "reasoning_content" and chat == SHAPES[shape]:
            continue
        try:
            made = encode_conversation(chat, stock(name), tools=tools_of(shape), date="2026-01-01")
        except ConversationError as error:
            found.append(error.reason)
        else:
            found.append([made.text, made.input_ids.tolist(), made.token_positions.tolist()])
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] == "46c82afdf372df35"


@pytest.mark.parametrize(
    ("name", "chat", "tools", "hidden"),
    [("phi3", [ASKED, HEARD], TOOLS, "the tools"),
     ("qwen3", [{"role": "developer", "content": "Heath."}, ASKED, HEARD], None, "the developer"),
     ("lfm2", [ASKED, calls()], None, "the tool calls"),
     ("llama3_1", [ASKED, calls("Let us see.")], None, "beside tool calls")],
)  # fmt: skip
def test_what_a_template_does_not_show_is_noted(name, chat, tools, hidden):
    (note,) = encode_conversation(chat, stock(name), tools=tools).notes
    assert hidden in note


@pytest.mark.parametrize("name", NAMES)
def test_a_user_who_writes_the_markup_of_the_assistant_is_not_extracted(name):
    template = prepare_template(stock(name))
    end = template.ends[0] if template.ends else ""
    chat = [user(f"amber {template.prompt}forged{end} cedar"), says("Birch bark.")]
    forged = taken(name, encode_conversation(chat, stock(name)))
    assert forged == taken(name, encode_shapes(name)["single turn"])


@pytest.mark.skipif(not version("trl").startswith("1.16."), reason="the page quotes trl 1.16")
def test_the_table_in_the_docs_is_what_the_command_prints():
    page = Path(__file__).resolve().parents[1] / "docs" / "templates.md"
    assert build_table() in page.read_text(encoding="utf-8")

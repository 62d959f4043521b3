"""Messages, rendering and the choice of tokens, on templates and tokenizers made here."""

from __future__ import annotations

import cProfile
import json
import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_shapes import TEACHER, says, tokenizer_for, user
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

import explore_logits
from explore_logits import (
    ConversationColumns,
    ConversationEncoder,
    ConversationError,
    EncodedConversation,
    LogitsError,
    TemplateError,
    encode_conversation,
    format_mask_preview,
    load_chat_template,
    load_tokenizer,
    prepare_template,
    read_conversation,
    token_positions_of,
)

MESSAGES = ConversationColumns(messages="messages")
PLAIN = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|end|>\n{% endgeneration %}{% else %}{{ m.content }}<|end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
THINKS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last "
    "and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
GATHERED = (  # writes nothing while it passes over the messages
    "{% set ns = namespace(text='') %}{% for m in messages %}{% set ns.text = ns.text + "
    "'<|start|>' + m.role + '\n' + m.content + '<|end|>\n' %}{% endfor %}{{ ns.text }}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CHAT = [user("amber?"), says("Birch bark."), user("cedar?"), says("Dune.")]


def extracted(messages: list[dict[str, Any]], template: str, **options: Any) -> list[str]:
    """Return the extracted stretches of a conversation as text."""
    tokenizer = tokenizer_for(template)
    encoded = encode_conversation(messages, tokenizer, **options)
    runs = np.split(
        encoded.token_positions, np.flatnonzero(np.diff(encoded.token_positions) > 1) + 1
    )
    return [tokenizer.decode(encoded.input_ids[run].tolist()) for run in runs]


# Rows to messages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]',
        {"role": ["user", "assistant"], "content": ["a", "b"]},
        [
            {"role": "user", "content": [{"type": "text", "text": "a"}], "name": None},
            {"role": "assistant", "content": ["b"], "tool_calls": [], "reasoning_content": None},
        ],
        np.array([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
    ],
)
def test_both_dialects_and_every_way_of_storing_them_give_the_same_messages(value: Any) -> None:
    assert read_conversation({"messages": value}, MESSAGES).messages == [user("a"), says("b")]


@pytest.mark.parametrize(
    ("role", "names"),
    [
        ("user", "user human Human HUMAN prompter"),
        ("assistant", "assistant Assistant gpt bot model function_call tool_call"),
        ("tool", "tool observation function tool_response Function"),
        ("system", "system System"),
        ("critic", "critic"),
    ],
)
def test_roles_are_known_by_their_usual_names_in_any_case(role: str, names: str) -> None:
    row = {"messages": [{"from": name, "value": "x"} for name in names.split()]}
    assert {message["role"] for message in read_conversation(row, MESSAGES).messages} == {role}


def test_parts_of_text_are_joined_and_parts_of_reasoning_are_reasoning() -> None:
    parts = [
        {"type": "reasoning", "text": "the user "},
        {"type": "thinking", "thinking": "greets"},
        {"type": "text", "text": "y"},
        {"type": "output_text", "text": "o"},
    ]
    asked = [{"type": "input_text", "text": "h"}, "i"]
    row = {"messages": [user("") | {"content": asked}, says("") | {"content": parts}]}
    expected = [user("hi"), says("yo", reasoning_content="the user greets")]
    assert read_conversation(row, MESSAGES).messages == expected
    thinks = {"messages": [user("hi"), says("") | {"content": parts[:2]}]}
    assert "content" not in read_conversation(thinks, MESSAGES).messages[1]
    twice = {"messages": [user("hi"), says("", reasoning="other") | {"content": parts}]}
    with pytest.raises(ConversationError, match="reasoning twice"):
        read_conversation(twice, MESSAGES)


def test_nulls_are_taken_for_arrows_where_nobody_knows_better() -> None:
    call = {"function": {"name": "f", "arguments": {"town": "Lima", "day": None}}, "id": None}
    row = {"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [call]}]}
    assert read_conversation(row, MESSAGES).messages[1] == {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": {"town": "Lima"}}}],
    }
    assert read_conversation(row, MESSAGES, {}).messages[1] == {
        "role": "assistant",
        "tool_calls": [call],
    }
    text = {"messages": json.dumps(row["messages"])}
    assert read_conversation(text, MESSAGES).messages[1] == {
        "role": "assistant",
        "tool_calls": [call],
    }


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "null"),
        ([], "empty"),
        ("hello", "malformed"),
        (7, "malformed"),
        (["hello"], "malformed"),
        ([{"content": "a"}], "malformed"),
        ([user("a"), {"role": "assistant", "content": None}], "null"),
        ([user("a"), says(" \n")], "empty"),
        ([user("a"), says("b", content=3)], "malformed"),
        ([user("a") | {"content": [{"type": "image", "url": "x"}]}, says("b")], "not_text"),
        ([user("a") | {"content": [{"type": "image_url", "text": ""}]}, says("b")], "not_text"),
        ({"role": ["user", "assistant"], "content": ["a"]}, "malformed"),
        ({"role": "user", "content": "hi"}, "malformed"),
    ],
)
def test_a_conversation_that_cannot_be_used_says_why(value: Any, reason: str) -> None:
    with pytest.raises(ConversationError) as caught:
        read_conversation({"messages": value}, MESSAGES)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"q": "a", "a": "b", "s": "c"},
            [{"role": "system", "content": "c"}, user("a"), says("b")],
        ),
        ({"q": "a", "a": "b", "s": None}, [user("a"), says("b")]),
        ({"q": "a", "a": "b", "s": "  "}, [user("a"), says("b")]),
        ({"q": 6, "a": 42.5, "s": None}, [user("6"), says("42.5")]),
        ({"q": None, "a": "b", "s": None}, "null"),
        ({"q": float("nan"), "a": "b", "s": None}, "null"),
        ({"q": "a", "a": " ", "s": None}, "empty"),
        ({"q": "a", "a": ["b"], "s": None}, "malformed"),
    ],
)
def test_single_turn_columns_make_a_conversation(row: dict[str, Any], expected: Any) -> None:
    columns = ConversationColumns(user="q", assistant="a", system="s")
    if isinstance(expected, list):
        assert read_conversation(row, columns).messages == expected
        return
    with pytest.raises(ConversationError) as caught:
        read_conversation(row, columns)
    assert caught.value.reason == expected


def test_tools_come_from_a_list_or_from_json() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    text = json.dumps(tool)
    for value in ([tool | {"strict": None}], f"[{text}]", [text]):
        assert read_conversation({"messages": CHAT, "tools": value}, MESSAGES).tools == [tool]
    for value in (None, "[]", []):
        assert read_conversation({"messages": CHAT, "tools": value}, MESSAGES).tools is None
    with pytest.raises(ConversationError):
        read_conversation({"messages": CHAT, "tools": [1]}, MESSAGES)


def encoder_for(template: str, **options: Any) -> ConversationEncoder:
    """Return an encoder of rows with messages."""
    return ConversationEncoder(tokenizer_for(template), template, MESSAGES, **options)


def taken(encoded: EncodedConversation, tokenizer: Any) -> str:
    """Return the extracted tokens as text."""
    return str(tokenizer.decode(encoded.input_ids[encoded.token_positions].tolist()))


@pytest.mark.parametrize(
    ("turns", "weights", "expected"),
    [
        ("all", (None, None), "Birch bark.<|end|>Dune.<|end|>"),
        ("all", (0, 1), "Dune.<|end|>"),
        ("all", (0.0, None), "Dune.<|end|>"),
        ("last", (None, None), "Dune.<|end|>"),
        ("last", (1, 0), None),
    ],
)
def test_turns_and_weights_choose_what_is_extracted(
    turns: str, weights: tuple[Any, Any], expected: str | None
) -> None:
    for template in (PLAIN, MARKED, GATHERED):
        chat = [dict(message) for message in CHAT]
        for message, weight in zip(chat[1::2], weights, strict=True):
            message.update({} if weight is None else {"weight": weight})
        encoder = encoder_for(template, turns=turns)
        if expected is not None:
            encoded = encoder.encode({"messages": chat})
            assert taken(encoded, encoder.tokenizer) == expected
            continue
        with pytest.raises(ConversationError) as refused:
            encoder.encode({"messages": chat})
        assert refused.value.reason == "no_tokens"


@pytest.mark.parametrize("given", [{"effort": "low"}, '{"effort": "low"}', None])
def test_arguments_of_the_template_come_from_the_option_and_the_row(given: Any) -> None:
    template = "Effort {{ effort | default('none') }}, {{ depth }}. " + PLAIN
    encoder = encoder_for(template, template_kwargs={"effort": "high", "depth": 3})
    encoded = encoder.encode({"messages": CHAT, "chat_template_kwargs": given})
    assert encoded.text.startswith(f"Effort {'low' if given else 'high'}, 3. ")
    assert encoder.settings()["template_kwargs"] == {"effort": "high", "depth": 3}
    again = ConversationEncoder.of(encoder.settings(), encoder.tokenizer, template)
    assert again == encoder
    for wrong in ("low", [1], {"messages": []}):
        with pytest.raises(ConversationError) as refused:
            encoder.encode({"messages": CHAT, "chat_template_kwargs": wrong})
        assert refused.value.reason == "malformed"


def test_plain_text_is_extracted_from_the_second_token_on() -> None:
    tokenizer = tokenizer_for(PLAIN)
    columns = ConversationColumns(text="text")
    encoder = ConversationEncoder(tokenizer, "", columns)
    encoded = encoder.encode({"text": "Birch bark. <|end|> dune"})
    assert encoded.input_ids.tolist() == tokenizer("Birch bark. <|end|> dune")["input_ids"]
    assert encoded.token_positions.tolist() == list(range(1, encoded.input_ids.size))
    assert ConversationEncoder.of(encoder.settings(), tokenizer, "") == encoder
    for value, reason in ((None, "null"), (" ", "empty"), ([1], "malformed"), ("B", "no_tokens")):
        with pytest.raises(ConversationError) as refused:
            encoder.encode({"text": value})
        assert refused.value.reason == reason


# What is extracted --------------------------------------------------------------------------------


def test_a_template_that_writes_the_next_message_at_this_one_is_seen_through() -> None:
    ahead = (
        "{% for m in messages %}{% if m.role != 'tool' %}"
        "<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n"
        "{% if loop.nextitem is defined and loop.nextitem.role == 'tool' %}<|start|>tool\n"
        "{{ messages[loop.index0 + 1].content }}<|end|>\n{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    chat = [*CHAT[:2], {"role": "tool", "content": "Rainy."}, says("Elm."), *CHAT[2:]]
    expected = ["Birch bark.<|end|>", "Elm.<|end|>", "Dune.<|end|>"]
    assert extracted(chat, ahead) == expected
    assert encode_conversation(chat, tokenizer_for(ahead)).way == "replacing"
    assert encode_conversation(CHAT, tokenizer_for(ahead)).way == "loop"


def test_a_template_that_copies_messages_is_seen_through() -> None:
    """It joins what the user says in two messages, so that later messages are others."""
    copies = (
        "{% set ns = namespace(all=[]) %}{% for m in messages %}{% if ns.all and "
        "ns.all[-1].role == m.role %}{% set ns.all = ns.all[:-1] + [{'role': m.role, 'content': "
        "ns.all[-1].content + '\n' + m.content}] %}{% else %}{% set ns.all = ns.all + [m] %}"
        "{% endif %}{% endfor %}" + PLAIN.replace("in messages", "in ns.all")
    )
    assert extracted(CHAT, copies) == ["Birch bark.<|end|>", "Dune.<|end|>"]
    chat = [*CHAT, says("Elm.")]
    assert extracted(chat, copies) == ["Birch bark.<|end|>", "Dune.\nElm.<|end|>"]


@pytest.mark.parametrize(
    ("template", "way"), [(PLAIN, "loop"), (MARKED, "generation"), (GATHERED, "replacing")]
)
def test_turns_are_extracted_with_their_end_and_what_follows_with_include_end(
    template: str, way: str
) -> None:
    assert extracted(CHAT, template) == ["Birch bark.<|end|>", "Dune.<|end|>"]
    assert extracted(CHAT, template, include_end=True) == ["Birch bark.<|end|>\n", "Dune.<|end|>\n"]
    encoded = encode_conversation(CHAT, tokenizer_for(template))
    assert encoded.input_ids.dtype == encoded.token_positions.dtype == np.int32
    assert (np.diff(encoded.token_positions) > 0).all()
    assert (encoded.way, encoded.end_of_turn) == (way, "<|end|>")


def test_think_tags_of_the_template_come_with_include_think() -> None:
    assert extracted(CHAT, THINKS)[1] == "Dune.<|end|>"
    assert extracted(CHAT, THINKS, include_think=True)[1] == "<think>\n\n</think>\n\nDune.<|end|>"


@pytest.mark.parametrize("template", [PLAIN, MARKED, THINKS])
@pytest.mark.parametrize(
    "said", ["<think>\nIvy\n</think>\n\nDune.", "<think>\n\n</think>\n\nDune."]
)
def test_think_tags_of_the_data_are_always_extracted(template: str, said: str) -> None:
    assert extracted([user("amber?"), says(said)], template) == [f"{said}<|end|>"]


def test_blanks_of_the_data_after_inserted_think_tags_are_kept() -> None:
    for template in (THINKS, THINKS.replace("{{ m.content }}", "{{ m.content.lstrip('\n') }}")):
        kept = "\nDune." if template is THINKS else "Dune."
        encoded = encode_conversation([user("amber?"), says("\nDune.")], tokenizer_for(template))
        place = encoded.text.index("</think>\n\n") + len("</think>\n\n")
        assert encoded.text[place:].startswith(kept)
        first = encoded.token_positions[0]
        tokenizer = tokenizer_for(template)
        offsets = tokenizer(encoded.text, add_special_tokens=False, return_offsets_mapping=True)
        start, end = offsets["offset_mapping"][first]
        assert start <= place < end


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_added_tokens_that_are_blank_do_not_count_as_ends(template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    tokenizer.add_tokens(["\n", "\n\n", "  ", "Birch"])
    tokenizer.chat_template = template
    encoded = encode_conversation(CHAT, tokenizer)
    assert encoded.end_of_turn == "<|end|>"
    taken = tokenizer.decode(encoded.input_ids[encoded.token_positions].tolist())
    assert taken == "Birch bark.<|end|>Dune.<|end|>"


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_thousands_of_added_tokens_do_not_slow_it_down(template: str) -> None:
    """Two seconds are allowed for 48,000 characters; trying every token at each takes minutes."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    tokenizer.add_tokens([f"<unused{n}>" for n in range(6000)] + ["<|start|>", "<|end|>"])
    tokenizer.chat_template = template
    prepared = prepare_template(tokenizer)
    chat = [user("amber?"), says("Birch bark <and> more. " * 2000 + "<unused7> \n")]
    began = time.process_time()
    rendered = explore_logits.render_conversation(chat, prepared)
    assert time.process_time() - began < 2
    assert len(rendered.spans) == 1


WHOLE_TURN = (  # a role header inside the markers
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|start|>assistant\n"
    "{{ m.content }}<|end|>\n{% endgeneration %}{% else %}<|start|>{{ m.role }}\n"
    "{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
BOTH = ["Birch bark.<|end|>", "Dune.<|end|>"]


@pytest.mark.parametrize(
    ("template", "way", "expected"),
    [
        (WHOLE_TURN, "generation", BOTH),
        (MARKED.replace("<|end|>\n{% endgeneration %}", "{% endgeneration %}<|end|>\n"),
         "generation", BOTH),
        (MARKED.replace("== 'assistant'", "== 'assistant' and m.trained"), "loop", BOTH),
        (MARKED.replace("{{ m.content }}<|end|>\n{% endgeneration %}",
                        "{% endgeneration %}{{ m.content }}<|end|>\n"), "loop", BOTH),
        (MARKED.replace("== 'assistant'", "== 'assistant' and loop.last"), "generation", BOTH[1:]),
    ],
    ids=["a header inside", "an end outside", "nothing marked", "content missed", "turns left out"],
)  # fmt: skip
def test_markers_have_the_say_where_they_mark_what_is_said(
    template: str, way: str, expected: list[str]
) -> None:
    assert encode_conversation(CHAT, tokenizer_for(template)).way == way
    assert extracted(CHAT, template) == expected
    if template is WHOLE_TURN:
        assert extracted([*CHAT, says("Echo.")], template) == [*BOTH, "Echo.<|end|>"]


MARKED_TURN = (
    "<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|end|>{% endgeneration %}\n{% else %}{{ m.content }}<|end|>\n{% endif %}"
)


@pytest.mark.parametrize(
    "template",
    [
        "{% macro turn(m) %}" + MARKED_TURN + "{% endmacro %}"
        "{% for m in messages %}{{ turn(m) }}{% endfor %}",
        "{% for m in messages %}{% set x %}" + MARKED_TURN + "{% endset %}{{ x }}{% endfor %}",
    ],
    ids=["macro", "set"],
)
def test_markers_inside_macros_and_blocks_have_the_say(template: str) -> None:
    assert encode_conversation(CHAT, tokenizer_for(template)).way == "generation"
    assert extracted(CHAT, template) == ["Birch bark.<|end|>", "Dune.<|end|>"]
    last = template.replace("m.role == 'assistant'", "m.role == 'assistant' and m.trained")
    chat = [dict(m, trained=n == 3) for n, m in enumerate(CHAT)]
    assert extracted(chat, last)[-1] == "Dune.<|end|>"


def test_marks_inside_a_block_never_change_what_is_written() -> None:
    """The length of the block is written, which a mark would change: it is told without marks."""
    template = (
        "{% for m in messages %}{% set x %}" + MARKED_TURN + "{% endset %}"
        "{{ x }}{{ x | length }}{% endfor %}"
    )
    text = encode_conversation(CHAT, tokenizer_for(template)).text
    assert text.startswith("<|start|>user\namber?<|end|>\n28<|start|>")


def test_a_template_without_a_generation_prompt_keeps_its_headers_out() -> None:
    template = PLAIN[: PLAIN.index("{% if add")]
    assert extracted(CHAT, template) == ["Birch bark.<|end|>", "Dune.<|end|>"]


@pytest.mark.parametrize(
    ("end", "after"), [("\n### End", "\n"), ("</s>", " "), ("<|x|>", "\n<|y|>")]
)
def test_an_end_of_turn_that_is_plain_text_is_found_too(end: str, after: str) -> None:
    template = PLAIN.replace("<|end|>\n{% endfor %}", end + "{{ '\n' }}{% endfor %}") + (
        after if after.strip() else ""
    )
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    template = prepare_template(tokenizer, template.replace("<|start|>", "### "))
    rendered = explore_logits.render_conversation(CHAT, template)
    taken = [rendered.text[a:b] for a, b in rendered.spans]
    assert taken == [f"Birch bark.{end}", f"Dune.{end}"]


WELL_KNOWN = {
    "mistral": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
        "{% else %}{{ ' ' + m.content|trim + eos_token }}{% endif %}{% endfor %}",
        " {}<eos>",
    ),
    "llama 2": (
        "{% for m in messages %}"
        "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        " {} <eos>",
    ),
    "zephyr": (
        "{% for m in messages %}\n{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
        "{% endfor %}",
        "{}<eos>",
    ),
    "vicuna": (
        "Hello.{% for m in messages %}"
        "{% if m.role == 'user' %}{{ ' USER: ' + m.content }}{% else %}"
        "{{ ' ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}",
        " {}<eos>",
    ),
    "olmo 2": (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
        "{% if m.role == 'user' %}{{ '\n' }}{% else %}{{ eos_token }}"
        "{% if not loop.last %}{{ '\n' }}"
        "{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "{}<eos>",
    ),
    "phi 4": (
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        "{}<|im_end|>",
    ),
    "smollm 3": (
        "{% for m in messages %}"
        "{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
        "{% else %}{% generation %}{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}"
        "{% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "{}<|im_end|>",
    ),
    "deepseek 3.1": (
        "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
        "{% else %}<|Assistant|>"
        "</think>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|></think>{% endif %}",
        "{}<eos>",
    ),
    "always thinking": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        "{}<|im_end|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WELL_KNOWN)
def test_formats_of_well_known_families_give_the_turns(name: str) -> None:
    template, form = WELL_KNOWN[name]
    rendered = explore_logits.render_conversation(CHAT, prepare_template(tokenizer_for(template)))
    taken = [rendered.text[a:b] for a, b in rendered.spans]
    assert taken == [form.format("Birch bark."), form.format("Dune.")]


class Clock(datetime):
    """Stands in for `datetime`: a minute passes whenever somebody looks."""

    looks = 0

    @classmethod
    def now(cls, tz: Any = None) -> Clock:
        """Return the next minute."""
        cls.looks += 1
        return cls(2024, 7, 26, cls.looks // 60 % 24, cls.looks % 60, tzinfo=tz)


def test_a_clock_that_goes_on_while_the_text_is_looked_at_does_no_harm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(explore_logits, "datetime", Clock)
    loop = "{{ strftime_now('%H:%M') }}" + PLAIN + "{{ strftime_now('%M') }}"
    gathered = "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.role + "
    gathered += "': ' + m.content + '<|end|>' %}{% endfor %}{{ strftime_now('%H:%M') + ns.t }}"
    for source in (loop, gathered):
        template = prepare_template(tokenizer_for(source))
        for _ in range(70):
            rendered = explore_logits.render_conversation(CHAT, template)
            taken = [rendered.text[a:b] for a, b in rendered.spans]
            assert taken == ["Birch bark.<|end|>", "Dune.<|end|>"]


def test_a_given_date_is_what_the_template_prints_and_nothing_else_changes() -> None:
    dated = "{{ strftime_now('%d %b %Y, %H:%M') }}" + PLAIN
    tokenizer = tokenizer_for(dated)
    encoded = encode_conversation(CHAT, tokenizer, date="2024-07-26")
    assert encoded.text.startswith("26 Jul 2024, 00:00<|")
    assert encode_conversation(CHAT, tokenizer, date="2025-01-02").text.startswith("02 Jan 2025")
    assert not encode_conversation(CHAT, tokenizer).text.startswith("02 Jan 2025")
    plain = tokenizer_for(PLAIN)
    one, two = (encode_conversation(CHAT, plain, date=date) for date in (None, "2024-07-26"))
    assert one.text == two.text
    assert one.input_ids.tolist() == two.input_ids.tolist()


def test_a_template_that_ends_no_turn_has_no_end() -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    tokenizer = tokenizer_for(template + "{# <|user|><|assistant|> #}")
    encoded = encode_conversation(CHAT, tokenizer)
    taken = tokenizer.decode(encoded.input_ids[encoded.token_positions].tolist())
    assert taken == "Birch bark.Dune."
    assert encoded.end_of_turn is None


def test_the_first_token_is_never_extracted() -> None:
    turn = "{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    encoded = encode_conversation([says("Birch bark.")], tokenizer_for(template))
    assert encoded.token_positions[0] == 1
    assert encoded.token_positions.size == encoded.input_ids.size - 1


def test_arguments_as_an_object_or_as_text_render_alike() -> None:
    template = PLAIN.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.arguments | items | list }}"
        "{% endfor %}",
    )
    texts = []
    for arguments in ({"town": "Lima"}, '{"town": "Lima"}'):
        call = {"function": {"name": "f", "arguments": arguments}}
        messages = [user("amber?"), says("", tool_calls=[call])]
        texts.append(encode_conversation(messages, tokenizer_for(template)).text)
    assert texts[0] == texts[1]
    assert "[('town', 'Lima')]" in texts[0]


MARKUP = ("<|end|>", "<|start|>", "<|start|>assistant\n", "</think>", "\u200d", "👩", " ", "\n")
TEXT = st.lists(
    st.sampled_from(MARKUP) | st.characters(codec="utf-8", exclude_categories=("Cs", "Co")),
    max_size=12,
).map("".join)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), TEXT), min_size=1, max_size=6))
def test_any_content_gives_exactly_what_the_template_says(turns: list[tuple[str, str]]) -> None:
    """The template is simple enough to be written again in Python, spans and all."""
    if not any(role == "assistant" for role, _ in turns):
        return
    text, wanted = "", []
    for role, content in turns:
        text += f"<|start|>{role}\n"
        if role == "assistant":
            wanted.append((len(text), len(text) + len(content) + len("<|end|>")))
        text += f"{content}<|end|>\n"
    messages = [{"role": role, "content": content} for role, content in turns]
    for template in (PLAIN, MARKED):
        rendered = explore_logits.render_conversation(
            messages, prepare_template(tokenizer_for(template))
        )
        assert rendered.text == text
        assert rendered.spans == wanted


# Tokens -------------------------------------------------------------------------------------------


def test_a_token_across_a_border_belongs_to_the_assistant() -> None:
    starts, ends = np.array([0, 2, 4, 4, 6, 9]), np.array([2, 4, 6, 6, 9, 11])
    assert token_positions_of([(5, 6)], starts, ends).tolist() == [2, 3]
    assert token_positions_of([(3, 7)], starts, ends).tolist() == [1, 2, 3, 4]
    assert token_positions_of([(0, 4), (9, 10)], starts, ends).tolist() == [1, 5]


def test_tokens_without_characters_count_inside_a_span_only() -> None:
    starts, ends = np.array([0, 3, 3, 5, 7]), np.array([3, 3, 5, 5, 7])
    assert token_positions_of([(3, 7)], starts, ends).tolist() == [1, 2, 3]
    assert token_positions_of([(0, 3)], starts, ends).tolist() == []
    assert token_positions_of([(5, 6)], starts, ends).tolist() == [3]


def byte_fallback_tokenizer() -> Any:
    """Return a tokenizer like Llama 2's: blanks as ▁, bytes for characters it does not know."""
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyzBD.?",
    ]
    model = models.BPE(
        {piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True
    )
    inner = Tokenizer(model)
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    tokenizer.chat_template = PLAIN
    return tokenizer


@pytest.mark.parametrize("said", ["👩‍🚀", "a 樺 b", "樺", " é"])
def test_all_bytes_of_a_character_are_extracted(said: str) -> None:
    tokenizer = byte_fallback_tokenizer()
    encoded = encode_conversation([user("樺?"), says(said)], tokenizer)
    taken = tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.token_positions].tolist())
    data = b"".join(
        bytes.fromhex(piece[3:5]) if piece.startswith("<0x") else piece.encode() for piece in taken
    )
    assert data.decode().replace("▁", " ").lstrip("\n") == said + "<|end|>"


class SlowTokenizer(PreTrainedTokenizer):
    """A tokenizer without offsets: the fast one's ids, pieces and decoding."""

    def __init__(self, inner: Any, **options: Any) -> None:
        self.inner = inner
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return len(self.inner)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.inner.get_vocab())

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(self.inner.tokenize(text))

    def _convert_token_to_id(self, token: str) -> int:
        return int(self.inner.convert_tokens_to_ids(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self.inner.convert_ids_to_tokens(index))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return str(self.inner.convert_tokens_to_string(tokens))


@cache
def slow_tokenizer() -> SlowTokenizer:
    """Return a slow tokenizer with the plain template."""
    tokenizer = SlowTokenizer(tokenizer_for(PLAIN))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    tokenizer.chat_template = PLAIN
    return tokenizer


@pytest.mark.parametrize(
    "said",
    [
        "Birch bark.",
        "樺 👩‍🚀 é e\u0301 بِرْش",
        "  two  \n\n blanks ",
        "It is \ufffd, you see \ufffd\ufffd.",
    ],
)
def test_a_slow_tokenizer_is_aligned_by_decoding(said: str) -> None:
    messages = [user("amber 🌲?"), says(said)]
    assert not slow_tokenizer().is_fast
    slow = encode_conversation(messages, slow_tokenizer())
    fast = encode_conversation(messages, tokenizer_for(PLAIN))
    assert slow.input_ids.tolist() == fast.input_ids.tolist()
    assert slow.token_positions.tolist() == fast.token_positions.tolist()


def test_a_slow_tokenizer_that_does_not_spell_the_text_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = slow_tokenizer()
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **_: "x" * len(ids))
    with pytest.raises(ConversationError, match="do not spell the text") as refused:
        encode_conversation(CHAT, tokenizer)
    assert refused.value.reason == "unaligned"


# Errors -------------------------------------------------------------------------------------------


def test_a_conversation_without_an_assistant_says_so() -> None:
    with pytest.raises(ConversationError) as caught:
        encode_conversation([user("amber?")], tokenizer_for(PLAIN))
    assert caught.value.reason == "no_assistant"
    with pytest.raises(ConversationError, match="roles critic, user"):
        encode_conversation([user("a"), {"role": "critic", "content": "b"}], tokenizer_for(PLAIN))


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f"}}]])
def test_of_named_templates_the_one_that_transformers_takes_is_taken(tools: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    with_tools = "  {% if tools %}\nTools: {{ tools | tojson }}\n{% endif %}\n" + MARKED + "\n"
    tokenizer.chat_template = {"default": "  {% if 1 %}\n" + PLAIN + "\n{% endif %}\n",
                               "tool_use": with_tools}  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    source = load_chat_template(None, tokenizer)
    encoded = encode_conversation(CHAT, tokenizer, chat_template=source, tools=tools)
    text = tokenizer.apply_chat_template(CHAT, tools=tools, tokenize=False)
    assert encoded.text == text
    assert taken(encoded, tokenizer) == "Birch bark.<|end|>Dune.<|end|>"
    tokenizer.chat_template = {"rag": PLAIN}
    with pytest.raises(TemplateError, match=r"called rag, .*--chat-template"):
        load_chat_template(None, tokenizer)


def test_a_refusal_of_the_template_is_quoted() -> None:
    template = PLAIN + "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}"
    with pytest.raises(ConversationError, match="too long") as caught:
        encode_conversation(CHAT, tokenizer_for(template))
    assert caught.value.reason == "refused_by_template"


@pytest.mark.parametrize(
    "template", ["", "{{ messages[0].content }}", "{{ raise_exception('never') }}", "{{ 1 / 0 }}"]
)
def test_a_template_that_shows_no_assistant_is_refused_for_all(template: str) -> None:
    with pytest.raises(TemplateError, match="--chat-template"):
        encode_conversation(CHAT, tokenizer_for(PLAIN), chat_template=template)


def test_the_template_comes_from_the_file_else_from_the_tokenizer(tmp_path: Any) -> None:
    tokenizer = tokenizer_for(PLAIN)
    assert load_chat_template(None, tokenizer) == PLAIN
    (tmp_path / "t.jinja").write_text(MARKED, encoding="utf-8")
    assert load_chat_template(str(tmp_path / "t.jinja"), tokenizer) == MARKED
    (tmp_path / "t.json").write_text(json.dumps({"chat_template": MARKED}), encoding="utf-8")
    assert load_chat_template(str(tmp_path / "t.json"), tokenizer) == MARKED


def copy_teacher(folder: Path, **config: Any) -> Path:
    """Copy the teacher's tokenizer without its template, with more in its configuration."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((TEACHER / "tokenizer.json").read_bytes())
    ours = json.loads((TEACHER / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(ours | config), encoding="utf-8")
    return folder


def test_a_template_beside_the_tokenizer_is_found(tmp_path: Path) -> None:
    folder = copy_teacher(tmp_path / "teacher")
    with pytest.raises(TemplateError, match="no chat template"):
        load_chat_template(None, load_tokenizer(str(folder)))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": MARKED}))
    assert load_chat_template(None, load_tokenizer(str(folder))) == MARKED


@pytest.mark.parametrize(
    ("code", "trust", "message"),
    [
        ("import no_such_package_x\n", True, "pip install no_such_package_x"),
        ("", False, "--trust-remote-code"),
    ],
)
def test_what_a_tokenizer_with_code_needs_is_named(
    code: str, trust: bool, message: str, tmp_path: Path
) -> None:
    auto = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    folder = copy_teacher(tmp_path / "teacher", auto_map=auto, tokenizer_class="OwnTokenizer")
    source = "from transformers import PreTrainedTokenizer as OwnTokenizer\n"
    (folder / "tokenization_own.py").write_text(code + source)
    with pytest.raises(LogitsError, match=message):
        load_tokenizer(str(folder), trust_remote_code=trust)


def test_a_tokenizer_of_mistral_common_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    with pytest.raises(LogitsError, match=r"mistral-common|tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_what_acts_on_a_terminal_is_shown_in_an_error() -> None:
    template = PLAIN + "{% if messages|length > 2 %}{{ raise_exception('\x1b[2Jno') }}{% endif %}"
    with pytest.raises(ConversationError) as refused:
        encode_conversation(CHAT, tokenizer_for(template))
    assert "\x1b" not in str(refused.value)


def test_a_template_that_cannot_be_used_is_refused_with_the_reason(tmp_path: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match=r"no chat template.*--chat-template"):
        load_chat_template(None, tokenizer)
    with pytest.raises(TemplateError, match=r"none\.jinja"):
        load_chat_template(str(tmp_path / "none.jinja"), tokenizer)
    (tmp_path / "t.jinja").write_text("a\n{% for %}", encoding="utf-8")
    with pytest.raises(TemplateError, match="line 2"):
        load_chat_template(str(tmp_path / "t.jinja"), tokenizer)


def test_a_missing_tokenizer_is_named(tmp_path: Any) -> None:
    with pytest.raises(LogitsError, match="nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_the_reason_survives_the_way_out_of_a_process() -> None:
    error = pickle.loads(pickle.dumps(ConversationError("null", "it is null")))
    assert (error.reason, str(error)) == ("null", "it is null")


# Together -----------------------------------------------------------------------------------------


def test_threads_get_the_spans_of_their_own_conversation() -> None:
    """1,200 conversations over 8 threads; transformers' own mask is wrong in such a test."""
    chats = [[user("amber?" * (n % 7)), says("Birch bark. " * (1 + n % 5))] for n in range(1200)]
    template = prepare_template(tokenizer_for(MARKED))
    alone = [explore_logits.render_conversation(chat, template).spans for chat in chats]
    with ThreadPoolExecutor(8) as pool:
        together = pool.map(
            lambda chat: explore_logits.render_conversation(chat, template).spans, chats
        )
        assert list(together) == alone


def test_the_preview_marks_the_extracted_tokens_and_says_how_they_were_found() -> None:
    tokenizer = tokenizer_for(PLAIN)
    encoded = encode_conversation([user("amber\x1b[2J?"), says("Birch\nbark.")], tokenizer)
    shown = format_mask_preview(encoded, tokenizer)
    assert "⟦Birch⟧\n⟦bark.<|end|>⟧" in shown
    assert "found by what the template writes for each message" in shown.splitlines()[0]
    assert "'<|end|>'" in shown.splitlines()[0]
    count, total = encoded.token_positions.size, encoded.input_ids.size
    assert shown.startswith(f"{count} of {total} tokens extracted")
    assert "\x1b" not in shown
    coloured = format_mask_preview(encoded, tokenizer, color=True)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert plain == shown.replace("⟦", "").replace("⟧", "")
    assert "\x1b[2J" not in coloured


def test_the_preview_cuts_long_stretches() -> None:
    tokenizer = tokenizer_for(PLAIN)
    encoded = encode_conversation([user("amber " * 5000), says("Birch.")], tokenizer)
    shown = format_mask_preview(encoded, tokenizer, max_run_chars=100)
    assert len(shown) < 600
    assert re.search(r"… [\d,]+ characters …", shown)


def test_what_is_far_too_long_is_refused_by_its_first_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """100,000 messages; no turn is looked for, no second token counted."""
    chat = [user("amber?"), says("Birch bark.")] * 50_000
    tokenizer = tokenizer_for(PLAIN)
    short = encode_conversation(chat[:20], tokenizer)
    again = encode_conversation(chat[:20], tokenizer, max_tokens=short.input_ids.size // 3)
    assert again.input_ids.tolist() == short.input_ids.tolist()
    monkeypatch.setattr(explore_logits, "_TurnReader", None)
    with pytest.raises(ConversationError, match="at most 1024 fit") as refused:
        encode_conversation(chat, tokenizer, max_tokens=1024)
    assert refused.value.reason == "too_long"


@pytest.mark.parametrize("template", [PLAIN, MARKED, THINKS])
def test_the_work_is_in_proportion_to_the_messages(template: str) -> None:
    """Counted in calls, which no busy machine changes: 8 times the turns, 10 times the calls."""
    prepared = prepare_template(tokenizer_for(template))

    def calls_for(turns: int) -> int:
        chat = [user("amber?"), says("Birch bark.")] * turns
        profile = cProfile.Profile()
        rendered = profile.runcall(explore_logits.render_conversation, chat, prepared)
        assert len(rendered.spans) == turns
        return sum(entry.callcount for entry in profile.getstats())

    assert calls_for(800) < 10 * calls_for(100)


HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops in a macro": "{% macro f() %}{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}{% endmacro %}{{ f() }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "width given": "{{ '%*d' % (1000000000, 1) }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "center": "{{ 'a'.center(1000000000) }}{{ 'a' | center(1000000000) }}",
    "product": "{{ 'a' * 10 ** 11 }}",
    "list": "{{ ([1] * 10 ** 11) | length }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "doubling": "{% set ns = namespace(t='ab') %}{% for a in range(60) %}"
    "{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "doubling by ~": "{% set ns = namespace(t='ab') %}{% for a in range(60) %}"
    "{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "doubling lists": "{% set ns = namespace(t=[1]) %}{% for a in range(60) %}"
    "{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "join": "{{ (['a' * 9999] * 9999) | join }}",
    "join by much": "{{ ('b' * 99999).join(range(9999) | map('string')) }}",
    "replace": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "replace by a method": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "map of a filter": "{{ ['a'] | map('center', 1000000000) | list }}",
    "the same field often": "{{ ('{0}' * 9999).format('a' * 99999) }}",
    "indented JSON": "{{ {'a': 1} | tojson(indent=1000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list }}",
    "bytes": "{{ 'a'.encode().ljust(1000000000) }}{{ (1).to_bytes(1000000000, 'big') }}",
    "sum": "{{ ([[1] * 9999] * 9999) | sum(start=[]) }}",
    "escape": "{{ ''.__class__.__mro__ }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_sandbox_bounds_what_a_template_does(name: str) -> None:
    with pytest.raises(TemplateError, match=r"cannot be used \(the sandbox") as refused:
        prepare_template(tokenizer_for(PLAIN), HOSTILE[name] + PLAIN)
    assert "\n" not in str(refused.value)
    hidden = PLAIN + "{% if messages|length > 3 %}" + HOSTILE[name] + "{% endif %}"
    with pytest.raises(ConversationError, match="the sandbox of templates") as skipped:
        encode_conversation([*CHAT, *CHAT], tokenizer_for(PLAIN), chat_template=hidden)
    assert skipped.value.reason == "refused_by_template"


def test_widths_and_numbers_that_people_write_are_not_refused() -> None:
    template = (
        "{{ '%5d|%s' % (1700000000, 'x') }}{{ '{:>8} {}'.format(3, 1700000000) }}"
        "{{ '-' * 80 }}{{ 'a' | center(40) }}{{ 2 ** 20 }}{{ 1700000000 * 1000 + 1 }}"
        "{{ {'most': 1700000000} | tojson(indent=4) }}{{ [1700000000, 2] | join(', ') }}" + PLAIN
    )
    assert extracted(CHAT, template) == ["Birch bark.<|end|>", "Dune.<|end|>"]


@pytest.mark.parametrize(
    "template",
    [
        "{% if a %}" * 3000 + "{% endif %}" * 3000 + PLAIN,
        "{% for a in b %}" * 30 + "{% endfor %}" * 30 + PLAIN,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}" + PLAIN,
        "{{ " + "[" * 5000 + "1" + "]" * 5000 + " }}" + PLAIN,
    ],
    ids=["ifs", "loops", "parentheses", "lists"],
)
def test_a_template_that_cannot_be_compiled_is_refused_in_one_line(
    template: str, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(TemplateError, match=r"t\.jinja.*--chat-template"):
        load_chat_template(str(tmp_path / "t.jinja"), tokenizer_for(PLAIN))


def test_a_macro_that_calls_itself_is_refused() -> None:
    endless = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + PLAIN
    with pytest.raises(TemplateError, match="recursion"):
        prepare_template(tokenizer_for(PLAIN), endless)

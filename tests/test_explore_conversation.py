"""Messages, rendering and the choice of tokens, on templates and tokenizers made here."""

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest
from chat_shapes import TEACHER, says, tokenizer_for, user
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer

import explore_logits as explore
from explore_logits import TemplateError, encode_conversation, load_chat_template, read_conversation

MESSAGES = explore.ConversationColumns(messages="messages")
PROMPT = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
HEAD, SAID = "<|start|>{{ m.role }}\n", "{{ m.content }}<|end|>\n"
MARKS = "{% generation %}", "{% endgeneration %}"


def each(turn: str, of: str = "messages") -> str:
    """Return a loop of a template that writes a turn for each message."""
    return f"{{% for m in {of} %}}{turn}{{% endfor %}}"


def branch(assistant: str, other: str = HEAD + SAID) -> str:
    """Return a turn that is written otherwise for the assistant."""
    return "{% if m.role == 'assistant' %}" + assistant + "{% else %}" + other + "{% endif %}"


PLAIN = each(HEAD + SAID) + PROMPT
MARKED = each(HEAD + branch(SAID.join(MARKS), SAID)) + PROMPT
THINKS = each(
    HEAD + "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}<think>\n\n"
    "</think>\n\n{% endif %}" + SAID
) + PROMPT  # fmt: skip
GATHERED = (  # writes nothing while it passes over the messages
    "{% set ns = namespace(text='') %}"
    + each("{% set ns.text = ns.text + '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' %}")
    + "{{ ns.text }}" + PROMPT
)  # fmt: skip
CHAT = [user("amber?"), says("Birch bark."), user("cedar?"), says("Dune.")]
BOTH = ["Birch bark.<|end|>", "Dune.<|end|>"]


def encoder_for(template: str, **options: Any) -> explore.ConversationEncoder:
    return explore.ConversationEncoder(tokenizer_for(template), template, MESSAGES, **options)


def taken(encoded: explore.EncodedConversation, tokenizer: Any) -> str:
    """Return the extracted tokens as text."""
    return str(tokenizer.decode(encoded.input_ids[encoded.token_positions].tolist()))


def render(messages: Any, template: Any, **choice: Any) -> explore.RenderedConversation:
    """Render messages; the template may be its source."""
    if isinstance(template, str):
        template = explore.prepare_template(tokenizer_for(template))
    return explore.render_conversation(messages, template, choice=explore.Choice(**choice))


def spans(*args: Any, **choice: Any) -> list[str]:
    """Return the stretches of rendered text that are the assistant's."""
    rendered = render(*args, **choice)
    return [rendered.text[a:b] for a, b in rendered.spans]


def read(messages: Any, **columns: Any) -> explore.Chat:
    return read_conversation({"messages": messages, **columns}, MESSAGES)


def refusal(function: Any, *args: Any, **options: Any) -> str:
    """Return the reason for which a conversation is refused."""
    with pytest.raises(explore.ConversationError) as refused:
        function(*args, **options)
    return refused.value.reason


# Rows to messages ---------------------------------------------------------------------------------


AB = [user("a"), says("b")]
ROLES = {"HUMAN": "user", "gpt": "assistant", "model": "assistant", "function_call": "assistant",
         "observation": "tool", "System": "system", "critic": "critic"}  # fmt: skip
THOUGHT: Any = [{"type": "reasoning", "text": "they "}, {"type": "thinking", "thinking": "greet"}]
PARTS = [*THOUGHT, {"type": "text", "text": "y"}, {"type": "output_text", "text": "o"}]
CALL = {"name": "f", "arguments": '{"a": null}'}
SHOWN = [user("a"), {"role": "tool", "content": [{"type": "image"}]}, says("b")]


@pytest.mark.parametrize(
    ("value", "expected"),
    [([{"from": name, "value": "a"} for name in ROLES],
      [{"role": role, "content": "a"} for role in ROLES.values()]),
     ('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]', AB),
     ({"role": ["user", "assistant"], "content": ["a", "b"]}, AB),
     ([user("a") | {"name": None}, says(["b"], tool_calls=[], reasoning_content=None)], AB),
     (np.array(AB), AB),
     ([{"role": "user", "content": [{"type": "input_text", "text": "h"}, "i"]}, says(PARTS)],
      [user("hi"), says("yo", reasoning_content="they greet")]),
     (SHOWN, SHOWN),  # what a tool gives is the template's to write
     ([user("a"), says("b", function_call=CALL)],  # a call of old is a tool call
      [user("a"), says("b", tool_calls=[{"type": "function", "function": CALL}])])],
)  # fmt: skip
def test_both_dialects_and_every_way_of_storing_them_are_read(value, expected):
    assert read(value).messages == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [(None, "null"), ([], "empty"), (7, "malformed"), ([{"content": "a"}], "malformed"),
     ([user("a"), {"role": "assistant", "content": None}], "null"),
     ([user("a"), says(" \n")], "empty"),
     ([user("a") | {"content": [{"image": "x", "text": ""}]}, says("b")], "not_text"),
     ([user("a"), says("b", tool_calls='[{"function": {')], "malformed"),
     ([user("a"), says("b", weight="0")], "malformed"),
     ([user("a"), says(PARTS, reasoning="other")], "malformed"),
     ({"role": ["user", "assistant"], "content": ["a"]}, "malformed")],
    ids=str,
)  # fmt: skip
def test_a_conversation_that_cannot_be_used_says_why(value, reason):
    assert refusal(read, value) == reason


def test_single_turn_columns_make_a_conversation():
    columns = explore.ConversationColumns(user="q", assistant="a", system="s")
    row = {"q": 6, "a": 42.5, "s": "c"}
    wanted = [{"role": "system", "content": "c"}, user("6"), says("42.5")]
    assert read_conversation(row, columns).messages == wanted
    for answer, reason in ((None, "null"), (" ", "empty"), (["b"], "malformed")):
        assert refusal(read_conversation, {"q": "a", "a": answer}, columns) == reason


def test_tools_come_from_a_list_or_from_json():
    tool = {"type": "function", "function": {"name": "f"}}
    text = json.dumps(tool)
    for value, tools in (
        ([tool | {"strict": None}], [tool]), (f"[{text}]", [tool]), ([text], [tool]),
        (None, None), ("[]", None), ("", None), ("None", None),
    ):  # fmt: skip
        assert read(CHAT, tools=value).tools == tools
    for value in ([1], text, f"[{text}"):
        assert refusal(read, CHAT, tools=value) == "malformed"


@pytest.mark.parametrize(
    ("turns", "one", "two", "expected"),
    [("all", {}, {}, "".join(BOTH)), ("all", {"weight": 0}, {"weight": 1}, BOTH[1]),
     ("all", {"weight": 0.0}, {}, BOTH[1]), ("last", {}, {}, BOTH[1]),
     ("last", {"weight": 1}, {"weight": 0}, None)],
)  # fmt: skip
@pytest.mark.parametrize("template", [PLAIN, MARKED, GATHERED])
def test_turns_and_weights_choose_what_is_extracted(template, turns, one, two, expected):
    row = {"messages": [CHAT[0], CHAT[1] | one, CHAT[2], CHAT[3] | two]}
    encoder = encoder_for(template, turns=turns)
    if expected is None:
        assert refusal(encoder.encode, row) == "no_tokens"
    else:
        assert taken(encoder.encode(row), encoder.tokenizer) == expected


def test_arguments_of_the_template_come_from_the_option_and_the_row():
    template = "Effort {{ effort | default('none') }}, {{ depth }}. " + PLAIN
    encoder = encoder_for(template, template_kwargs={"effort": "high", "depth": 3})
    for own, effort in (({"effort": "low"}, "low"), ('{"effort": "low"}', "low"), (None, "high")):
        encoded = encoder.encode({"messages": CHAT, "chat_template_kwargs": own})
        assert encoded.text.startswith(f"Effort {effort}, 3. ")
    assert encoder == encoder.of(encoder.settings(), encoder.tokenizer, template)
    for wrong in ("low", {"messages": []}):
        row = {"messages": CHAT, "chat_template_kwargs": wrong}
        assert refusal(encoder.encode, row) == "malformed"


def test_plain_text_is_extracted_from_the_second_token_on():
    tokenizer = tokenizer_for(PLAIN)
    encoder = explore.ConversationEncoder(tokenizer, "", explore.ConversationColumns(text="text"))
    encoded = encoder.encode({"text": "Birch bark. <|end|> dune"})
    assert encoded.input_ids.tolist() == tokenizer("Birch bark. <|end|> dune")["input_ids"]
    assert encoded.token_positions.tolist() == list(range(1, encoded.input_ids.size))
    assert encoder == encoder.of(encoder.settings(), tokenizer, "")
    for value, reason in ((None, "null"), (" ", "empty"), ([1], "malformed"), ("B", "no_tokens")):
        assert refusal(encoder.encode, {"text": value}) == reason


# What is extracted: the stock templates, in test_templates.py, have the rest ----------------------

AHEAD = (  # writes a tool's message at the one before it
    each(
        "{% if m.role != 'tool' %}" + HEAD + SAID + "{% set next = loop.nextitem %}"
        "{% if next is defined and next.role == 'tool' %}<|start|>tool\n"
        "{{ messages[loop.index0 + 1].content }}<|end|>\n{% endif %}{% endif %}"
    ) + PROMPT
)  # fmt: skip
COPIES = (  # joins what one role says in two messages, so that later messages are others
    "{% set ns = namespace(all=[]) %}" + each(
        "{% if ns.all and ns.all[-1].role == m.role %}{% set ns.all = ns.all[:-1] + [{'role': "
        "m.role, 'content': ns.all[-1].content + '\n' + m.content}] %}"
        "{% else %}{% set ns.all = ns.all + [m] %}{% endif %}"
    ) + each(HEAD + SAID, "ns.all") + PROMPT
)  # fmt: skip
MARKED_TURN = HEAD + branch("{{ m.content }}<|end|>".join(MARKS) + "\n", SAID)
MACRO = "{% macro turn(m) %}" + MARKED_TURN + "{% endmacro %}" + each("{{ turn(m) }}")
BLOCK = each("{% set x %}" + MARKED_TURN + "{% endset %}{{ x }}")
TOOL = [*CHAT[:2], {"role": "tool", "content": "Rainy."}, says("Elm."), *CHAT[2:]]
OF_TOOL = [BOTH[0], "Elm.<|end|>", BOTH[1]]
AFTER_TOOL = "loop.index0 and loop.previtem.role == 'tool'"
CLOSED = each(f"{{{{ '</tool>' if {AFTER_TOOL} }}}}" + HEAD + SAID)
CALLING, CALL_SAID = says("", tool_calls=[{"function": CALL}]), 'f {"a": null}<|end|>'
LAST_APART = (  # writes the last message when the loop is over
    each(HEAD + SAID, "messages[:-1]") + "{% set m = messages[-1] %}"
    + HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}{% endfor %}<|end|>\n" + PROMPT
)  # fmt: skip
GATHERED_CALLS = GATHERED.replace(
    "m.content + '<|end|>", "m.content + (('f ' + m.tool_calls[0].function.arguments"
    " | tojson(ensure_ascii=True)) if m.tool_calls else '') + '<|end|>",
)  # fmt: skip
# template, way by which turns are found, spans of CHAT or of another conversation: one for each
# way through `_probe_turns` and `_TurnReader`
TURNS: dict[str, Any] = {
    "plain": (PLAIN, "loop", BOTH, CHAT),
    "marked": (MARKED, "generation", BOTH, CHAT),
    "gathered": (GATHERED, "replacing", BOTH, CHAT),
    "a speaker's name in the header": (
        each(HEAD.replace("m.role", "m.name or m.role") + SAID) + PROMPT, "loop", BOTH,
        [CHAT[0], CHAT[1] | {"name": "Ann"}, CHAT[2] | {"name": "Bob"}, CHAT[3]]),
    "a message written ahead": (AHEAD, "replacing", OF_TOOL, TOOL),
    "messages that are joined": (
        COPIES, "replacing", [BOTH[0], "Dune.", "Elm.<|end|>"], [*CHAT, says("Elm.")]),
    "think tags of the template": (THINKS, "loop", BOTH, CHAT),
    "a thought of the data that the template opens": (
        each(HEAD + branch("<think>\n" + SAID, SAID)) + PROMPT, "loop",
        ["<think>\nIvy\n</think>\n\nDune.<|end|>"],
        [CHAT[0], says("Ivy\n</think>\n\nDune.")]),
    "empty think tags of the data": (
        MARKED, "generation", ["<think>\n\n</think>\n\nDune.<|end|>"],
        [CHAT[0], says("<think>\n\n</think>\n\nDune.")]),
    "empty thoughts after a tool alone": (
        each(f"{HEAD}{{{{ '<think></think>' if {AFTER_TOOL} }}}}{SAID}") + PROMPT, "loop",
        [BOTH[0], "\nElm.<|end|>", BOTH[1]], [*TOOL[:3], says("\nElm."), *TOOL[4:]]),
    "an end outside of the markers": (
        MARKED.replace("<|end|>\n" + MARKS[1], MARKS[1] + "<|end|>\n"), "generation", BOTH, CHAT),
    "markers in a macro": (MACRO, "generation", BOTH, CHAT),
    "markers in a block": (BLOCK, "generation", BOTH, CHAT),
    "markers in a block that is measured": (  # marks must not change what is written
        BLOCK.replace("{{ x }}", "{{ x }}{{ x | length }}"), "loop",
        [f"{BOTH[0]}37", f"{BOTH[1]}31"], CHAT),
    "a prompt that goes on": (
        PLAIN.replace(PROMPT, PROMPT.replace("{% endif", "He thinks:\n{% endif")), "loop",
        ["Hello.<|end|>"], [CHAT[0], says("Hello.")]),
    "a prompt that goes on after a tool": (
        CLOSED + "{% if add_generation_prompt %}{{ '</tool>' if messages[-1].role == 'tool' }}"
        "<|start|>assistant\n<think>\n{% endif %}", "loop", OF_TOOL, TOOL),
    "a header after what closes the tool's": (
        CLOSED + "{% if add_generation_prompt %}{{ '</tool>' if messages[-1].role == 'tool' else "
        "'<|start|>assistant\n' }}{% endif %}", "loop", OF_TOOL, TOOL),
    "a first turn after a default system message": (
        each("{{ '<|start|>system\nBe kind.<|end|>\n' if loop.first }}" + HEAD + SAID) + PROMPT,
        "loop", BOTH, CHAT[1:]),
    "a first answer of two lines where the prompt is a line break": (
        "<|start|>" + each(branch("{{ m.content }}<|end|>"))
        + PROMPT.replace("<|start|>assistant\n", "{{ '\n' }}"), "loop",
        ["Birch\nbark.<|end|>"], [says("Birch\nbark.")]),
    "a header without an answer": (
        each("<|start|>{{ m.role }}{% if m.content %}{{ '\n' }}" + SAID + "{% endif %}") + PROMPT,
        "loop", BOTH[1:], [CHAT[0], says(""), *CHAT[2:]]),
    "an end that the next message writes": (
        each(branch("", "{{ '' if loop.first else '<|end|>' }}") + HEAD + "{{ m.content }}")
        + PROMPT, "loop", [BOTH[0], "Dune."], CHAT),
    "an end after the last message alone": (
        each("<|{{ m.role }}|>{{ m.content }}") + "<|end|>{# <|user|><|assistant|> #}", "loop",
        ["Dune.<|end|>"], CHAT[2:]),
    "an end that comes between messages": (
        "<|start|>system\n" + each("<|end|>" + HEAD + "{{ m.content }}") + "<|end|>" + PROMPT,
        "loop", BOTH, CHAT),
    "the last message after the loop": (
        LAST_APART, "loop", [BOTH[0], CALL_SAID], [*CHAT[:3], CALLING]),
    "gathered calls": (
        GATHERED_CALLS, "replacing", [CALL_SAID, BOTH[1]],
        [CHAT[0], CALLING, {"role": "tool", "content": "Rainy."}, CHAT[3]]),
    "no end": (
        each("<|{{ m.role }}|>{{ m.content }}") + "{# <|user|><|assistant|> #}",
        "loop", ["Birch bark.", "Dune."], CHAT),
}  # fmt: skip


@pytest.mark.parametrize("name", TURNS)
def test_turns_are_found_whatever_the_template_does(name):
    template, way, expected, chat = TURNS[name]
    rendered = render(chat, template)
    assert [rendered.text[a:b] for a, b in rendered.spans] == expected
    assert rendered.way == way
    assert rendered.end_of_turn == (None if name == "no end" else "<|end|>")


def test_what_the_template_adds_comes_when_it_is_asked_for():
    for template in (PLAIN, MARKED, GATHERED):
        assert spans(CHAT, template, include_end=True) == [f"{said}\n" for said in BOTH]
        encoded = encode_conversation(CHAT, tokenizer_for(template), include_end=True)
        assert taken(encoded, tokenizer_for(template)) == "\n".join([*BOTH, ""])
        assert encoded.input_ids.dtype == encoded.token_positions.dtype == np.int32
    assert spans(CHAT, THINKS, include_think=True) == [BOTH[0], f"<think>\n\n</think>\n\n{BOTH[1]}"]


@pytest.mark.parametrize("template", [MACRO, BLOCK])
def test_markers_choose_among_turns_inside_macros_and_blocks(template):
    turn = "m.role == 'assistant'"
    assert spans(CHAT, template.replace(turn, f"{turn} and m.content != 'Birch bark.'")) == BOTH[1:]
    by_field = template.replace(turn, f"{turn} and m.trained")  # the probe has no such field
    assert spans([{**m, "trained": m["content"] == "Dune."} for m in CHAT], by_field) == BOTH[1:]
    for nobody in (False, 0.0):
        assert spans([{**message, "trained": nobody} for message in CHAT], by_field) == []
    assert spans(CHAT, by_field) == BOTH  # nobody has the field


def test_an_end_of_turn_that_is_plain_text_is_found_too():
    template = each("### {{ m.role }}\n{{ m.content }}\n### End{{ '\n' }}")
    template += "{% if add_generation_prompt %}### assistant\n{% endif %}"
    for blanks in ([], ["\n", "\n\n", "  "]):  # Gemma adds line breaks, which end no turn
        tokenizer = AutoTokenizer.from_pretrained(TEACHER)
        tokenizer.add_tokens(blanks)
        prepared = explore.prepare_template(tokenizer, template)
        assert spans(CHAT, prepared) == ["Birch bark.\n### End", "Dune.\n### End"]


MARKUP = ("<|end|>", "<|start|>", "<|start|>assistant\n", "</think>", "\u200d", "👩", " ", "\n")
TEXT = st.lists(
    st.sampled_from(MARKUP) | st.characters(codec="utf-8", exclude_categories=("Cs", "Co")),
    max_size=12,
).map("".join)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), TEXT), min_size=1, max_size=6))
def test_any_content_gives_exactly_what_the_template_says(turns):
    """The template is simple enough to be written again in Python, spans and all."""
    if not any(role == "assistant" for role, _ in turns):
        return
    text, wanted = "", []
    for role, content in turns:
        text += f"<|start|>{role}\n"
        if role == "assistant":
            wanted.append((len(text), len(text) + len(content) + len("<|end|>")))
        text += f"{content}<|end|>\n"
    for template in (PLAIN, MARKED):
        rendered = render([{"role": role, "content": said} for role, said in turns], template)
        assert (rendered.text, rendered.spans) == (text, wanted)


# Tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("borders", "span", "expected"),
    [("02 24 46 46 69 9b", (5, 6), [2, 3]),  # a token across a border is the assistant's
     ("02 24 46 46 69 9b", (3, 7), [1, 2, 3, 4]),
     ("02 24 46 46 69 9b", (9, 10), [5]),
     ("03 33 35 55 77", (3, 7), [1, 2, 3]),  # one without characters, inside of a span only
     ("03 33 35 55 77", (0, 3), []),
     ("03 33 35 55 77", (5, 6), [3])],
)  # fmt: skip
def test_a_token_is_the_assistants_where_one_of_its_characters_is(borders, span, expected):
    starts, ends = np.array([[int(end, 16) for end in pair] for pair in borders.split()]).T
    assert explore.token_positions_of([span], starts, ends).tolist() == expected


def test_a_role_header_that_eats_blanks_is_not_the_assistants():
    """As of Phi-3, where an answer that begins with a line break would take it in."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    eating = [AddedToken(text, rstrip=True) for text in ("<|assistant|>", "<|end|>")]
    tokenizer.add_special_tokens({"additional_special_tokens": eating})
    tokenizer.chat_template = each("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n")
    encoded = encode_conversation([CHAT[0], says("\nDune."), *CHAT[2:]], tokenizer)
    assert taken(encoded, tokenizer) == "Dune.<|end|>" + BOTH[1]


def test_a_slow_tokenizer_is_aligned_by_decoding_or_refused():
    """It knows no offsets: those of the fast one must not be asked for."""
    fast = tokenizer_for(PLAIN)
    slow = copy.deepcopy(fast)
    slow.__class__ = type("SlowTokenizer", (type(fast),), {"is_fast": False})
    for said in ("樺 👩‍🚀 é e\u0301 بِرْش", "  two  \n\n blanks ", "It is \ufffd, see \ufffd\ufffd."):
        one, two = (encode_conversation([CHAT[0], says(said)], each) for each in (fast, slow))
        assert one.input_ids.tolist() == two.input_ids.tolist()
        assert one.token_positions.tolist() == two.token_positions.tolist()
    slow.decode = lambda ids, **_: "x" * len(ids)
    assert refusal(encode_conversation, CHAT, slow) == "unaligned"


# Errors -------------------------------------------------------------------------------------------


def test_a_refused_conversation_says_why_and_survives_the_way_out_of_a_process():
    for template, messages, reason, said in (
        (PLAIN, [user("a"), {"role": "critic", "content": "b"}], "no_assistant", "critic, user"),
        (PLAIN, [user("half \ud800 a pair"), says("b")], "malformed", "surrogate"),
        (PLAIN + "{{ raise_exception('\x1b[2Jno') if messages | length > 2 }}", CHAT,
         "refused_by_template", r"␛\[2Jno"),
    ):  # fmt: skip
        with pytest.raises(explore.ConversationError, match=said) as refused:
            encode_conversation(messages, tokenizer_for(template))
        error = pickle.loads(pickle.dumps(refused.value))
        assert (error.reason, str(error)) == (reason, str(refused.value))


def test_of_named_templates_the_one_that_transformers_takes_is_taken():
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    with_tools = "  {% if tools %}\nTools: {{ tools | tojson }}\n{% endif %}\n" + MARKED + "\n"
    tokenizer.chat_template = {"default": PLAIN, "tool_use": with_tools}
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    source = load_chat_template(None, tokenizer)
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        encoded = encode_conversation(CHAT, tokenizer, chat_template=source, tools=tools)
        assert encoded.text == tokenizer.apply_chat_template(CHAT, tools=tools, tokenize=False)
        assert taken(encoded, tokenizer) == "".join(BOTH)


def test_the_template_comes_from_the_file_else_from_the_tokenizer(tmp_path):
    assert load_chat_template(None, tokenizer_for(PLAIN)) == PLAIN
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match=r"no chat template.*--chat-template"):
        load_chat_template(None, tokenizer)
    tokenizer.save_pretrained(tmp_path)
    named = {"chat_template": [{"name": "default", "template": MARKED}]}
    for name, text in (
        ("t.jinja", MARKED), ("t.txt", json.dumps({"chat_template": MARKED})),
        ("chat_template.json", json.dumps(named)),
    ):  # fmt: skip
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert load_chat_template(str(tmp_path / name), tokenizer_for(PLAIN)) == MARKED
    assert load_chat_template(None, explore.load_tokenizer(str(tmp_path))) == MARKED


def test_what_is_far_too_long_is_refused_by_its_first_piece(monkeypatch):
    """100,000 messages; no turn is looked for, no second token counted."""
    chat, tokenizer = CHAT[:2] * 50_000, tokenizer_for(PLAIN)
    short = encode_conversation(chat[:20], tokenizer).input_ids.tolist()
    again = encode_conversation(chat[:20], tokenizer, max_tokens=len(short) // 3)
    assert again.input_ids.tolist() == short
    monkeypatch.setattr(explore, "_TurnReader", None)
    assert refusal(encode_conversation, chat, tokenizer, max_tokens=1024) == "too_long"


def repeat(work: str, times: int = 99999) -> str:
    """Return a loop that does some work again and again."""
    return f"{{% for x in range({times}) %}}{work}{{% endfor %}}"


NESTED = "{% set ns = namespace(t=['a']) %}" + repeat("{% set ns.t = [ns.t, ns.t] %}", 40)
DOUBLED = "{% set ns = namespace(t='ab') %}" + repeat("{% set ns.t = ns.t OP ns.t %}", 60)
LOOPS = repeat(repeat(""))
# one for each way through the sandbox: operators, filters, methods, what is written by itself
HOSTILE = [
    LOOPS, "{% macro f() %}" + LOOPS + "{% endmacro %}{{ f() }}",
    "{{ '%*d' % (1000000000, 1) }}", "{{ '{:>9999999999}'.format(1) }}",
    "{{ '%1000000000d' | format(1) }}", "{{ ['a'] | map('center', 1000000000) | list }}",
    "{{ 10 ** (10 ** 10) }}", DOUBLED.replace("OP", "+"), DOUBLED.replace("OP", "~"),
    "{{ (['a' * 9999] * 9999) | join }}", "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "{{ {'a': 1} | tojson(indent=1000000000) }}", "{{ (1).to_bytes(1000000000, 'big') }}",
    "{{ ''.__class__.__mro__ }}",
    *(NESTED + "{{ " + way + " }}" for way in ("{'a': ns.t}", "ns.t | upper", "'%s' % ns.t")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "said"),
    [*((work + PLAIN, r"cannot be used \(the sandbox") for work in HOSTILE),
     ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + PLAIN, "recursion"),
     ("{{ messages[0].content }}", "--chat-template"), ("{{ 1 / 0 }}", "--chat-template")],
)  # fmt: skip
def test_a_template_that_does_too_much_or_shows_no_assistant_is_refused_for_all(template, said):
    with pytest.raises(TemplateError, match=said) as refused:
        explore.prepare_template(tokenizer_for(PLAIN), template)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("nested", [False, True])
def test_blanks_that_a_tokenizer_cuts_off_its_offsets_are_the_assistants_nevertheless(nested):
    """As ByteLevel does unless told otherwise; the user's own tokenizer goes on doing it."""
    plain, cutting = (tokenizer_for(each("{{ m.role }}: {{ m.content }}\n")) for _ in "ab")
    post = processors.ByteLevel()
    cutting.backend_tokenizer.post_processor = processors.Sequence([post]) if nested else post
    own = cutting("a  b", return_offsets_mapping=True)["offset_mapping"]
    for said in ("    42 is it  ", "\n  two\n\n  ", "one ", " "):
        one, two = (encode_conversation([CHAT[0], says(said)], t) for t in (plain, cutting))
        assert one.input_ids.tolist() == two.input_ids.tolist()
        assert one.token_positions.tolist() == two.token_positions.tolist(), said
    assert cutting("a  b", return_offsets_mapping=True)["offset_mapping"] == own != [(0, 4)]

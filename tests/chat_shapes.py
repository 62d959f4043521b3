"""Conversations of every shape that templates treat differently, and tokenizers for templates.

Every word of a message occurs in that message only, so a test can tell from text whose it is.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

Messages = list[dict[str, Any]]

TEACHER = Path(__file__).parent / "teacher" / "model"
TOOLS = [{"type": "function", "function": {
    "name": "find_weather", "description": "Weather of a town",
    "parameters": {"type": "object", "required": ["town"], "properties": {
        "town": {"type": "string", "description": "name"}}},
}}]  # fmt: skip


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def calls(text: str | None = None, *, town: str = "Lima", **more: Any) -> dict[str, Any]:
    """Return a message of the assistant that calls a tool."""
    function = {"name": "find_weather", "arguments": {"town": town}}
    call = {"id": "abcdefgh1", "type": "function", "function": function}
    said = {} if text is None else {"content": text}
    return {"role": "assistant", **said, "tool_calls": [call], **more}


def result(text: str) -> dict[str, Any]:
    """Return the result of the tool."""
    return {"role": "tool", "name": "find_weather", "tool_call_id": "abcdefgh1", "content": text}


SHAPES: dict[str, Messages] = {
    "single turn": [user("amber?"), says("Birch bark.")],
    "many turns": [user("amber?"), says("Birch bark."), user("cedar?"),
                   says("Dune, dew.\n\nEcho."), user("fern?"), says("Grove")],
    "system": [{"role": "system", "content": "Heath hill."}, user("amber?"), says("Birch bark.")],
    "ends with the user": [user("amber?"), says("Birch bark."), user("cedar?")],
    "two answers in a row": [user("amber?"), says("Birch bark."), says("Dune.")],
    "blanks around": [user("amber?"), says("  Birch bark. \n\n"), user("cedar?"), says("\nDune ")],
    "unicode": [user("آمبر 琥珀?"), says("樺 👩‍🚀 é e\u0301 بِرْش 🇳🇴"), user("cedar 🌲?"),
                says("砂丘\u00a0🏜️!")],
    "empty answer": [user("amber?"), says(""), user("cedar?"), says("Dune.")],
    "reasoning in content": [
        user("amber?"), says("<think>\nIris, ivy.\n</think>\n\nBirch bark."), user("cedar?"),
        says("<think>\nJade.\n\nJuniper.\n</think>\n\nDune.")],
    "reasoning apart": [
        user("amber?"), says("Birch bark.", reasoning_content="Iris, ivy."), user("cedar?"),
        says("Dune.", reasoning_content="Jade.\n\nJuniper.")],
    "reasoning at times": [
        user("amber?"), says("<think>\nIris, ivy.\n</think>\n\nBirch bark."), user("cedar?"),
        says("Dune."), user("fern?"), says("Grove", reasoning_content="Kelp.")],
    "tool": [user("amber?"), calls(), result("Rainy, 7."), says("Birch bark.")],
    "tool, then more": [
        user("amber?"), calls("Let us see."), result("Rainy, 7."), says("Birch bark."),
        user("cedar?"), calls("", town="Oslo"), result("Snowy."), calls("", town="Bonn"),
        result("Sunny!"), says("Dune."), user("fern?"), says("Grove")],
    "tool and reasoning": [
        user("amber?"), calls("", reasoning_content="Iris, ivy."), result("Rainy, 7."),
        says("Birch bark.", reasoning_content="Jade."), user("cedar?"), says("Dune.")],
    "calls last": [user("amber?"), calls("")],
}  # fmt: skip


def tools_of(shape: str) -> Messages | None:
    """Return the tools that a conversation is rendered with."""
    return TOOLS if shape in ("tool", "tool, then more") else None


_MARKUP = re.compile(
    r"<[|｜][^\s<>|｜'\"{}()]{1,40}[|｜]?>|<[a-z_]{2,20}\|>|<(?:start|end)_of_\w+>|</s>|<s>|<sop>|"
    r"\[gMASK\]"
)


@cache
def stock_templates() -> dict[str, str]:
    """Return the stock templates that the `trl` package carries, by name."""
    import trl

    paths = (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(paths)}


@lru_cache(maxsize=128)
def tokenizer_for(source: str) -> Any:
    """Return the teacher's tokenizer with a template and that template's special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    tokenizer.chat_template = source
    special: dict[str, Any] = {"bos_token": "<bos>", "eos_token": "<eos>"}
    special["additional_special_tokens"] = sorted(set(_MARKUP.findall(source)))
    tokenizer.add_special_tokens(special)
    return tokenizer


def stock(name: str) -> Any:
    """Return a tokenizer with a stock template."""
    return tokenizer_for(stock_templates()[name])

"""A second opinion on which text is the assistant's: patterns by hand for each template family.

Shares no code with `explore_logits`. It reads the rendered text like a person who knows the
family's format, which works because no message of `chat_shapes` contains markup of its own.
"""

from __future__ import annotations

import re
from typing import Any

# family → what stands before what the assistant writes, what ends it
FAMILIES: dict[str, tuple[str, str]] = {
    r"qwen|lfm2|nemotron": (r"<\|im_start\|>assistant\n", r"<\|im_end\|>"),
    r"llama3": (r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n", r"<\|eot_id\|>"),
    r"gemma(3|_training)?$|gemma3": (r"<start_of_turn>model\n", r"<end_of_turn>"),
    r"diffusion_gemma_training": (  # its markers leave out the token that hands over to the tool
        r"<\|turn>model\n|<tool_response\|>(?!<\|turn>)|(?<=<turn\|>)\n(?!<)",
        r"<turn\|>|<tool_call\|>(?=<\|tool_response>)|(?=<\|turn>model)",
    ),
    r"gemma4|diffusion": (
        r"<\|turn>model\n|<tool_response\|>(?!<\|turn>)|(?<=<turn\|>)\n(?!<)",
        r"<turn\|>|<\|tool_response>|(?=<\|turn>model)",
    ),
    r"cohere": (r"<\|CHATBOT_TOKEN\|>(?:<\|START_RESPONSE\|>)?", r"<\|END_OF_TURN_TOKEN\|>"),
    r"deepseek": (
        r"<｜Assistant｜>|<｜tool▁outputs▁end｜>|(?<=\?|>)(?=\n<｜tool▁call▁begin｜>)",
        r"<｜end▁of▁sentence｜>|<｜tool▁call▁end｜>(?=<｜tool▁out)",
    ),
    r"glm4moe$": (r"<\|assistant\|>", r"(?=<\|user\|>|<\|observation\|>|<\|assistant\|>|\Z)"),
    r"glm4moe_training": (r"<\|assistant\|>", r"<\|user\|>|<\|observation\|>"),
    r"gptoss": (r"<\|start\|>assistant", r"<\|return\|>|<\|call\|>|<\|end\|>"),
    r"idefics3|smolvlm": (r"Assistant:", r"<end_of_utterance>"),
    r"llava": (r"\[/INST\]|(?<=</s>) (?= )", r"</s>"),
    r"muse": (r"<\|start\|>assistant", r"<\|eot\|>"),
    r"phi3": (r"<\|assistant\|>\n", r"<\|end\|>"),
}
# The generation prompt of these stock templates ends in an open think tag.
OPENS_THINK = re.compile(r"qwen3_5_think|qwen3_6|qwen3_8|nemotron|deepseek")
# What those templates write where there is no reasoning.
EMPTY_THINK = {
    r"qwen": re.compile(r"<think>\n\n</think>\n\n"),
    r"nemotron": re.compile(r"<think></think>"),
    r"glm": re.compile(r"\n<think></think>\n?"),
}


def assistant_spans(name: str, text: str) -> list[tuple[int, int]]:
    """Return the character spans of `text`, rendered by the stock template `name`, to extract."""
    family = next(key for key in FAMILIES if re.match(key, name))
    before, end = FAMILIES[family]
    spans = [
        (found.start("said"), found.end())
        for found in re.finditer(f"(?:{before})(?P<said>.*?(?:{end}))", text, re.DOTALL)
    ]
    if family == r"gptoss":  # reasoning and the answer after it are one turn
        spans = _joined(text, spans, between="<|start|>assistant", after="<|channel|>analysis")
    return [_without_think(name, text, a, b) for a, b in spans if b > a]


def _joined(
    text: str, spans: list[tuple[int, int]], *, between: str, after: str
) -> list[tuple[int, int]]:
    """Join a span that starts with `after` to the next one."""
    joined: list[tuple[int, int]] = []
    for a, b in spans:
        if joined and text[slice(*joined[-1])].startswith(after):
            assert text[joined[-1][1] : a] == between
            joined[-1] = (joined[-1][0], b)
        else:
            joined.append((a, b))
    return joined


def _without_think(name: str, text: str, a: int, b: int) -> tuple[int, int]:
    """Move the start past an empty think block, or past the tag that the prompt gives."""
    for family, block in EMPTY_THINK.items():
        empty = block.match(text, a, b)
        if empty and name.startswith(family):
            return empty.end(), b
    if OPENS_THINK.match(name) and not name.endswith("_training"):
        return a + len("<think>\n") * text.startswith("<think>\n", a), b
    return a, b


def extracted_tokens(spans: list[tuple[int, int]], offsets: list[tuple[int, int]]) -> list[int]:
    """Return the tokens that hold a character of a span, one character at a time."""
    wanted = {place for a, b in spans for place in range(a, b)}
    return [
        number
        for number, (a, b) in enumerate(offsets)
        if number > 0 and any(place in wanted for place in range(a, b))
    ]


def words_of(message: dict[str, Any]) -> set[str]:
    """Return the words that only this message of `chat_shapes` contains."""
    text = str(message.get("content") or "") + " " + str(message.get("reasoning_content") or "")
    return set(re.findall(r"[^\W\d_]{3,}", text)) - {"think", "see", "Let"}

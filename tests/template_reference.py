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
# What templates write where there is no reasoning.
EMPTY_THINK = {
    "qwen": r"<think>\n\n</think>\n\n", "nemotron": r"<think></think>",
    "glm": r"\n<think></think>\n?",
}  # fmt: skip
# The generation prompt of these ends in an open think tag.
OPENS_THINK = re.compile(r"(?:qwen3_5_think|qwen3_6|qwen3_8|nemotron|deepseek)(?!.*_training$)")
# Reasoning of gpt-oss and the answer after it are one turn.
THOUGHT = r"(?:<\|channel\|>analysis.*?<\|end\|><\|start\|>assistant)?"


def assistant_spans(name: str, text: str) -> list[tuple[int, int]]:
    """Return the character spans of `text`, rendered by the stock template `name`, to extract."""
    before, end = next(found for family, found in FAMILIES.items() if re.match(family, name))
    tags = [tag for family, tag in EMPTY_THINK.items() if name.startswith(family)]
    tags += [r"<think>\n"] if OPENS_THINK.match(name) else []
    turn = f"(?:{before})(?:{'|'.join(tags)})?(?P<said>{THOUGHT}.*?(?:{end}))"
    return [found.span("said") for found in re.finditer(turn, text, re.DOTALL)]


def extracted_tokens(spans: list[tuple[int, int]], offsets: list[tuple[int, int]]) -> list[int]:
    """Return the tokens that hold a character of a span, one character at a time."""
    wanted = {place for a, b in spans for place in range(a, b)}
    return [n for n, borders in enumerate(offsets) if n > 0 and wanted & set(range(*borders))]


def words_of(message: dict[str, Any]) -> set[str]:
    """Return the words that only this message of `chat_shapes` contains."""
    text = str(message.get("content") or "") + " " + str(message.get("reasoning_content") or "")
    return set(re.findall(r"[^\W\d_]{3,}", text)) - {"think", "see", "Let"}

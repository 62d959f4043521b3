"""Print how the assistant's tokens of every stock template are found, and whether rightly so.

    python tests/template_table.py

A table in Markdown (quoted in docs/templates.md), then one JSON line, with milliseconds to render
long conversations and to find their spans. A conversation counts as right when its extracted tokens
are exactly those of `template_reference`, which shares no code.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from chat_shapes import SHAPES, TOOLS, calls, result, says, stock, template_names, tools_of, user
from template_reference import assistant_spans, extracted_tokens

import explore_logits as ex


class Outcome(NamedTuple):
    """What became of one conversation with one template."""

    way: str  # "generation", "loop", "replacing" or "refused"
    right: bool
    detail: str  # the reason, or what differs
    encoded: ex.EncodedConversation | None = None


def try_shape(name: str, shape: str) -> Outcome:
    """Encode one conversation with one stock template and compare it with the reference."""
    tokenizer = stock(name)
    try:
        encoded = ex.encode_conversation(SHAPES[shape], tokenizer, tools=tools_of(shape))
    except ex.ConversationError as error:
        return Outcome("refused", error.reason == "refused_by_template", str(error))
    spans = assistant_spans(name, encoded.text)
    offsets = tokenizer(encoded.text, add_special_tokens=False, return_offsets_mapping=True)
    expected, found = extracted_tokens(spans, offsets["offset_mapping"]), encoded.token_positions
    said, wanted = (tokenizer.decode(encoded.input_ids[at].tolist()) for at in (found, expected))
    detail = f"found    {said!r}\nexpected {wanted!r}\nin       {encoded.text!r}"
    return Outcome(encoded.way, found.tolist() == expected, detail, encoded)


def table_row(name: str, outcomes: dict[str, Outcome]) -> str:
    used = [o for o in outcomes.values() if o.way != "refused"]
    ways = "/".join(sorted({o.way for o in used})) or "none"
    refused = {shape: o.detail for shape, o in outcomes.items() if o.way == "refused"}
    why = sorted({text.removeprefix("the template says: ") for text in refused.values()})
    right = f"{sum(o.right for o in used)}/{len(used)}"
    return f"| {name} | {ways} | {right} | {', '.join(refused)} | {'; '.join(why)} |"


@cache
def try_template(name: str) -> dict[str, Outcome]:
    """Encode the conversations of all shapes with one stock template."""
    return {shape: try_shape(name, shape) for shape in SHAPES}


def build_table() -> str:
    head = ["| template | way | right | refused by the template | what it says |", "|---" * 5 + "|"]
    return "\n".join([*head, *(table_row(name, try_template(name)) for name in template_names())])


def milliseconds(name: str, *, tools: bool = False, reasoning: bool = False) -> float:
    """Return the best time of seven to find the spans of 30 turns."""
    chat = []
    for n in range(15 if tools else 30):
        thought = {"reasoning_content": f"Iris {n}, ivy. " * 20} if reasoning else {}
        chat += [user(f"amber {n}? " * 8)]
        chat += [calls("", town=f"Lima {n}"), result("Rainy, 7.")] if tools else []
        chat += [says(f"Birch {n} bark. " * 20, **thought)]
    template = ex.prepare_template(stock(name))
    times = []
    for _ in range(7):
        began = time.process_time()
        ex.render_conversation(chat, template, tools=TOOLS if tools else None)
        times.append(time.process_time() - began)
    return round(1000 * min(times), 2)


def main() -> int:
    """Print the table and return 1 if any conversation was encoded wrongly."""
    logging.disable(logging.WARNING)
    print(build_table())
    total: Counter[str] = Counter()
    for name in template_names():
        for shape, outcome in try_template(name).items():
            total[outcome.way if outcome.right else "wrong"] += 1
            if not outcome.right:
                print(f"{name}, {shape}: {outcome.way}\n{outcome.detail}", file=sys.stderr)
    took = {"plain": milliseconds("llama3_1"), "reasoning": milliseconds("qwen3", reasoning=True),
            "gpt-oss tools": milliseconds("gptoss", tools=True)}  # fmt: skip
    counts = {"templates": len(template_names()), "shapes": len(SHAPES), **total}
    print(json.dumps({**counts, "milliseconds": took}))
    return int(total["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())

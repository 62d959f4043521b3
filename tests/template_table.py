"""Print how the assistant's tokens of every stock template are found, and whether rightly so.

    python tests/template_table.py

A table in Markdown (quoted in docs/templates.md), then one JSON line. A conversation counts as
right when its extracted tokens are exactly those of `template_reference`, which shares no code.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from chat_shapes import SHAPES, stock, stock_templates, tools_of
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


@cache
def try_template(name: str) -> dict[str, Outcome]:
    """Encode the conversations of all shapes with one stock template."""
    return {shape: try_shape(name, shape) for shape in SHAPES}


def build_table() -> str:
    head = "| template | way | right | refused by the template | what it says |"
    lines = [head, "|---" * 5 + "|"]
    for name in stock_templates():
        used = [o for o in try_template(name).values() if o.way != "refused"]
        refused = {s: o.detail for s, o in try_template(name).items() if o.way == "refused"}
        ways = "/".join(sorted({o.way for o in used})) or "none"
        right = f"{sum(o.right for o in used)}/{len(used)}"
        why = sorted({text.removeprefix("the template says: ") for text in refused.values()})
        lines.append(f"| {name} | {ways} | {right} | {', '.join(refused)} | {'; '.join(why)} |")
    return "\n".join(lines)


def main() -> int:
    """Print the table and return 1 if any conversation was encoded wrongly."""
    logging.disable(logging.WARNING)
    print(build_table())
    total: Counter[str] = Counter()
    for name in stock_templates():
        total.update(o.way if o.right else "wrong" for o in try_template(name).values())
    print(json.dumps({"templates": len(stock_templates()), "shapes": len(SHAPES), **total}))
    return int(total["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Write the options of extract_logits.py into README.md, between the two comments that mark them.

    python docs/option_table.py

The parser is the only source: names, groups, defaults and meanings. A test compares the two.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from extract_logits import build_parser  # noqa: E402 - run as a script, from anywhere

README = ROOT / "README.md"
BEGIN, END = "<!-- options: made by docs/option_table.py -->", "<!-- end of options -->"
SHOWN_IN_MEANING = " (default: "


def make_option_table() -> str:
    """Return one Markdown table with a line for every option, in the order of `--help`."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for group in build_parser()._action_groups:
        options = [a for a in group._group_actions if a.option_strings and a.dest != "help"]
        if options:
            lines.append(f"| **{group.title}** | | |")
            lines += [describe_option(action) for action in options]
    return "\n".join(lines)


def describe_option(action: argparse.Action) -> str:
    """Return the line of the table that shows flag, default and meaning of an option."""
    meaning, _, told = (action.help or "").partition(SHOWN_IN_MEANING)
    if action.required:
        default = "required"
    elif action.nargs == 0:
        default = "off"
    elif "%(default)" in told:
        default = f"`{action.default}`"
    else:
        default = told.removesuffix(")")
    meaning = meaning.replace("|", "\\|")
    return f"| `{action.option_strings[-1]}` | {default} | {meaning} |"


def replace_table(text: str, table: str) -> str:
    """Return the text with `table` between the two marks."""
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise SystemExit(f"{README.name} lacks the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main() -> None:
    """Bring README.md up to date."""
    text = README.read_text(encoding="utf-8")
    README.write_text(replace_table(text, make_option_table()), encoding="utf-8")


if __name__ == "__main__":
    main()

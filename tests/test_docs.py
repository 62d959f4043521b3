"""What the documents say is so: options, names, links, snippets, commands, test bytes."""

from __future__ import annotations

import importlib
import itertools
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, extract_chats

import extract_logits
from explore_logits import ALL_FIELDS, dequantize_logits, pack_indices, quantize_logits

sys.path.append(str(ROOT / "docs"))
from option_table import make_option_table, replace_table

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
README, METADATA = TEXTS[PAGES[0]], (ROOT / "pyproject.toml").read_text(encoding="utf-8")

# Commands of the documents that no test below runs, and why.
NOT_RUN = {
    r"make \w+": "targets: see the test on the Makefile; CI",
    r"uv sync.*|pip install .*": "needs a package registry",
    r"python \w+\.py .*(Qwen/Qwen3-8B|user/chats).*": "needs a model of 8 billion parameters",
    r"python tests/(tools/)?\w+\.py.*": "minutes: make targets; their tests run parts",
    r"python docs/examples/quantized_student\.py.*": "a minute; tests/test_explore_training.py",
    r"python docs/option_table\.py": "would write the README; its functions are tested below",
    r"python .*(OUTPUT|FOLDER).*": "stands for an output of the reader's",
}


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory):
    """Extract a few conversations as `make demo` does; returns the folder of the output."""
    return extract_chats(tmp_path_factory.mktemp("demo"), "--limit", 6, "--store-tokens")


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[page], re.M | re.S)


def commands(page: Path) -> Iterator[str]:
    """Yield the shell commands of a document: fenced, indented, or in the text."""
    for block in code_blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if command := line.partition("#")[0].strip():
                yield re.sub(r"\s+", " ", command)
    yield from re.findall(r"^    ((?:python|make) .+)$", TEXTS[page], re.M)
    yield from re.findall(r"`((?:python|make|pip|uv) [^`\n]+)`", TEXTS[page])


COMMANDS = sorted({command for page in PAGES for command in commands(page)})
REASONS = {command: [p for p in NOT_RUN if re.fullmatch(p, command)] for command in COMMANDS}


def test_the_option_table_is_that_of_the_parser():
    assert replace_table(README, make_option_table()) == README, "run python docs/option_table.py"


def test_links_lead_to_files():
    for page, text in TEXTS.items():
        targets = re.findall(r"\]\(([^)\s]+)\)", text)
        local = [t.partition("#")[0] for t in targets if not re.match(r"https?://|#", t)]
        assert [t for t in local if not (page.parent / t).exists()] == [], page.name


def test_commands_of_make_are_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {word for c in COMMANDS if c.startswith("make ") for word in c.split()[1:]}
    assert sorted(t for t in named if not re.search(rf"^{t}:", makefile, re.M)) == []


@pytest.mark.parametrize("command", [c for c, reasons in REASONS.items() if not reasons])
def test_commands_run_or_say_why_not(command, small_demo, tmp_path, monkeypatch):
    program, script, *words = shlex.split(command)
    assert program == "python", f"neither run here nor listed with a reason: {command}"
    places = {"demo/logits": str(small_demo), "./demo/first": str(tmp_path / "first")}
    args = [places.get(word, word) for word in words]
    if "--output" in args:
        args += ["--cache-dir", str(tmp_path / "cache")]
    monkeypatch.chdir(ROOT)
    try:
        code = importlib.import_module(script.removesuffix(".py")).main(args)
    except SystemExit as stop:  # of --help
        code = stop.code
    assert code == 0


def test_reasons_are_needed():
    assert NOT_RUN.keys() == set(itertools.chain(*REASONS.values()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page, small_demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for snippet in code_blocks(page, "python"):
        code = snippet.replace("demo/logits", str(small_demo)).replace('"demo/', f'"{tmp_path}/')
        exec(compile(code, str(page), "exec"), {"__name__": "__main__"})
        assert capsys.readouterr().out.strip()


FORMAT = ROOT / "docs" / "format.md"


def golden(name: str) -> dict[str, list[str]]:
    """Return a block of test bytes of docs/format.md by the first word of its lines."""
    (block,) = code_blocks(FORMAT, f"golden {name}")
    return {word: rest for word, *rest in map(str.split, block.splitlines())}


def test_packed_ids_are_the_golden_bytes():
    low, high = pack_indices([5, 65536, 131073, 262143, 70000])
    assert low.astype("<u2").tobytes() == bytes.fromhex("".join(golden("ids")["low"]))
    assert high == bytes.fromhex("".join(golden("ids")["high"]))


def test_quantized_logits_are_the_golden_bytes():
    wanted = golden("logits")
    q, low, high = quantize_logits(np.float32([7.5, 2, -1.25, 3, 3]), [3, 2])
    assert [f"{level:04x}" for level in q] == wanted["q"]
    assert low.astype("<f4").tobytes() == bytes.fromhex("".join(wanted["min"]))
    assert high.astype("<f4").tobytes() == bytes.fromhex("".join(wanted["max"]))
    assert dequantize_logits(q[:3], low[0], high[0]).tolist() == list(map(float, wanted["back"]))
    coarse, _, _ = quantize_logits(np.float32([7.5, 2, -1.25]), bits=4)
    assert [f"{level:04x}" for level in coarse] == wanted["q4"]


def test_points_of_compact_rows_are_the_golden_ones(monkeypatch):
    wanted = {name: list(map(float, values)) for name, values in golden("points").items()}
    half = lambda states, _: torch.full_like(states, 0.5, dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(extract_logits, "uniform_numbers", half)
    logits, none = torch.tensor([wanted["probabilities"]]).log(), torch.zeros(1, dtype=torch.int64)
    sizes = {"top_p": 0.98, "top_p_max": 100, "sampled_n": 24, "seed": 1, "min_p": 0.16}
    for reference in (True, False):
        tokens = extract_logits.extract_tokens(logits, none, none, reference=reference, **sizes)
        assert tokens.top_ids[0, : tokens.top_counts[0]].tolist() == wanted["nucleus"]
        assert tokens.sampled_ids[0, : tokens.sampled_counts[0]].tolist() == wanted["sampled"]
    rest = np.cumsum(wanted["probabilities"][2:])
    found = 2 + np.searchsorted(rest, wanted["points"], side="right")
    assert found.tolist() == wanted["sampled"]


def test_the_format_page_lists_every_column_with_its_type():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([\w<>]+) \|", TEXTS[FORMAT], re.M)
    columns = [(name, kind) for names, kind in rows for name in re.findall(r"\w+", names)]
    written = [
        (field.name, re.sub(r"(item|element): ", "", str(field.type)).replace("float>", "float32>"))
        for field in ALL_FIELDS
    ]
    assert columns == written


FILES = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("docs/*.py")]
KNOWN = set(re.findall(r"\w+", METADATA)) | {path.stem for path in FILES}
KNOWN |= set().union(*(re.findall(r"\w+", path.read_text(encoding="utf-8")) for path in FILES))


def unknown_names(text: str) -> list[str]:
    """Return the names and files in backticks that exist nowhere in the project."""

    def is_known(quoted: str) -> bool:
        if "/" in quoted or re.search(r"\.(py|md|toml|json|jinja|in|ipynb)$", quoted):
            return any(ROOT.glob(quoted.rstrip("/")))
        is_name = re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", quoted)
        return not is_name or set(quoted.removesuffix("()").split(".")) <= KNOWN

    quoted = re.findall(r"`([^`\s]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return [words for words in quoted if not is_known(words)]


def test_the_guide_names_only_what_exists():
    text = TEXTS[ROOT / "docs" / "AGENTS.md"]
    assert unknown_names(text) == []
    assert not re.search(r"\.py:\d|\blines? \d", text), "line numbers go stale: name functions"
    wrong = f"`extract_tokens` `{'x' * 30}` `tests/none.py` `--limit 4`"
    assert unknown_names(wrong) == ["x" * 30, "tests/none.py"]


def test_the_versions_agree():
    (version,) = re.findall(r'^version = "(.+)"$', METADATA, re.M)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {version}" in TEXTS[ROOT / "CHANGELOG.md"]

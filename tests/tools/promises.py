"""Check that every promise has a test, and write docs/promises.md.

    python tests/tools/promises.py

`promises.txt` holds a promise a line: a sentence, `|`, its tests as pytest names them. Ends with
exit code 1 where a named test does not exist and where a file of tests proves none.
"""

from __future__ import annotations

import ast
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import ROOT, TESTS

TABLE = Path(__file__).with_suffix(".txt")
PAGE = ROOT / "docs" / "promises.md"
ELSEWHERE = {"test_extract_vllm.py", "test_extract_kernels.py"}  # where vLLM, or Triton, is
HEAD = """# Promises and their tests

Made by `tests/tools/promises.py` from `tests/tools/promises.txt`: a promise a line, with the tests
that prove it. Those in italics do not run with `make test`, but by a target of their own, or where
vLLM or Triton is installed.
"""


class Promise(NamedTuple):
    """What is promised, and which tests prove it."""

    section: str
    says: str
    tests: list[str]  # "file.py::name"


def read_promises(text: str) -> list[Promise]:
    promises, section = [], ""
    for line in filter(None, map(str.strip, text.splitlines())):
        says, _, tests = line.partition("|")
        if line.startswith("#"):
            section = line.lstrip("# ")
        else:
            promises.append(Promise(section, says.strip(), tests.split()))
    return promises


def list_tests() -> dict[str, bool]:
    """Return all tests by name, and whether `make test` leaves them out; nothing is imported."""
    tests = {}
    for path in sorted(TESTS.glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        apart = path.name in ELSEWHERE or "\npytestmark = pytest.mark.slow\n" in text
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = " ".join(map(ast.unparse, node.decorator_list))
                tests[f"{path.name}::{node.name}"] = apart or ".slow" in marks
    return tests


def find_faults(promises: Sequence[Promise], tests: Iterable[str]) -> list[str]:
    """Say which promises name no test, or one that is not there, and which files prove nothing."""
    there, named = set(tests), {test for promise in promises for test in promise.tests}
    faults = [f"no test: {promise.says}" for promise in promises if not promise.tests]
    faults += [f"{test} is not there" for test in sorted(named - there)]
    files = ({test.partition("::")[0] for test in names} for names in (there, named))
    return faults + [f"{file} proves no promise" for file in sorted(set.difference(*files))]


def find_idle(promises: Sequence[Promise], items: Iterable[Any]) -> list[str]:
    """Say which promises have no test that runs among those that pytest has collected."""
    running = {test for test, is_apart in list_tests().items() if is_apart}
    for item in items:
        conditions = [mark.args[:1] for mark in item.iter_markers("skipif")]
        if item.get_closest_marker("skip") is None and not any(map(any, conditions)):
            running.add(f"{item.path.name}::{item.originalname}")
    idle = (promise.says for promise in promises if running.isdisjoint(promise.tests))
    return [f"no test of it runs here: {says}" for says in idle]


def make_page(promises: Sequence[Promise]) -> str:
    apart, page = list_tests(), HEAD
    for section, group in itertools.groupby(promises, lambda promise: promise.section):
        page += f"\n## {section}\n\n| promise | tests |\n|---|---|\n"
        for promise in group:
            shown = "<br>".join(f"*`{t}`*" if apart.get(t) else f"`{t}`" for t in promise.tests)
            page += f"| {promise.says} | {shown} |\n"
    return page


def main() -> int:
    promises = read_promises(TABLE.read_text(encoding="utf-8"))
    if faults := find_faults(promises, list_tests()):
        print(*faults, sep="\n")
        return 1
    PAGE.write_text(make_page(promises), encoding="utf-8")
    print(f"{len(promises)} promises: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

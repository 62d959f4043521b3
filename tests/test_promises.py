"""Every promise has a test that runs, and docs/promises.md says which."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tools"))

from promises import PAGE, TABLE, find_faults, find_idle, list_tests, make_page, read_promises

PROMISES = read_promises(TABLE.read_text(encoding="utf-8"))


def test_every_promise_has_a_test_that_runs(request):
    tests, items = list_tests(), request.session.items
    assert find_faults(PROMISES, tests) == []
    assert PAGE.read_text(encoding="utf-8") == make_page(PROMISES), "run tests/tools/promises.py"
    files = {name.partition("::")[0] for name in tests}
    whole = files - {item.path.name for item in items} <= {"test_extract_vllm.py", "test_dist.py"}
    if whole and not request.config.option.keyword:  # what was collected tells what is skipped
        assert find_idle(PROMISES, items) == []

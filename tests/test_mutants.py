"""The tool that plants faults: its table fits the scripts, and what it says of a fault is so."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tools"))

from mutants import FAULTS, check_faults, parse_faults, try_faults

TABLE = parse_faults(FAULTS)


def test_every_fault_of_the_table_can_be_planted():
    check_faults(TABLE)
    assert len({fault.says for fault in TABLE}) == 60
    assert {f.script for f in TABLE} == {"explore_logits", "compute_lengths", "extract_logits"}


def test_a_fault_is_caught_and_one_that_nothing_tests_survives():
    wraps, bits = (f for f in TABLE if f.says.startswith(("ids from 262,144", "the high bits")))
    assert wraps.tests == bits.tests == ("test_explore_format.py",)
    assert {test for _, test, _ in try_faults([wraps, bits], "-k", "outside_the_format")} == {
        "test_explore_format.py::test_an_id_outside_the_format_is_refused_by_name", ""
    }  # fmt: skip

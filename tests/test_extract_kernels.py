"""The Triton kernel without a GPU: run by Triton's interpreter."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import Finished, run_code
from test_extract_extraction import CASES

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None,
    reason="triton is not installed (pip install '.[kernels]'; no wheel of torch for a CPU has it)",
)

INTERPRETED = """
import torch
import extract_logits as el
from test_extract_extraction import CASES, extract
read, by_torch = el.read_kernel(torch.device("cpu")), el.weigh_blocks
wide = CASES["trained_bfloat16"]()
far = torch.empty(2**31 + 300, dtype=torch.bfloat16).as_strided((3, 300), (2**30, 1))
far.copy_(wide[:3, :300])  # rows that begin beyond 31 bits; untouched pages take no memory
cases = {name: make()[-3:] for name, make in CASES.items()}
cases |= {"every 9th row, cut off": wide[::9, :4999], "far apart": far}
cases |= {"columns apart": wide.T.contiguous().T[:1], "no rows": wide[:0]}
for name, logits in cases.items():
    (maxima, sums), (want_maxima, want_sums) = read(logits), by_torch(logits)
    assert torch.equal(maxima, want_maxima), name
    torch.testing.assert_close(sums, want_sums, rtol=1e-6, atol=0, msg=name)
    want = extract(logits)
    el.weigh_blocks = read
    got = extract(logits)
    el.weigh_blocks = by_torch
    assert ((got.logsumexp - want.logsumexp).abs() <= 1e-8).all(), name
    for field in ("top_ids", "top_counts", "sampled_ids", "usable"):
        assert torch.equal(getattr(got, field), getattr(want, field)), (name, field)
    print(name)
broken = CASES["trained_not_multiple_of_64"]()[:5]
broken[0, 70], broken[1, 5020], broken[2] = float("nan"), float("inf"), float("-inf")
broken[3] = float("nan")
el.weigh_blocks = read
assert extract(broken).usable.tolist() == [False] * 4 + [True]
"""

REFUSED = """
import logging
import torch
import extract_logits as el
logging.basicConfig(format="%(message)s")
real = el.sum_blocks
el.sum_blocks = lambda values: (real(values)[0], real(values)[1] * 1.001)
assert el.read_kernel(torch.device("cpu")) is None is el.read_kernel(torch.device("cpu"))
"""


def run_with_triton(code: str, tmp_path: Path) -> Finished:
    """Run code in a fresh process, as Triton reads its environment once."""
    paths = os.pathsep.join(["tests", ".", os.environ.get("PYTHONPATH", "")])
    env = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    return run_code(code, cwd=Path(__file__).parent.parent, env=env)


def test_the_kernel_gives_what_plain_torch_gives(tmp_path):
    said = run_with_triton(INTERPRETED, tmp_path).stdout
    assert len(said.splitlines()) == len(CASES) + 4


def test_a_kernel_that_differs_is_not_used_and_it_is_said_once(tmp_path):
    said = run_with_triton(REFUSED, tmp_path).stderr
    assert said.count("logits are read by plain torch, slower: no kernel") == 1

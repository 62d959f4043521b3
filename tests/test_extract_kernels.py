"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for cards."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_extract_extraction import CASES

NO_TRITON = pytest.mark.skipif(
    find_spec("triton") is None,
    reason="triton is not installed (pip install '.[kernels]'; no wheel of torch for a CPU has it)",
)

INTERPRETED = """
import torch
import extract_logits as el
from test_extract_extraction import CASES, extract, trained_like
takes_kernels = el.takes_kernels
def by_kernels(logits, **options):
    el.takes_kernels = lambda logits, **sizes: True
    got = extract(logits, **options)
    el.takes_kernels = takes_kernels
    return got
def by_torch(logits):
    parts = [el.sum_blocks(values) for values in el.split_blocks(logits)]
    return [torch.cat(part, 1) for part in zip(*parts, strict=True)]
def compare_sums(logits, name):
    (maxima, sums), (want_maxima, want_sums) = el.sum_blocks_by_kernel(logits), by_torch(logits)
    assert torch.equal(maxima, want_maxima), name
    torch.testing.assert_close(sums, want_sums, rtol=1e-6, atol=0, msg=name)
def compare(logits, name, **options):
    got, want = by_kernels(logits, **options), extract(logits, **options)
    exact = extract(logits, reference=True, **options).logsumexp
    assert ((got.logsumexp - exact).abs() <= 5e-9 + 1e-15 * exact.abs()).all(), name
    for field in el.fields(got):
        ours, theirs = getattr(got, field.name), getattr(want, field.name)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, (name, field.name)
        if ours.dim() == 2:  # what lies beyond the vocabulary is only finite
            ours, theirs = ours[:, : logits.shape[1]], theirs[:, : logits.shape[1]]
        assert field.name == "logsumexp" or torch.equal(ours, theirs), (name, field.name)
    assert got.usable.all(), name
    print(name)
for name in CASES:
    compare_sums(CASES[name]()[:6], name)
    compare(CASES[name]()[-2:], name)
row = trained_like(1, 1000)
compare(row, "K 1", top_p_max=1)
compare(row, "K 255", top_p_max=255)
compare(row, "no tail", sampled_n=0)
compare(row, "a long tail", sampled_n=58)
compare(row, "all of it", top_p=1.0)
compare(row, "half of it", top_p=0.5)
compare(row[:, :100], "K above the vocabulary", top_p_max=255, sampled_n=0)
compare(row, "large seed", seed=2**63 - 1)
compare(row, "small seed", seed=0)
wide = CASES["trained_bfloat16"]()
compare(wide[::99, :4999], "every 99th row, cut off")
compare(wide.T.contiguous().T[:1], "columns apart")
compare_sums(CASES["trained_not_multiple_of_64"]()[:3].expand(3, 5021)[:0], "no rows")
assert by_kernels(torch.zeros(0, 5021)).sampled_ids.shape == (0, 24)
far = torch.empty(2**31 + 300, dtype=torch.bfloat16).as_strided((3, 300), (2**30, 1))
far.copy_(wide[:3, :300])  # rows that begin beyond 31 bits; untouched pages take no memory
compare(far, "far apart")
broken = CASES["trained_not_multiple_of_64"]()[:9]
broken[0, 70], broken[1, 5020], broken[2] = float("nan"), float("inf"), float("-inf")
broken[3, 120:] = float("-inf")
broken[4], broken[5, :4900] = float("nan"), float("nan")
broken[6] = torch.tensor([-1], dtype=torch.int32).view(torch.float32)  # the NaN of least order
broken[7, 3::5] = float("inf")  # more than the k largest
got = by_kernels(broken)
assert got.usable.tolist() == [False] * 8 + [True], got.usable
for ids, logits in ((got.top_ids, got.top_logits), (got.sampled_ids, got.sampled_logits)):
    assert int(ids.min()) >= 0 and int(ids.max()) < 5021 and logits.isfinite().all()
"""

CHECKED = """
import logging
import torch
import extract_logits as el
logging.basicConfig(format="%(message)s")
sizes = (torch.device("cpu"), torch.float32, 700, True, 10, 5)
def agree():
    el.kernels_agree.cache_clear()
    return el.kernels_agree(*sizes)
assert agree()
real = el.extract_by_kernels
def one_tail_is_another(*args, **options):
    got = real(*args, **options)
    got.sampled_ids[3, 4] += 1
    return got
el.extract_by_kernels = one_tail_is_another
assert not agree()
def no_compiler(*args, **options):
    raise RuntimeError("Failed to find C compiler\\nset CC")
el.extract_by_kernels = no_compiler
assert not agree() and not el.kernels_agree(*sizes)
def full(*args, **options):
    raise torch.OutOfMemoryError("CUDA out of memory")
el.extract_by_kernels = full
try:
    raise SystemExit(f"told of a full device: {agree()}")
except torch.OutOfMemoryError:
    pass
def every_row_is_usable(*args, **options):
    got = real(*args, **options)
    return el.replace(got, usable=torch.ones_like(got.usable))
el.extract_by_kernels = every_row_is_usable
assert not agree()
el.extract_by_kernels = real
assert el.kernels_agree(torch.device("cpu"), torch.float32, 704, False, 10, 5)
"""

COMPILED = """
import extract_logits as el
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
TYPES = {
    "logits": "*fp32", "maxima": "*fp32", "sums": "*fp32", "largest": "*fp32", "others": "*fp64",
    "logsumexp": "*fp64", "keys": "*i64", "index": "*i64", "position": "*i64", "blocks": "*i32",
    "edges": "*i32", "runners": "*i32", "top_ids": "*i32", "counts": "*i32", "top_logits": "*fp32",
    "sampled_ids": "*i32", "sampled_logits": "*fp32", "usable": "*i1", "seed_state": "i64",
    "top_p_bits": "i64",
}
LANES = {
    el.choose_kernel: 4096, el.hold_kernel: 8192, el.rank_kernel: 128, el.race_kernel: 4096,
    el.draw_kernel: 2048,
}
def compile_for(arch, kernel, dtype="fp32"):
    names = [name for name in kernel.arg_names if name not in ("LANES", "GROUP")]
    types = {name: TYPES.get(name, "i32") for name in names}
    types |= {"logits": "*" + dtype} if "logits" in types else {}
    constants = {"LANES": LANES[kernel]} if kernel in LANES else {"GROUP": 32}
    aligned = [i for i, name in enumerate(names) if "*" in types[name]]
    aligned += [names.index(name) for name in ("vocab", "row_stride") if name in names]
    return triton.compile(
        ASTSource(
            kernel,
            types | dict.fromkeys(constants, "constexpr"),
            constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        ),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": el.warps_for(LANES.get(kernel, 2048)),
            "enable_fp_fusion": False,
        },
    )
for arch, dtypes in {80: ["fp32"], 90: ["fp32", "bf16"], 100: ["fp16"]}.items():
    for dtype in dtypes:
        ptx = compile_for(arch, el.weigh_kernel, dtype).asm["ptx"]
        loads = [line for line in ptx.splitlines() if "ld.global" in line]
        assert loads and all(".v4." in line for line in loads), loads
        print(arch, dtype)
for kernel in LANES:
    made = compile_for(90, kernel)
    assert made.asm["cubin"] and made.metadata.shared <= 48 * 1024
    print(kernel.__name__)
"""


def run_with_triton(
    code: str, tmp_path: Path, stream: str = "stdout", **environment: str
) -> list[str]:
    """Run code in a fresh process, as Triton reads its environment once; return its lines."""
    paths = ["tests", ".", os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "TRITON_CACHE_DIR": str(tmp_path),
            **environment,
        },
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return str(getattr(done, stream)).splitlines()


@NO_TRITON
def test_kernels_give_what_plain_torch_gives_in_every_field(tmp_path: Path) -> None:
    lines = run_with_triton(INTERPRETED, tmp_path, TRITON_INTERPRET="1")
    assert lines[: len(CASES)] == list(CASES)
    assert len(lines) == len(CASES) + 12


@NO_TRITON
def test_kernels_that_fail_or_differ_on_a_device_are_not_used_and_it_is_said_once(
    tmp_path: Path,
) -> None:
    lines = run_with_triton(CHECKED, tmp_path, TRITON_INTERPRET="1", stream="stderr")
    said = "extraction goes without its Triton kernels, slower: they "
    assert [line for line in lines if "Warning" not in line and not line.startswith(" ")] == [
        said + "differ from plain torch in sampled_ids",
        said + "do not run: Failed to find C compiler",
        said + "differ from plain torch in rows that are broken",
    ]


@NO_TRITON
def test_kernels_compile_for_cards_that_are_not_here_and_read_16_bytes_at_a_time(
    tmp_path: Path,
) -> None:
    assert len(run_with_triton(COMPILED, tmp_path, TRITON_INTERPRET="0")) == 9

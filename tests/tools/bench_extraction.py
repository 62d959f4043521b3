"""What extraction costs on this machine, against the same written plainly.

    python tests/tools/bench_extraction.py    # under 3 minutes on 2 cores; ends in one JSON line
    … --compile    # the first look under torch.compile, nothing else
    … --compact    # compact rows beside the default, by vocabulary

Everything runs on the same logits in this process, methods in turn, and the best time of each
counts. Before any time is printed, the result on every row is compared with the full sort in
float64. Peak memory comes from a fresh process for each method. On a CUDA device the extraction is
also timed against a copy of the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import extract_logits as el

ROWS, VOCAB, TOP_P, K, M, SEED = 256, 151_936, 0.98, 100, 24, 42


class Kept(NamedTuple):
    """What every method has to find."""

    logsumexp: torch.Tensor  # (N,) float64
    top_ids: torch.Tensor  # (N, K)
    counts: torch.Tensor  # (N,)
    sampled_ids: torch.Tensor  # (N, M)


def make_logits(kind: str, rows: int = ROWS, vocab: int = VOCAB) -> torch.Tensor:
    """Return rows shaped like a trained model's, from sure to torn, or nearly flat ones."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.empty(rows, vocab)
    fall = torch.arange(vocab).float().log1p_()
    for row in logits:
        slope = 0.05 if kind == "flat" else 0.5 + 5.5 * torch.rand((), generator=generator)
        row.normal_(20.0, 0.5, generator=generator)
        row.sub_((fall * slope)[torch.randperm(vocab, generator=generator)])
    return logits


# The baselines, each as one writes it from the definition


def extract_plainly(logits: torch.Tensor, *, rows: int, sort: bool) -> Kept:
    """Order in float64, cumulate, mask the nucleus, add noise to all of the vocabulary, take M."""
    parts = []
    for chunk in logits.split(rows):
        exact = chunk.double()
        logsumexp = exact.logsumexp(-1)
        if sort:
            ordered, ids = exact.sort(dim=-1, descending=True, stable=True)
        else:
            top, ids = chunk.topk(K)
            ordered = top.double()
        reached = (ordered - logsumexp.unsqueeze(1)).exp().cumsum(-1)
        counts = ((reached < TOP_P).sum(-1) + 1).clamp(max=K)
        inside = torch.arange(ids.shape[1]) < counts.unsqueeze(1)
        outside = exact.scatter(1, ids, ordered.masked_fill(inside, -math.inf))
        drawn = (outside + gumbel_noise(exact)).topk(M)
        parts.append(Kept(logsumexp, ids[:, :K].clone(), counts, drawn.indices))
    return Kept(*(torch.cat(part) for part in zip(*parts, strict=True)))


def gumbel_noise(like: torch.Tensor) -> torch.Tensor:
    """Return Gumbel noise of the same shape, float64."""
    return -torch.log(-torch.log(torch.rand(like.shape, dtype=torch.float64)))


def extract(logits: torch.Tensor, *, reference: bool = False) -> Kept:
    """Run the project's extraction."""
    number = torch.arange(logits.shape[0], device=logits.device)
    sizes = {"top_p": TOP_P, "top_p_max": K, "sampled_n": M, "seed": SEED}
    place = number // 512, number % 512 + 1
    got = el.extract_tokens(logits, *place, **sizes, reference=reference)
    assert got.usable.all()
    return Kept(got.logsumexp, got.top_ids.long(), got.top_counts.long(), got.sampled_ids.long())


METHODS: dict[str, Callable[[torch.Tensor], Kept]] = {
    "full sort, float64": partial(extract_plainly, rows=64, sort=True),  # or it needs 5 GB
    "topk, logsumexp, full noise": partial(extract_plainly, rows=ROWS, sort=False),
    "the same, 8 rows at a time": partial(extract_plainly, rows=8, sort=False),
    "reference": lambda logits: extract(logits, reference=True),
    "extraction": extract,
}
TIMES = dict(zip(METHODS, (3, 3, 3, 3, 15), strict=True))


def check(name: str, logits: torch.Tensor, want: Kept, got: Kept) -> None:
    """Compare every row with the full sort's; the tail by its place and its first draw's law."""
    assert (got.logsumexp - want.logsumexp).abs().max() < 1e-8, name
    assert torch.equal(got.counts, want.counts), name
    inside = torch.arange(K) < want.counts.unsqueeze(1)
    assert torch.equal(
        logits.gather(1, got.top_ids)[inside], logits.gather(1, want.top_ids)[inside]
    ), name
    if name in ("extraction", "reference"):  # ties by id are not for torch.topk
        assert torch.equal(got.top_ids[inside], want.top_ids[inside]), name
    scores = []
    for row in range(0, logits.shape[0], 4):
        nucleus = want.top_ids[row, : want.counts[row]]
        assert not torch.isin(got.sampled_ids[row], nucleus).any(), name
        assert got.sampled_ids[row].unique().numel() == M, name
        left = logits[row].double().index_fill(0, nucleus, -math.inf).log_softmax(0)
        p = left.exp()
        left[nucleus] = 0.0
        mean = (p * left).sum()
        spread = ((p * left**2).sum() - mean**2).sqrt()
        scores.append((left[got.sampled_ids[row, 0]] - mean) / spread)
    total = torch.stack(scores).sum() / math.sqrt(len(scores))
    assert total.abs() < 5, f"{name}: first draws are {total:.1f} deviations off"


def best_times(logits: torch.Tensor) -> dict[str, float]:
    """Check every method on these logits and return its best time in seconds, taken in turn."""
    best = dict.fromkeys(METHODS, math.inf)
    want = None
    for turn in range(max(TIMES.values())):
        for name, method in METHODS.items():
            if turn < TIMES[name]:
                start = time.perf_counter()
                got = method(logits)
                best[name] = min(best[name], time.perf_counter() - start)
                want = want or got  # the full sort comes first
                check(name, logits, want, got)
    return best


def peak_memory_bytes(name: str) -> int:
    """Return what a method adds to the peak memory of a fresh process that holds the logits."""
    command = [sys.executable, __file__, "--peak-memory", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def print_own_peak(name: str) -> None:
    """Print by how many bytes one call raises this process's peak memory."""
    logits = make_logits("trained")
    METHODS["extraction"](logits[:2])  # the libraries' own buffers
    before = peak_rss_bytes()
    METHODS[name](logits)
    print(peak_rss_bytes() - before)


def peak_rss_bytes() -> int:
    """Return this process's peak memory so far; ru_maxrss would count its parent's on Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def time_on_gpu(repeat: Callable[[], Any], times: int = 20) -> float:
    """Return the mean seconds of work on the device, after a warm-up."""
    for _ in range(3):
        repeat()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        repeat()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000 / times


def gpu_figures(kind: str) -> dict[str, float]:
    """Compare with the CPU, then time extraction on the device against a copy of the logits.

    Milliseconds per 1,000 positions; `reads` is the multiple of one read of the logits, half of a
    copy's time.
    """
    host = make_logits(kind)
    logits = host.cuda()
    got, want = extract(logits), extract(host)
    assert torch.equal(got.sampled_ids.cpu(), want.sampled_ids)
    assert torch.equal(got.counts.cpu(), want.counts)
    sizes = {"top_p_max": K, "sampled_n": M}
    read = el.read_kernel(logits.device)
    logits = logits.repeat(4, 1)
    target = torch.empty_like(logits)
    number = torch.arange(len(logits), device="cuda")
    run = partial(el.extract_tokens, logits, number, number, top_p=TOP_P, seed=SEED, **sizes)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    peak = torch.cuda.max_memory_allocated() - before
    methods: dict[str, Callable[[], Any]] = {
        "one read": lambda: target.copy_(logits),
        "extraction": run,
        "read by plain torch": lambda: [el.sum_blocks(part) for part in el.split_blocks(logits)],
    }
    if read:
        methods["kernel"] = lambda: read(logits)
    figures = {name: time_on_gpu(work) * 1e6 / len(logits) for name, work in methods.items()}
    figures["one read"] /= 2
    figures["reads"] = figures["extraction"] / figures["one read"]
    return figures | {"peak memory, MB": peak / 1e6, "kernel": float(read is not None)}


def machine() -> dict[str, Any]:
    """Name the hardware and the versions."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": el.np.__version__,
    }


def print_table(kind: str, times: dict[str, float], memory: dict[str, int]) -> None:
    """Print one row per method: time, its multiple of the extraction's, peak memory."""
    print(f"\n{ROWS} {kind} rows × {VOCAB:,} float32, top_p {TOP_P}, K {K}, M {M}")
    print(f"{'method':<30}{'ms':>9}{'× extraction':>14}{'extra peak MB':>15}")
    for name, seconds in times.items():
        peak = f"{memory[name] / 1e6:15,.0f}" if name in memory else ""
        print(f"{name:<30}{seconds * 1e3:9,.0f}{seconds / times['extraction']:14.1f}{peak}")


def compile_figures(kind: str) -> dict[str, float]:
    """Time the first look at the logits as it is and under torch.compile, in milliseconds."""
    blocks = el.split_blocks(make_logits(kind))[0]

    def look(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        top = values.amax(-1)
        return top, (values - top.clamp(min=el.LOWEST).unsqueeze(2)).exp().sum(-1)

    compiled = torch.compile(look)
    started = time.perf_counter()
    got = compiled(blocks)
    seconds = time.perf_counter() - started
    for ours, theirs in zip(got, el.sum_blocks(blocks), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    best = dict.fromkeys(("as it is", "compiled"), math.inf)
    for _ in range(15):
        for name, work in (("as it is", el.sum_blocks), ("compiled", compiled)):
            started = time.perf_counter()
            work(blocks)
            best[name] = min(best[name], 1e3 * (time.perf_counter() - started))
    return best | {"compiling": 1e3 * seconds}


def compact_figures() -> dict[str, dict[str, float]]:
    """Print and return CPU milliseconds per 1,000 rows of both kinds of rows, the best of 7."""
    figures: dict[str, dict[str, float]] = {}
    sizes: dict[str, Any] = {"top_p": TOP_P, "top_p_max": K, "sampled_n": M, "seed": SEED}
    kinds = {"default": None, "--min-p 0.005": 0.005, "--min-p 0.01": 0.01}
    print(f"\n| vocabulary | rows | {' | '.join(kinds)} |\n|---|---|---|---|---|")
    for vocab in (49_152, VOCAB, 262_144):
        for shape in ("trained", "flat"):
            logits, number = make_logits(shape, vocab=vocab), torch.arange(ROWS)
            best = dict.fromkeys(kinds, math.inf)
            for name, min_p in list(kinds.items()) * 7:
                begun = time.process_time()
                el.extract_tokens(logits, number, number + 1, min_p=min_p, **sizes)
                best[name] = min(best[name], (time.process_time() - begun) * 1e6 / ROWS)
            figures[f"{vocab} {shape}"] = best
            values = " | ".join(f"{value:.0f}" for value in best.values())
            print(f"| {vocab:,} | {shape} | {values} |", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compact", action="store_true", help="time compact rows instead")
    parser.add_argument("--peak-memory", metavar="METHOD", help=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", help="time torch.compile instead")
    args = parser.parse_args()
    if args.peak_memory:
        print_own_peak(args.peak_memory)
        return
    torch.manual_seed(1)
    figures: dict[str, Any] = {"benchmark": "extraction", "machine": machine()}
    print("\n".join(f"{name:8} {value}" for name, value in figures["machine"].items()))
    if args.compact:
        torch.set_num_threads(1)
        print(json.dumps({**figures, "CPU ms per 1,000 rows": compact_figures()}))
        return
    if args.compile:
        figures["first look, ms"] = compile_figures("trained")
        print(json.dumps(figures))
        return
    for kind in ("trained", "flat"):
        times = best_times(make_logits(kind))
        memory = {n: peak_memory_bytes(n) for n in METHODS} if kind == "trained" else {}
        print_table(kind, times, memory)
        figures[kind] = {"seconds": times, "peak_memory_bytes": memory}
    if torch.cuda.is_available():
        figures["gpu"] = {kind: gpu_figures(kind) for kind in ("trained", "flat")}
        for kind, measured in figures["gpu"].items():
            print(f"\non the GPU, {kind} rows, milliseconds per 1,000 positions")
            print("\n".join(f"{name:16} {value:10.3f}" for name, value in measured.items()))
    else:
        print("\nno CUDA device: nothing was measured on one")
    seconds = figures["trained"]["seconds"]
    figures["ratio_full_sort"] = seconds["full sort, float64"] / seconds["extraction"]
    figures["ratio_topk"] = seconds["topk, logsumexp, full noise"] / seconds["extraction"]
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

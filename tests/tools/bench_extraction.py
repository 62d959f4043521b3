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
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from bench import best_in_turn, machine, peak_bytes, print_head, print_row, run_apart, timed
from torch.distributions import Categorical
from torch.utils.benchmark import Timer

import extract_logits as el

ROWS, VOCAB, TOP_P, K, M = 256, 151_936, 0.98, 100, 24
SIZES: dict[str, Any] = {"top_p": TOP_P, "top_p_max": K, "sampled_n": M, "seed": 42}
SHAPES = ("trained", "flat")


class Kept(NamedTuple):
    """What every method has to find."""

    logsumexp: torch.Tensor  # (N,) float64
    top_ids: torch.Tensor  # (N, K)
    counts: torch.Tensor  # (N,)
    sampled_ids: torch.Tensor  # (N, M)


def make_logits(kind: str, vocab: int = VOCAB) -> torch.Tensor:
    """Return rows shaped like a trained model's, from sure to torn, or nearly flat ones."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.empty(ROWS, vocab)
    fall = torch.arange(vocab).float().log1p_()
    for row in logits:
        slope = 0.05 if kind == "flat" else 0.5 + 5.5 * torch.rand((), generator=generator)
        row.normal_(20.0, 0.5, generator=generator)
        row.sub_((fall * slope)[torch.randperm(vocab, generator=generator)])
    return logits


def extract_plainly(logits: torch.Tensor, *, rows: int, sort: bool) -> Kept:
    """Order in float64, cumulate, mask the nucleus, add noise to all of the vocabulary, take M.

    As one writes it from the definition.
    """
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
        drawn = (outside - torch.log(-torch.log(torch.rand_like(exact)))).topk(M)
        parts.append(Kept(logsumexp, ids[:, :K].clone(), counts, drawn.indices))
    return Kept(*(torch.cat(part) for part in zip(*parts, strict=True)))


def extract(logits: torch.Tensor, *, reference: bool = False) -> Kept:
    number = torch.arange(logits.shape[0], device=logits.device)
    got = el.extract_tokens(logits, number // 512, number % 512 + 1, **SIZES, reference=reference)
    assert got.usable.all()
    return Kept(got.logsumexp, got.top_ids.long(), got.top_counts.long(), got.sampled_ids.long())


METHODS: dict[str, Callable[[torch.Tensor], Kept]] = {
    "full sort, float64": partial(extract_plainly, rows=64, sort=True),  # or it needs 5 GB
    "topk, logsumexp, full noise": partial(extract_plainly, rows=ROWS, sort=False),
    "the same, 8 rows at a time": partial(extract_plainly, rows=8, sort=False),
    "reference": partial(extract, reference=True),
    "extraction": extract,
}


def check(name: str, logits: torch.Tensor, want: Kept, got: Kept) -> None:
    """Compare every row with the full sort's; the tail by its place and its first draw's law."""
    assert (got.logsumexp - want.logsumexp).abs().max() < 1e-8, name
    assert torch.equal(got.counts, want.counts), name
    inside = torch.arange(K) < want.counts.unsqueeze(1)
    values = (logits.gather(1, kept.top_ids)[inside] for kept in (got, want))
    assert torch.equal(*values), name
    if name in ("extraction", "reference"):  # ties by id are not for torch.topk
        assert torch.equal(got.top_ids[inside], want.top_ids[inside]), name
    scores = []
    for row in range(0, logits.shape[0], 4):
        nucleus = want.top_ids[row, : want.counts[row]]
        both = torch.cat([got.sampled_ids[row], nucleus])
        assert both.unique().numel() == M + nucleus.numel(), name
        law = Categorical(logits=logits[row].double().index_fill(0, nucleus, -1e9))
        surprise = -law.logits
        spread = ((law.probs * surprise**2).sum() - law.entropy() ** 2).sqrt()
        scores.append((surprise[got.sampled_ids[row, 0]] - law.entropy()) / spread)
    total = torch.stack(scores).sum() / math.sqrt(len(scores))
    assert total.abs() < 5, f"{name}: first draws are {total:.1f} deviations off"


def best_times(shape: str) -> dict[str, float]:
    """Check every method on logits of a shape and return its best milliseconds."""
    logits = make_logits(shape)
    want = METHODS["full sort, float64"](logits)
    for name, method in METHODS.items():
        check(name, logits, want, method(logits))
    works = {name: partial(method, logits) for name, method in METHODS.items()}
    best = best_in_turn(works, 3, time.perf_counter)
    best |= best_in_turn({"extraction": works["extraction"]}, 15, time.perf_counter)
    return {name: 1e3 * seconds for name, seconds in best.items()}


def print_own_peak(name: str) -> None:
    """Print by how many bytes one call raises the peak of a fresh process that holds the logits."""
    logits = make_logits("trained")
    METHODS["extraction"](logits[:2])  # the libraries' own buffers
    before = peak_bytes()
    METHODS[name](logits)
    print(peak_bytes() - before)


def compare_methods() -> dict[str, Any]:
    """Print and return what each method takes, its multiple of the extraction's and its peak."""
    times = {shape: best_times(shape) for shape in SHAPES}
    peaks = {name: run_apart(__file__, "--peak-memory", name) for name in METHODS}
    print_head("method", "trained rows, ms", "×", "extra peak MB", "flat rows, ms", "×")
    for name, peak in peaks.items():
        cells = [f"{ms[name]:,.0f} | {ms[name] / ms['extraction']:.1f}" for ms in times.values()]
        print_row(name, cells[0], f"{peak / 1e6:,.0f}", cells[1])
    return {"milliseconds": times, "peak_memory_bytes": peaks}


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
    read = el.read_kernel(logits.device)
    logits = logits.repeat(4, 1)
    target, number = torch.empty_like(logits), torch.arange(len(logits), device="cuda")
    methods: dict[str, Callable[[], Any]] = {
        "one read": partial(target.copy_, logits),
        "extraction": partial(el.extract_tokens, logits, number, number, **SIZES),
        "read by plain torch": lambda: [el.sum_blocks(part) for part in el.split_blocks(logits)],
        **({"kernel": partial(read, logits)} if read else {}),
    }
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    methods["extraction"]()
    peak = torch.cuda.max_memory_allocated() - before
    timers = {name: Timer("work()", globals={"work": work}) for name, work in methods.items()}
    figures = {name: timer.timeit(20).mean * 1e6 / len(logits) for name, timer in timers.items()}
    figures["one read"] /= 2
    figures["reads"] = figures["extraction"] / figures["one read"]
    return figures | {"peak memory, MB": peak / 1e6}


def time_compiling() -> dict[str, float]:
    """Return milliseconds of the first look at the logits as it is and under torch.compile."""
    blocks = el.split_blocks(make_logits("trained"))[0]

    def look(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        top = values.amax(-1)
        return top, (values - top.clamp(min=el.LOWEST).unsqueeze(2)).exp().sum(-1)

    compiled = torch.compile(look)
    compiling, got = timed(partial(compiled, blocks), time.perf_counter)
    torch.testing.assert_close(got, el.sum_blocks(blocks), rtol=1e-6, atol=0)
    ways = {"as it is": partial(el.sum_blocks, blocks), "compiled": partial(compiled, blocks)}
    best = best_in_turn(ways, 15, time.perf_counter) | {"compiling": compiling}
    return {name: 1e3 * seconds for name, seconds in best.items()}


def compare_kinds() -> dict[str, dict[str, float]]:
    """Print and return CPU milliseconds per 1,000 rows of both kinds of rows, the best of 7."""
    torch.set_num_threads(1)
    figures: dict[str, dict[str, float]] = {}
    kinds = {"default": None, "`--min-p 0.005`": 0.005, "`--min-p 0.01`": 0.01}
    print_head("vocabulary", "rows", *kinds)
    for vocab in (49_152, VOCAB, 262_144):
        for shape in SHAPES:
            logits, number = make_logits(shape, vocab=vocab), torch.arange(ROWS)
            run = partial(el.extract_tokens, logits, number, number + 1, **SIZES)
            ways = {name: partial(run, min_p=min_p) for name, min_p in kinds.items()}
            best = best_in_turn(ways, 7, time.process_time)
            found = figures[f"{vocab} {shape}"] = {k: 1e6 / ROWS * s for k, s in best.items()}
            print_row(f"{vocab:,}", shape, *(f"{value:.0f}" for value in found.values()))
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
    if args.compact:
        figures["CPU ms per 1,000 rows"] = compare_kinds()
    elif args.compile:
        figures["first look, ms"] = time_compiling()
    else:
        figures |= compare_methods()
        if torch.cuda.is_available():
            figures["gpu"] = {shape: gpu_figures(shape) for shape in SHAPES}
        else:
            print("\nno CUDA device: nothing was measured on one")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

"""Check every row of a finished run against plain float64 loops on the model's own forward.

It shares no line with the three scripts: it reads the Parquet files, finds the assistant's tokens,
runs the model, unpacks and dequantizes in its own slow way, and compares token by token. The logits
of the token at position p are those of the model at p - 1, one conversation at a time.

What a float32 forward of another batch shape may change is allowed, counted and bounded
(`Tolerance`): two logits closer than `Tolerance.logit` may change places in the order of the
nucleus, and a cumulative mass closer than `Tolerance.mass` to top_p may fall on either side.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.stats import kstest
from tail_law import uniforms
from transformers import AutoModelForCausalLM, AutoTokenizer

IDS, REALS = pa.list_(pa.uint16()), pa.list_(pa.float32())
COLUMNS = [
    ("index", pa.int32()), ("num_tokens", pa.int32()),
    ("top_indices_low", IDS), ("top_indices_high", pa.binary()), ("top_logits_quantized", IDS),
    ("top_counts", pa.list_(pa.uint8())), ("top_min", REALS), ("top_max", REALS),
    ("sampled_indices_low", IDS), ("sampled_indices_high", pa.binary()),
    ("sampled_logits_quantized", IDS), ("sampled_min", REALS), ("sampled_max", REALS),
    ("logsumexp", pa.list_(pa.float64())),
]  # fmt: skip
TOKEN_COLUMNS = [(name, pa.list_(pa.int32())) for name in ("input_ids", "token_positions")]
ASSISTANT = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)
FLOAT_STEPS = 0.02  # float32 is good to 0.01 of a step in (x - min) / (max - min) * 65535
TAIL_FALSE_ALARM = 1e-9  # of a right run, whose random numbers are fixed: passing once is always


class Violation(AssertionError):
    """The run holds something else than the model says; the message names row and token."""


class Tolerance(NamedTuple):
    """How far a right run may be from the reference, in nats and in probability."""

    logit: float
    logsumexp: float
    mass: float


# Two float32 forwards of one model: another batch shape, another order of additions. A step of
# float32 is 2e-6 at a logit of 20; a head of width 128 was seen to differ by six of them.
OTHER_FORWARD = Tolerance(logit=2e-5, logsumexp=1.5e-5, mass=2e-5)


@dataclass(frozen=True)
class Settings:
    """What the run was asked for."""

    top_p: float = 0.98
    top_p_max: int = 100
    sampled_n: int = 24
    logit_bits: int = 16
    store_tokens: bool = False

    @classmethod
    def from_output(cls, output: Path) -> Settings:
        said = json.loads((output / "extraction_config.json").read_text(encoding="utf-8"))
        return cls(**{name: said[name] for name in cls.__dataclass_fields__})


class Entries(NamedTuple):
    """The nucleus or the tail of one token, unpacked."""

    ids: list[int]
    q: list[int]
    low: float
    high: float


class OracleToken(NamedTuple):
    """The right answer for one position."""

    logsumexp: float
    nucleus: list[int]  # in its order
    order: np.ndarray  # (V,) ids by descending logit, ties by ascending id


@dataclass
class Report:
    """Figures of a run that held."""

    rows: int = 0
    tokens: int = 0
    max_logsumexp_error: float = 0.0  # in nats
    exempt: int = 0  # near-ties that stood otherwise
    tail_p_value: float = 1.0
    sizes: set[int] = field(default_factory=set, repr=False)  # of nuclei
    uniforms: list[list[float]] = field(default_factory=list, repr=False)


def require(condition: bool, where: str, what: str) -> None:
    if not condition:
        raise Violation(f"{where}: {what}")


def check_schema(file: Path, settings: Settings) -> None:
    """Require the exact names, order and types."""
    schema = pq.read_schema(file)
    expected = pa.schema(COLUMNS + (TOKEN_COLUMNS if settings.store_tokens else []))
    require(schema.names == expected.names, file.name, f"columns are {schema.names}")
    for column, wanted in zip(schema, expected, strict=True):
        require(column.type.equals(wanted.type), file.name, f"column {column}, not {wanted.type}")


def unpack_ids(low: list[int], high: bytes, *, where: str) -> list[int]:
    """Put 16 low bits and 2 high bits together; bits 0-1 of a byte belong to the first id."""
    require(len(high) == (len(low) + 3) // 4, where, f"{len(high)} high bytes, {len(low)} ids")
    padded = len(low) % 4 == 0 or high[-1] >> (2 * (len(low) % 4)) == 0
    require(padded, where, "the last high byte is not zero padded")
    return [bits + 65536 * ((high[i // 4] >> (2 * (i % 4))) & 3) for i, bits in enumerate(low)]


def dequantize(q: list[int], low: float, high: float) -> list[float]:
    return [step / 65535 * (high - low) + low for step in q]


def unpack_row(record: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Return a record with the entries of each token as "top" and "tail"; check every length."""
    where, n = f"row {record['index']}", record["num_tokens"]
    for name, value in record.items():
        holes = value is None or (isinstance(value, list) and None in value)
        require(not holes, where, f"null in {name}")
    for name in ("top_counts", "logsumexp"):
        require(len(record[name]) == n, where, f"{name} has {len(record[name])}, not {n}")
    top = cut_entries(record, "top", record["top_counts"], where)
    tail = cut_entries(record, "sampled", [settings.sampled_n] * n, where)
    return {**record, "top": top, "tail": tail}


def cut_entries(
    record: Mapping[str, Any], kind: str, counts: list[int], where: str
) -> list[Entries]:
    """Return the entries of each token, of which `counts` says the number."""
    names = [f"{kind}_{name}" for name in ("indices_low", "logits_quantized", "min", "max")]
    low_bits, q, low, high = (record[name] for name in names)
    total = sum(counts)
    ranges = len(counts) if total else 0
    for name, wanted in zip(names, (total, total, ranges, ranges), strict=True):
        require(len(record[name]) == wanted, where, f"{name} has {len(record[name])}, not {wanted}")
    ids = unpack_ids(low_bits, record[f"{kind}_indices_high"], where=where)
    cut, start = [], 0
    for t, count in enumerate(counts):
        part = slice(start, start + count)
        ends = (low[t], high[t]) if count else (0.0, 0.0)
        cut.append(Entries(ids[part], q[part], *ends))
        start += count
    return cut


def read_run(output: Path, settings: Settings) -> dict[int, dict[str, Any]]:
    """Return every row by index; a row stored twice is a violation."""
    rows: dict[int, dict[str, Any]] = {}
    for file in sorted((output / "data").glob("*.parquet")):
        check_schema(file, settings)
        for record in pq.ParquetFile(file).read().to_pylist():
            require(record["index"] not in rows, f"row {record['index']}", "stored twice")
            rows[record["index"]] = unpack_row(record, settings)
    return rows


def oracle_token(x: np.ndarray, top_p: float, top_p_max: int) -> OracleToken:
    """Return log-sum-exp and nucleus of one row of logits (V,) float64, by the definition.

    A logit of -inf is probability zero and never in the nucleus.
    """
    peak = float(x.max())
    logsumexp = peak + math.log(math.fsum(np.exp(x - peak).tolist()))
    order = np.argsort(-x, kind="stable")  # stable: equal logits stay by ascending id
    nucleus: list[int] = []
    mass = 0.0
    for token_id in order[:top_p_max].tolist():
        if x[token_id] == -math.inf:
            break
        nucleus.append(token_id)
        mass += math.exp(x[token_id] - logsumexp)
        if mass >= top_p and top_p < 1:  # 1 needs every possible token, however sums are rounded
            break
    return OracleToken(logsumexp, nucleus, order)


def assistant_tokens(messages: list[dict[str, Any]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids of a ChatML conversation and the positions of what the assistant generates.

    A token belongs to a turn when one of its characters does; the turn is its text and the
    end-of-turn marker, without the header before and the line break after.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [match.span(1) for match in ASSISTANT.finditer(text)]
    positions = [
        p
        for p, (first, last) in enumerate(encoded["offset_mapping"])
        if p > 0 and any(first < stop and last > start for start, stop in spans)
    ]
    return encoded["input_ids"], positions


def full_forward(model: Any, input_ids: list[int]) -> Any:
    """Return the (S, V) float32 logits of one conversation, from one plain call of the model."""
    with torch.inference_mode():
        ids = torch.tensor([input_ids], dtype=torch.long, device=model.device)
        return model(input_ids=ids, use_cache=False).logits[0].float()


def reference_vocab_size(model: Any, tokenizer: Any) -> int:
    """Return V: ids up to the tokenizer's highest; embedding rows beyond are padding."""
    highest = max(tokenizer.get_vocab().values())
    return min(highest + 1, model.get_output_embeddings().weight.shape[0])


class RunCheck:
    """A reference teacher and what a run of it was asked for."""

    def __init__(
        self, model: Any, tokenizer: Any, settings: Settings, tolerance: Tolerance = OTHER_FORWARD
    ) -> None:
        self.model, self.tokenizer, self.report = model, tokenizer, Report()
        self.settings, self.tolerance = settings, tolerance
        self.vocab_size = reference_vocab_size(model, tokenizer)
        self.rng = np.random.default_rng(20220817)

    def check_row(self, row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
        """Compare one row with the model's forward on its conversation."""
        where, there = f"row {row['index']}", row["num_tokens"]
        input_ids, positions = assistant_tokens(messages, self.tokenizer)
        require(there == len(positions), where, f"num_tokens is {there}, not {len(positions)}")
        if self.settings.store_tokens:
            require(row["input_ids"] == input_ids, where, "input_ids are not the conversation's")
            require(row["token_positions"] == positions, where, "token_positions are not right")
        logits, report = full_forward(self.model, input_ids), self.report
        for t, position in enumerate(positions):
            x = logits[position - 1, : self.vocab_size].double().cpu().numpy()
            place, said = f"{where} token {t}", row["logsumexp"][t]
            right = self.check_token(row["top"][t], row["tail"][t], x, place)
            report.max_logsumexp_error = max(report.max_logsumexp_error, abs(said - right))
            near = abs(said - right) <= self.tolerance.logsumexp
            require(near, place, f"logsumexp {said!r}, right is {right!r}")
        report.tokens += there
        report.rows += 1

    def check_token(self, top: Entries, tail: Entries, x: np.ndarray, where: str) -> float:
        """Compare a token with the reference's logits x (V,) float64; return its log-sum-exp."""
        truth = oracle_token(x, self.settings.top_p, self.settings.top_p_max)
        ids = top.ids + tail.ids
        require(len(set(ids)) == len(ids), where, f"an id is there twice: {ids}")
        possible = all(i < len(x) and x[i] > -math.inf for i in ids)
        require(possible, where, f"of {ids} some are impossible or not below V = {len(x)}")
        self.check_nucleus(top.ids, x, truth, where)
        for name, entries in (("nucleus", top), ("tail", tail)):
            if entries.ids:
                self.check_values(entries, x, f"{where} {name}")
        require(top.q == sorted(top.q, reverse=True), where, "nucleus q does not descend")
        left = truth.order[~np.isin(truth.order, top.ids)]  # likeliest first
        ranks = np.argsort(left)[np.searchsorted(np.sort(left), tail.ids)]
        self.report.uniforms.append(uniforms(x[left], ranks[None], self.rng)[0].tolist())
        return truth.logsumexp

    def check_nucleus(self, ids: list[int], x: np.ndarray, truth: OracleToken, where: str) -> None:
        """Require the smallest prefix with mass ≥ top_p, capped, of the tokens in their order.

        What only noise allows is counted: an id whose logit is a near-tie of the right one's, and
        a size where the mass is nearly top_p.
        """
        count, top_p, report = len(ids), self.settings.top_p, self.report
        most = min(self.settings.top_p_max, int(np.count_nonzero(x > -math.inf)))
        require(1 <= count <= most, where, f"the nucleus holds {count} tokens")
        for token_id, right in zip(ids, truth.order[:count].tolist(), strict=True):
            gap = abs(float(x[token_id] - x[right]))
            said = f"{token_id} in the nucleus, right is {right}, {gap:.3g} nats apart"
            require(gap <= self.tolerance.logit, where, said)
            report.exempt += token_id != right
        p = np.exp(x[truth.order[:count]] - truth.logsumexp)
        before, mass = math.fsum(p[:-1]), math.fsum(p)
        missing = top_p - mass if count < most else 0.0
        excess = before - top_p if top_p < 1 else 0.0  # 1 needs every token, however sums round
        said = f"nucleus of wrong size: {count} tokens hold {mass!r}, all but one {before!r}"
        require(max(missing, excess) <= self.tolerance.mass, where, said)
        report.exempt += max(missing, excess) > 1e-12
        report.sizes.add(count)

    def check_values(self, entries: Entries, x: np.ndarray, where: str) -> None:
        """Require the exact range and every logit within half a step of it."""
        ids, q, low, high = entries
        right = x[ids].tolist()
        for end, found, wanted in (("min", low, min(right)), ("max", high, max(right))):
            near = abs(found - wanted) <= self.tolerance.logit
            require(near, where, f"{end} is {found!r}, right is {wanted!r}")
        spans = (min(q), max(q)) == ((0, 0) if low == high else (0, 65535))
        require(spans, where, f"q spans {min(q)} to {max(q)}")
        step = (high - low) / (2**self.settings.logit_bits - 1)
        # With fewer bits a level is stored as the nearest of 65,536: half of such a step more.
        rounding = 0.0 if self.settings.logit_bits == 16 else 0.5 * (high - low) / 65535
        allowed = (0.5 + FLOAT_STEPS) * step + rounding + self.tolerance.logit
        for wanted, value in zip(right, dequantize(q, low, high), strict=True):
            said = f"logit {value!r}, right is {wanted!r}, step {step:.3g}"
            require(abs(value - wanted) <= allowed, where, said)

    def finish(self) -> Report:
        """Bound the exemptions (one in a hundred tokens, and two) and test the tail as a whole."""
        report = self.report
        said = f"{report.exempt} near-ties of {report.tokens} tokens, more than noise explains"
        require(report.exempt <= 2 + report.tokens // 100, "run", said)
        table = np.array(report.uniforms)  # (N, M); exact Kolmogorov p-values of three views of it
        views = (table.ravel(), table[:, 0], table[:, -1]) if table.size else ()
        p_values = [3 * float(kstest(view, "uniform").pvalue) for view in views]
        report.tail_p_value = min([1.0, *p_values])
        said = f"the tail is not drawn by its law, p = {report.tail_p_value:.3g}"
        require(report.tail_p_value >= TAIL_FALSE_ALARM, "run", said)
        return report


def check_run(
    output: Path, model: Any, tokenizer: Any, conversations: Mapping[int, list[dict[str, Any]]]
) -> Report:
    """Check every row of a folder against the messages of its index; return the figures."""
    check = RunCheck(model, tokenizer, Settings.from_output(output))
    rows = read_run(output, check.settings)
    for index in sorted(set(conversations) ^ set(rows)):
        raise Violation(f"row {index}: {'missing' if index in conversations else 'not asked for'}")
    for index in sorted(rows):
        check.check_row(rows[index], conversations[index])
    return check.finish()


def read_conversations(dataset: Path, said: Mapping[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """Read the conversations of a .jsonl file by index; `said` by a run are names of columns."""
    lines = filter(str.strip, dataset.read_text(encoding="utf-8").split("\n"))
    index_col, messages = said.get("index_col"), said.get("messages_col") or "messages"
    records = enumerate(map(json.loads, lines))
    return {(record[index_col] if index_col else n): record[messages] for n, record in records}


def load_reference(model: str) -> tuple[Any, Any]:
    """Load a teacher with float32 weights on the CPU, and its tokenizer."""
    teacher = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return teacher, AutoTokenizer.from_pretrained(model)

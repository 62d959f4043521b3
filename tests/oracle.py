"""Check every row of a finished run against plain float64 loops on the model's own forward.

It shares no line with the three scripts: it reads the Parquet files, finds the assistant's tokens,
runs the model, unpacks and dequantizes in its own slow way, and compares token by token. The logits
of the token at position p are those of the model at p - 1, one conversation at a time.

What a float32 forward of another batch shape may change is allowed, counted and bounded
(`Tolerance`): two logits closer than `Tolerance.logit` may change places in the order of the
nucleus, and a cumulative mass closer than `Tolerance.mass` to top_p may fall on either side.
Tokens whose output embeddings are the same bits tie in every forward; they get no such grace.
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
from tail_law import uniforms_afresh
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


# The run and the reference looked at the same logits: what is left is the rounding of float32
# exponentials (2^-24 = 6e-8, less when many are summed) where a method sums them inside blocks.
SAME_LOGITS = Tolerance(logit=0.0, logsumexp=6e-8, mass=6e-8)
# Two float32 forwards of one model: another batch shape, another order of additions. A step of
# float32 is 2e-6 at a logit of 20; a head of width 128 was seen to differ by six of them.
OTHER_FORWARD = Tolerance(logit=2e-5, logsumexp=1.5e-5, mass=2e-5)


@dataclass(frozen=True)
class Settings:
    """What the run was asked for; `from_output` reads what the output says of itself."""

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

    name: str
    ids: list[int]
    q: list[int]
    low: float
    high: float


class StoredToken(NamedTuple):
    top: Entries
    tail: Entries
    logsumexp: float


class StoredRow(NamedTuple):
    index: int
    tokens: list[StoredToken]
    input_ids: list[int] | None
    token_positions: list[int] | None


class OracleToken(NamedTuple):
    """The right answer for one position: log-sum-exp, nucleus in its order, full order."""

    logsumexp: float
    nucleus: list[int]
    order: np.ndarray  # (V,) ids by descending logit, ties by ascending id


@dataclass
class Report:
    """Figures of a run that held: errors in nats, and in a token's own quantization steps."""

    rows: int = 0
    tokens: int = 0
    max_logsumexp_error: float = 0.0
    max_steps: float = 0.0  # of quantization, beyond Tolerance.logit
    nucleus_min: int = 256
    nucleus_max: int = 0
    near_ties: int = 0
    near_boundaries: int = 0
    tail_p_value: float = 1.0
    uniforms: list[list[float]] = field(default_factory=list, repr=False)


def require(condition: bool, where: str, what: str) -> None:
    if not condition:
        raise Violation(f"{where}: {what}")


# 1 What is stored ---------------------------------------------------------------------------------


def check_schema(file: Path, settings: Settings) -> None:
    """Require the exact names, order and types, and that the shard explains itself."""
    schema = pq.read_schema(file)
    expected = pa.schema(COLUMNS + (TOKEN_COLUMNS if settings.store_tokens else []))
    require(schema.names == expected.names, file.name, f"columns are {schema.names}")
    for column, wanted in zip(schema, expected, strict=True):
        require(column.type.equals(wanted.type), file.name, f"column {column}, not {wanted.type}")
    texts = [value.decode("utf-8", "replace") for value in (schema.metadata or {}).values()]
    explained = any('"top_p"' in text and '"seed"' in text for text in texts)
    require(explained, file.name, "the settings are not in the key-value metadata")


def unpack_ids(low: list[int], high: bytes, *, where: str) -> list[int]:
    """Put 16 low bits and 2 high bits together; bits 0-1 of a byte belong to the first id."""
    require(len(high) == (len(low) + 3) // 4, where, f"{len(high)} high bytes, {len(low)} ids")
    used = len(low) % 4
    padded = used == 0 or high[-1] >> (2 * used) == 0
    require(padded, where, "the last high byte is not zero padded")
    return [bits + 65536 * ((high[i // 4] >> (2 * (i % 4))) & 3) for i, bits in enumerate(low)]


def dequantize(q: list[int], low: float, high: float) -> list[float]:
    return [step / 65535 * (high - low) + low for step in q]


def unpack_row(record: Mapping[str, Any], settings: Settings) -> StoredRow:
    """Cut the flat lists of a row into tokens, checking every length on the way."""
    where = f"row {record['index']}"
    for name, value in record.items():
        holes = value is None or (isinstance(value, list) and None in value)
        require(not holes, where, f"null in {name}")
    n, m = record["num_tokens"], settings.sampled_n
    for name in ("top_counts", "logsumexp"):
        require(len(record[name]) == n, where, f"{name} has {len(record[name])}, not {n}")
    top = cut_entries(record, "top", record["top_counts"], where)
    tail = cut_entries(record, "sampled", [m] * n, where)
    tokens = [StoredToken(*parts) for parts in zip(top, tail, record["logsumexp"], strict=True)]
    text = (record.get(name) for name in ("input_ids", "token_positions"))
    return StoredRow(record["index"], tokens, *text)


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
        cut.append(Entries({"top": "nucleus"}.get(kind, "tail"), ids[part], q[part], *ends))
        start += count
    return cut


def read_run(output: Path, settings: Settings) -> dict[int, StoredRow]:
    """Return every row by index; a row stored twice is a violation."""
    rows: dict[int, StoredRow] = {}
    files = sorted((output / "data").glob("*.parquet"))
    require(bool(files), str(output), "no data/*.parquet")
    for file in files:
        check_schema(file, settings)
        for record in pq.ParquetFile(file).read().to_pylist():
            require(record["index"] not in rows, f"row {record['index']}", "stored twice")
            rows[record["index"]] = unpack_row(record, settings)
    return rows


# 2 What is right ----------------------------------------------------------------------------------


def oracle_token(logits_row: np.ndarray, top_p: float, top_p_max: int) -> OracleToken:
    """Return log-sum-exp and nucleus of one row of logits (V,), in float64, by the definition.

    A logit of -inf is probability zero and never in the nucleus.
    """
    x = np.asarray(logits_row, dtype=np.float64)
    peak = float(x.max())
    require(math.isfinite(peak), "reference", f"the largest logit is {peak}")
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


def find_twins(model: Any, vocab_size: int) -> dict[int, list[int]]:
    """Return, for ids whose output embeddings are equal bit by bit, all ids that share them."""
    head = model.get_output_embeddings()
    assert getattr(head, "bias", None) is None, "equal rows of a head with a bias are no twins"
    same: dict[bytes, list[int]] = {}
    for token_id, row in enumerate(head.weight.detach().float().cpu().numpy()[:vocab_size]):
        same.setdefault(row.tobytes(), []).append(token_id)
    return {i: members for members in same.values() if len(members) > 1 for i in members}


# 3 Compare one token ------------------------------------------------------------------------------


@dataclass
class TokenCheck:
    """All checks of one stored token against one row of reference logits."""

    stored: StoredToken
    x: np.ndarray  # (V,) float64
    settings: Settings
    tolerance: Tolerance
    where: str
    twins: Mapping[int, list[int]] = field(default_factory=dict)  # see `find_twins`
    near_ties: int = 0
    near_boundaries: int = 0
    steps: float = 0.0

    def __post_init__(self) -> None:
        self.truth = oracle_token(self.x, self.settings.top_p, self.settings.top_p_max)

    def require(self, condition: bool, what: str) -> None:
        require(condition, self.where, what)

    def run(self) -> TokenCheck:
        top, tail, m = self.stored.top, self.stored.tail, self.settings.sampled_n
        self.check_ids(top, 1, self.settings.top_p_max)
        self.check_ids(tail, m, m)
        overlap = set(top.ids) & set(tail.ids)
        self.require(not overlap, f"ids {sorted(overlap)} are in the nucleus and in the tail")
        said, right = self.stored.logsumexp, self.truth.logsumexp
        self.logsumexp_error = abs(said - right)
        near = self.logsumexp_error <= self.tolerance.logsumexp
        self.require(near, f"logsumexp {said!r}, right is {right!r}")
        self.check_nucleus_order()
        self.check_count()
        for entries in (top, tail):
            if entries.ids:
                self.check_values(entries)
        self.require(top.q == sorted(top.q, reverse=True), "nucleus q does not descend")
        return self

    def check_ids(self, entries: Entries, least: int, most: int) -> None:
        name, ids = entries.name, entries.ids
        self.require(least <= len(ids) <= most, f"{name} holds {len(ids)} tokens")
        self.require(len(set(ids)) == len(ids), f"{name} holds an id twice: {ids}")
        for token_id in ids:
            self.require(0 <= token_id < len(self.x), f"{name} id {token_id}, V is {len(self.x)}")
            self.require(self.x[token_id] > -math.inf, f"{name} id {token_id} is impossible")

    def check_nucleus_order(self) -> None:
        """Compare place by place: another id is right only where its logit is a near-tie.

        Of ids that tie exactly each lower one stands before.
        """
        ids = self.stored.top.ids
        order = self.truth.order[: len(ids)].tolist()
        for place, (token_id, right) in enumerate(zip(ids, order, strict=True)):
            if token_id != right:
                gap = abs(float(self.x[token_id] - self.x[right]))
                said = f"nucleus place {place}: {token_id}, right is {right}, {gap:.3g} nats apart"
                self.require(gap <= self.tolerance.logit and self.tolerance.logit > 0, said)
                self.near_ties += 1
            for twin in self.twins.get(token_id, []):
                late = twin < token_id and twin not in ids[:place]
                said = f"ids {twin} and {token_id} tie exactly; the lower id comes first"
                self.require(not late or self.x[twin] != self.x[token_id], said)

    def check_count(self) -> None:
        """Require the smallest prefix with mass ≥ top_p, capped; count what only noise allows."""
        count, top_p = len(self.stored.top.ids), self.settings.top_p
        p = np.exp(self.x[self.truth.order[:count]] - self.truth.logsumexp)
        before, mass = math.fsum(p[:-1]), math.fsum(p)
        possible = int(np.count_nonzero(self.x > -math.inf))
        full = count in (self.settings.top_p_max, possible)
        # At top_p 1 either is right: every possible token, or where float64 sums reach 1.
        if not full and mass < top_p - (1e-12 if top_p == 1 else 0.0):
            self.near_boundary(top_p - mass, f"mass {mass!r} of {count} is below top_p {top_p}")
        if before >= top_p and top_p < 1:
            self.near_boundary(before - top_p, f"{count - 1} tokens hold {before!r} already")

    def near_boundary(self, gap: float, what: str) -> None:
        self.require(gap <= self.tolerance.mass, f"nucleus of wrong size: {what}")
        self.near_boundaries += 1

    def check_values(self, entries: Entries) -> None:
        """Require the exact range and every logit within half a step of it."""
        name, ids, q, low, high = entries
        right = [float(self.x[i]) for i in ids]
        for end, found, wanted in (("min", low, min(right)), ("max", high, max(right))):
            near = abs(found - wanted) <= self.tolerance.logit
            self.require(near, f"{name} {end} is {found!r}, right is {wanted!r}")
        if low == high:
            self.require(not any(q), f"{name} has one value and q {q}, not all 0")
        else:
            self.require(min(q) == 0 and max(q) == 65535, f"{name} q spans {min(q)} to {max(q)}")
        step = (high - low) / (2**self.settings.logit_bits - 1)
        # With fewer bits a level is stored as the nearest of 65,536: half of such a step more.
        rounding = 0.0 if self.settings.logit_bits == 16 else 0.5 * (high - low) / 65535
        allowed = (0.5 + FLOAT_STEPS) * step + rounding + self.tolerance.logit
        for wanted, value in zip(right, dequantize(q, low, high), strict=True):
            error = abs(value - wanted)
            self.steps = max(self.steps, (error - self.tolerance.logit) / step if step else 0.0)
            said = f"{name} logit {value!r}, right is {wanted!r}, step {step:.3g}"
            self.require(error <= allowed, said)


# 4 The law of the tail over a whole run -----------------------------------------------------------


def tail_uniforms(
    x: np.ndarray, order: np.ndarray, nucleus: list[int], drawn: list[int], rng: np.random.Generator
) -> list[float]:
    """Return one number per draw, independent and uniform exactly when the law is right."""
    outside, rank = np.ones(len(order), bool), np.zeros(len(order), np.int64)
    outside[nucleus] = False
    tail = order[outside[order]]  # likeliest first
    rank[tail] = np.arange(len(tail))
    return uniforms_afresh(x[tail], rank[None, drawn], rng)[0].tolist()


def tail_p_value(uniforms: list[list[float]]) -> float:
    """Return the smallest of three exact Kolmogorov p-values (all, first, last), times three."""
    if not uniforms or not uniforms[0]:
        return 1.0
    table = np.array(uniforms)  # (N, M)
    views = (table.ravel(), table[:, 0], table[:, -1])
    return min(1.0, 3 * min(float(kstest(view, "uniform").pvalue) for view in views))


# 5 Check a run ------------------------------------------------------------------------------------


class RunCheck:
    """A reference teacher and what a run of it was asked for."""

    def __init__(
        self, model: Any, tokenizer: Any, settings: Settings, tolerance: Tolerance = OTHER_FORWARD
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.settings, self.tolerance, self.report = settings, tolerance, Report()
        self.vocab_size = reference_vocab_size(model, tokenizer)
        self.twins = find_twins(model, self.vocab_size)
        self.rng = np.random.default_rng(20220817)

    def check_row(self, row: StoredRow, messages: list[dict[str, Any]]) -> None:
        """Compare one row with the model's forward on its conversation."""
        where = f"row {row.index}"
        input_ids, positions = assistant_tokens(messages, self.tokenizer)
        there, wanted = len(row.tokens), len(positions)
        require(there == wanted, where, f"num_tokens is {there}, the assistant has {wanted}")
        if self.settings.store_tokens:
            require(row.input_ids == input_ids, where, "input_ids are not the conversation's")
            require(row.token_positions == positions, where, "token_positions are not right")
        logits, report = full_forward(self.model, input_ids), self.report
        for t, (token, position) in enumerate(zip(row.tokens, positions, strict=True)):
            x = logits[position - 1, : self.vocab_size].double().cpu().numpy()
            place = f"row {row.index} token {t}"
            check = TokenCheck(token, x, self.settings, self.tolerance, place, self.twins).run()
            drawn = (check.truth.order, token.top.ids, token.tail.ids)
            report.uniforms.append(tail_uniforms(x, *drawn, self.rng))
            report.near_ties += check.near_ties
            report.near_boundaries += check.near_boundaries
            report.nucleus_min = min(report.nucleus_min, len(token.top.ids))
            report.nucleus_max = max(report.nucleus_max, len(token.top.ids))
            report.max_logsumexp_error = max(report.max_logsumexp_error, check.logsumexp_error)
            report.max_steps = max(report.max_steps, check.steps)
        report.tokens += there
        report.rows += 1

    def finish(self) -> Report:
        """Bound the exemptions (one in a hundred tokens, and two) and test the tail as a whole."""
        report = self.report
        used = report.near_ties + report.near_boundaries
        said = f"{used} near-ties used on {report.tokens} tokens, more than noise explains"
        require(used <= 2 + report.tokens // 100, "run", said)
        report.tail_p_value = tail_p_value(report.uniforms)
        said = f"the tail is not drawn by its law, p = {report.tail_p_value:.3g}"
        require(report.tail_p_value >= TAIL_FALSE_ALARM, "run", said)
        return report


def check_run(
    output: Path, model: Any, tokenizer: Any, conversations: Mapping[int, list[dict[str, Any]]]
) -> Report:
    """Check every row of a folder against the messages of its index; return the figures.

    Raises:
        Violation: naming the first row and token that is wrong.
    """
    check = RunCheck(model, tokenizer, Settings.from_output(output))
    rows = read_run(output, check.settings)
    for index in sorted(set(conversations) ^ set(rows)):
        raise Violation(f"row {index}: {'missing' if index in conversations else 'not asked for'}")
    for index in sorted(rows):
        check.check_row(rows[index], conversations[index])
    return check.finish()


def read_conversations(dataset: Path, said: Mapping[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """Read the conversations of a .jsonl file by index; `said` by a run are names of columns."""
    records = map(json.loads, filter(str.strip, dataset.read_text(encoding="utf-8").split("\n")))
    index_col = said.get("index_col")
    return {
        (record[index_col] if index_col else number): messages_of(record, said)
        for number, record in enumerate(records)
    }


def messages_of(record: Mapping[str, Any], said: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not said.get("user_col"):
        return record[said.get("messages_col") or "messages"]
    columns = {"system": "system_col", "user": "user_col", "assistant": "assistant_col"}
    return [
        {"role": role, "content": record[said[column]]}
        for role, column in columns.items()
        if said.get(column) and record[said[column]]
    ]


def load_reference(model: str) -> tuple[Any, Any]:
    """Load a teacher with float32 weights on the CPU, and its tokenizer."""
    teacher = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return teacher, AutoTokenizer.from_pretrained(model)

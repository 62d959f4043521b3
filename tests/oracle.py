"""Check every row of a finished run against plain float64 loops on the model's own forward.

It shares no line with the three scripts: it reads the Parquet files, finds the assistant's tokens,
runs the model, unpacks and dequantizes in its own slow way, and compares. The picture:

    source conversations ─→ rendered text ─→ assistant spans ─→ wanted token positions
                                  │                                    │
    model, one conversation a time ─→ logits (S, V) ─→ row p - 1 for the token at position p
                                                                       │
    data/*.parquet ─→ schema, lists, bits, q ─────────────→ compare token by token ─→ figures

Letters: S sequence length, N extracted tokens of a row, V vocabulary size, K nucleus cap,
M tail samples per token.

    python tests/oracle.py --model MODEL --dataset FILE --output FOLDER

prints one JSON line of figures, or raises `Violation` that names the first wrong row and token.

What a float32 forward of another batch shape may change is allowed, counted and bounded
(`Tolerance`): two logits closer than `Tolerance.logit` may change places in the order of the
nucleus, and a cumulative mass closer than `Tolerance.mass` to top_p may fall on either side.
Tokens whose output embeddings are the same bits tie in every forward; they get no such grace.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
MAX_ID = 262_143
# Float32 arithmetic on (x - min) / (max - min) * 65535 is good to about 0.01 of a step.
FLOAT_STEPS = 0.02
# A right run fails the tail test by chance once in 1e9; its random numbers are fixed, so a run
# that passes once passes always.
TAIL_FALSE_ALARM = 1e-9


class Violation(AssertionError):
    """The run holds something else than the model says; the message names row and token."""


@dataclass(frozen=True)
class Tolerance:
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


class StoredToken(NamedTuple):
    """One token of one row, unpacked; ids and q as lists of int."""

    top_ids: list[int]
    top_q: list[int]
    top_min: float
    top_max: float
    sampled_ids: list[int]
    sampled_q: list[int]
    sampled_min: float
    sampled_max: float
    logsumexp: float


class StoredRow(NamedTuple):
    """One row of a shard, unpacked."""

    index: int
    tokens: list[StoredToken]
    input_ids: list[int] | None
    token_positions: list[int] | None


class OracleToken(NamedTuple):
    """The right answer for one position: log-sum-exp, nucleus in its order, mass, full order."""

    logsumexp: float
    nucleus: list[int]
    mass: float
    order: np.ndarray  # (V,) ids by descending logit, ties by ascending id


@dataclass
class Report:
    """Figures of a run that held, in nats; steps are a token's own quantization steps.

    The forward's noise is measured at the ends of the ranges, which are stored exactly; the
    quantization error in steps is what a logit has beyond `Tolerance.logit`.
    """

    shards: int = 0
    rows: int = 0
    tokens: int = 0
    entries: int = 0
    max_logsumexp_error: float = 0.0
    max_forward_noise: float = 0.0
    max_logit_error: float = 0.0
    max_quantization_error_steps: float = 0.0
    nucleus_min: int = 256
    nucleus_max: int = 0
    mean_mass: float = 0.0
    near_ties: int = 0
    near_boundaries: int = 0
    tail_draws: int = 0
    tail_p_value: float = 1.0
    uniforms: list[list[float]] = field(default_factory=list, repr=False)

    def figures(self) -> dict[str, Any]:
        """Return what is worth printing, as plain JSON values."""
        return {name: value for name, value in asdict(self).items() if name != "uniforms"}


def require(condition: bool, where: str, what: str) -> None:
    if not condition:
        raise Violation(f"{where}: {what}")


# 1 What is stored ---------------------------------------------------------------------------------


def check_schema(file: Path, settings: Settings) -> None:
    """Require the exact names, order and types, and that the shard explains itself."""
    schema = pq.read_schema(file)
    expected = COLUMNS + (TOKEN_COLUMNS if settings.store_tokens else [])
    found = [(column.name, column.type) for column in schema]
    if [name for name, _ in found] != [name for name, _ in expected]:
        raise Violation(f"{file.name}: columns are {[name for name, _ in found]}")
    for (name, kind), (_, wanted) in zip(found, expected, strict=True):
        same = kind == wanted or (pa.types.is_list(kind) and kind.value_type == wanted.value_type)
        require(same, file.name, f"column {name} is {kind}, not {wanted}")
    texts = [value.decode("utf-8", "replace") for value in (schema.metadata or {}).values()]
    require(
        any('"top_p"' in text and '"seed"' in text for text in texts),
        file.name,
        "the settings are not in the key-value metadata",
    )


def unpack_ids(low: list[int], high: bytes, *, where: str) -> list[int]:
    """Put 16 low bits and 2 high bits together; bits 0-1 of a byte belong to the first id."""
    require(len(high) == (len(low) + 3) // 4, where, f"{len(high)} high bytes, {len(low)} ids")
    ids = []
    for i, low_bits in enumerate(low):
        two_bits = (high[i // 4] >> (2 * (i % 4))) & 3
        ids.append(low_bits + 65536 * two_bits)
    used = len(low) % 4
    padded = used == 0 or high[-1] >> (2 * used) == 0
    require(padded, where, "the last high byte is not zero padded")
    return ids


def dequantize(q: list[int], low: float, high: float) -> list[float]:
    return [step / 65535 * (high - low) + low for step in q]


def unpack_row(record: Mapping[str, Any], settings: Settings) -> StoredRow:
    """Cut the flat lists of a row into tokens, checking every length on the way."""
    where = f"row {record['index']}"
    for name, value in record.items():
        holes = value is None or (isinstance(value, list) and None in value)
        require(not holes, where, f"null in {name}")
    n, m = record["num_tokens"], settings.sampled_n
    counts = record["top_counts"]
    total = sum(counts)
    lengths = {
        "top_counts": n, "top_min": n, "top_max": n, "logsumexp": n,
        "top_indices_low": total, "top_logits_quantized": total,
        "sampled_indices_low": n * m, "sampled_logits_quantized": n * m,
        "sampled_min": n if m else 0, "sampled_max": n if m else 0,
    }  # fmt: skip
    for name, wanted in lengths.items():
        require(len(record[name]) == wanted, where, f"{name} has {len(record[name])}, not {wanted}")
    return StoredRow(
        record["index"],
        list(cut_tokens(record, counts, m, where=where)),
        record.get("input_ids"),
        record.get("token_positions"),
    )


def cut_tokens(
    record: Mapping[str, Any], counts: list[int], m: int, *, where: str
) -> Iterator[StoredToken]:
    top_ids = unpack_ids(record["top_indices_low"], record["top_indices_high"], where=where)
    sampled_ids = unpack_ids(
        record["sampled_indices_low"], record["sampled_indices_high"], where=where
    )
    start = 0
    for t, count in enumerate(counts):
        top, tail = slice(start, start + count), slice(t * m, (t + 1) * m)
        ends = [record[f"sampled_{end}"][t] if m else 0.0 for end in ("min", "max")]
        yield StoredToken(
            top_ids[top], record["top_logits_quantized"][top], record["top_min"][t],
            record["top_max"][t], sampled_ids[tail], record["sampled_logits_quantized"][tail],
            *ends, record["logsumexp"][t],
        )  # fmt: skip
        start += count


def read_run(output: Path, settings: Settings) -> tuple[int, dict[int, StoredRow]]:
    """Return the number of shards and every row by index; a row stored twice is a violation."""
    rows: dict[int, StoredRow] = {}
    files = sorted((output / "data").glob("*.parquet"))
    require(bool(files), str(output), "no data/*.parquet")
    for file in files:
        check_schema(file, settings)
        for record in pq.ParquetFile(file).read().to_pylist():
            require(record["index"] not in rows, f"row {record['index']}", "stored twice")
            rows[record["index"]] = unpack_row(record, settings)
    return len(files), rows


# 2 What is right ----------------------------------------------------------------------------------


def oracle_token(logits_row: np.ndarray, top_p: float, top_p_max: int) -> OracleToken:
    """Return log-sum-exp and nucleus of one row of logits, in float64, by the definition.

    Args:
        logits_row: (V,) any float dtype; -inf is probability zero and never in the nucleus.

    Raises:
        ValueError: the row holds NaN or +inf, or nothing but -inf.
    """
    x = np.asarray(logits_row, dtype=np.float64)
    peak = float(x.max())
    if not math.isfinite(peak):
        raise ValueError(f"largest logit is {peak}")
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
    return OracleToken(logsumexp, nucleus, mass, order)


def assistant_tokens(
    messages: list[dict[str, Any]], tokenizer: Any, *, chat_template: str | None = None
) -> tuple[list[int], list[int]]:
    """Return the ids of a ChatML conversation and the positions of what the assistant generates.

    A token belongs to a turn when one of its characters does; the turn is its text and the
    end-of-turn marker, without the header before and the line break after.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=chat_template)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [match.span(1) for match in ASSISTANT.finditer(text)]
    positions = []
    for p, (first, last) in enumerate(encoded["offset_mapping"]):
        wanted = any(first < stop and last > start for start, stop in spans)
        if wanted and p > 0:
            positions.append(p)
    return encoded["input_ids"], positions


def full_forward(model: Any, input_ids: list[int]) -> Any:
    """Return the (S, V) float32 logits of one conversation, from one plain call of the model."""
    import torch

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
    weight = head.weight.detach().float().cpu().numpy()[:vocab_size]
    bias = getattr(head, "bias", None)
    if bias is not None:
        column = bias.detach().float().cpu().numpy()[:vocab_size, None]
        weight = np.concatenate([weight, column], axis=1)
    same: dict[bytes, list[int]] = {}
    for token_id in range(len(weight)):
        same.setdefault(weight[token_id].tobytes(), []).append(token_id)
    return {i: members for members in same.values() if len(members) > 1 for i in members}


# 3 Compare one token ------------------------------------------------------------------------------


class TokenCheck:
    """All checks of one stored token against one row of reference logits.

    Args:
        x: (V,) float64 reference logits.
        twins: ids that tie by construction, see `find_twins`.
    """

    def __init__(
        self,
        stored: StoredToken,
        x: np.ndarray,
        *,
        settings: Settings,
        tolerance: Tolerance,
        where: str,
        twins: Mapping[int, list[int]] | None = None,
    ) -> None:
        self.stored, self.x, self.where = stored, x, where
        self.settings, self.tolerance, self.twins = settings, tolerance, twins or {}
        self.truth = oracle_token(x, settings.top_p, settings.top_p_max)
        self.near_ties = 0
        self.near_boundaries = 0
        self.noise = 0.0
        self.logit_error = 0.0
        self.steps = 0.0
        self.mass = 0.0

    def require(self, condition: bool, what: str) -> None:
        require(condition, self.where, what)

    def run(self) -> TokenCheck:
        self.check_ids(self.stored.top_ids, "nucleus")
        self.check_ids(self.stored.sampled_ids, "tail")
        overlap = set(self.stored.top_ids) & set(self.stored.sampled_ids)
        self.require(not overlap, f"ids {sorted(overlap)} are in the nucleus and in the tail")
        self.check_logsumexp()
        self.check_nucleus_order()
        self.check_twins()
        self.check_count()
        s = self.stored
        self.check_values("nucleus", s.top_ids, s.top_q, s.top_min, s.top_max)
        self.check_values("tail", s.sampled_ids, s.sampled_q, s.sampled_min, s.sampled_max)
        self.require(s.top_q == sorted(s.top_q, reverse=True), "nucleus q does not descend")
        return self

    def check_ids(self, ids: list[int], part: str) -> None:
        wanted = range(1, self.settings.top_p_max + 1)
        if part == "tail":
            wanted = range(self.settings.sampled_n, self.settings.sampled_n + 1)
        self.require(len(ids) in wanted, f"{part} holds {len(ids)} tokens")
        self.require(len(set(ids)) == len(ids), f"{part} holds an id twice: {ids}")
        for token_id in ids:
            self.require(0 <= token_id < len(self.x), f"{part} id {token_id}, V is {len(self.x)}")
            self.require(self.x[token_id] > -math.inf, f"{part} id {token_id} is impossible")

    def check_logsumexp(self) -> None:
        self.logsumexp_error = abs(self.stored.logsumexp - self.truth.logsumexp)
        self.require(
            self.logsumexp_error <= self.tolerance.logsumexp,
            f"logsumexp {self.stored.logsumexp!r}, right is {self.truth.logsumexp!r}",
        )

    def check_nucleus_order(self) -> None:
        """Compare place by place: another id is right only where its logit is a near-tie."""
        for place, token_id in enumerate(self.stored.top_ids):
            right = int(self.truth.order[place])
            if token_id == right:
                continue
            gap = abs(float(self.x[token_id] - self.x[right]))
            self.require(
                gap <= self.tolerance.logit and self.tolerance.logit > 0,
                f"nucleus place {place} is id {token_id}, right is {right}, {gap:.3g} nats apart",
            )
            self.near_ties += 1

    def check_twins(self) -> None:
        """Require exact ties by ascending id: no lower twin left out, none out of turn."""
        seen: dict[int, int] = {}
        for token_id in self.stored.top_ids:
            members = self.twins.get(token_id)
            if members is None or len({float(self.x[i]) for i in members}) > 1:
                continue
            turn = seen.get(members[0], 0)
            self.require(
                members[turn] == token_id,
                f"ids {members[turn]} and {token_id} tie exactly; the lower id comes first",
            )
            seen[members[0]] = turn + 1

    def check_count(self) -> None:
        """Require the smallest prefix with mass ≥ top_p, capped; count what only noise allows."""
        count, top_p = len(self.stored.top_ids), self.settings.top_p
        mass, before = 0.0, 0.0
        for token_id in self.truth.order[:count].tolist():
            before = mass
            mass += math.exp(self.x[token_id] - self.truth.logsumexp)
        possible = int(np.count_nonzero(self.x > -math.inf))
        full = count in (self.settings.top_p_max, possible)
        # At top_p 1 either is right: every possible token, or where float64 sums reach 1.
        if not full and mass < top_p - (1e-12 if top_p == 1 else 0.0):
            self.near_boundary(top_p - mass, f"mass {mass!r} of {count} is below top_p {top_p}")
        if before >= top_p and top_p < 1:
            self.near_boundary(before - top_p, f"{count - 1} tokens hold {before!r} already")
        self.mass = mass

    def near_boundary(self, gap: float, what: str) -> None:
        self.require(gap <= self.tolerance.mass, f"nucleus of wrong size: {what}")
        self.near_boundaries += 1

    def check_values(
        self, part: str, ids: list[int], q: list[int], low: float, high: float
    ) -> None:
        """Require the exact range and every logit within half a step of it."""
        if not ids:
            return
        right = [float(self.x[i]) for i in ids]
        for name, found, wanted in (("min", low, min(right)), ("max", high, max(right))):
            self.noise = max(self.noise, abs(found - wanted))
            self.require(
                abs(found - wanted) <= self.tolerance.logit,
                f"{part} {name} is {found!r}, right is {wanted!r}",
            )
        if low == high:
            self.require(not any(q), f"{part} has one value and q {q}, not all 0")
        else:
            self.require(min(q) == 0 and max(q) == 65535, f"{part} q spans {min(q)} to {max(q)}")
        self.check_quantization(part, right, dequantize(q, low, high), span=high - low)

    def check_quantization(
        self, part: str, right: list[float], found: list[float], *, span: float
    ) -> None:
        step = span / (2**self.settings.logit_bits - 1)
        # With fewer bits a level is stored as the nearest of 65,536: half of such a step more.
        rounding = 0.0 if self.settings.logit_bits == 16 else 0.5 * span / 65535
        for wanted, value in zip(right, found, strict=True):
            error = abs(value - wanted)
            self.logit_error = max(self.logit_error, error)
            if step > 0:
                self.steps = max(self.steps, (error - self.tolerance.logit) / step)
            allowed = (0.5 + FLOAT_STEPS) * step + rounding + self.tolerance.logit
            self.require(
                error <= allowed, f"{part} logit {value!r}, right is {wanted!r}, step {step:.3g}"
            )


# 4 The law of the tail over a whole run -----------------------------------------------------------


def tail_uniforms(
    x: np.ndarray, order: np.ndarray, nucleus: list[int], drawn: list[int], rng: np.random.Generator
) -> list[float]:
    """Return one number per draw, independent and uniform exactly when the law is right.

    Each draw is placed in the distribution function of what is left, from likely to unlikely,
    at a random point inside its own step. Source: Rosenblatt 1952, "Remarks on a multivariate
    transformation".
    """
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    left = x[order].copy()  # (V,) descending
    left[place[nucleus]] = -math.inf
    numbers = []
    for token_id in drawn:
        at = int(place[token_id])
        weights = np.exp(left - left.max())  # by the largest left: nothing underflows that counts
        before = float(weights[:at].sum())
        numbers.append((before + rng.random() * float(weights[at])) / float(weights.sum()))
        left[at] = -math.inf
    return numbers


def tail_p_value(uniforms: list[list[float]]) -> float:
    """Return the smallest of three exact Kolmogorov p-values (all, first, last), times three."""
    from scipy.stats import kstest

    if not uniforms or not uniforms[0]:
        return 1.0
    table = np.array(uniforms)  # (N, M)
    views = (table.ravel(), table[:, 0], table[:, -1])
    return min(1.0, 3 * min(float(kstest(view, "uniform").pvalue) for view in views))


# 5 Check a run ------------------------------------------------------------------------------------


@dataclass
class RunCheck:
    """A reference teacher and what a run of it was asked for."""

    model: Any
    tokenizer: Any
    settings: Settings
    tolerance: Tolerance = OTHER_FORWARD
    chat_template: str | None = None
    report: Report = field(default_factory=Report)

    def __post_init__(self) -> None:
        self.vocab_size = reference_vocab_size(self.model, self.tokenizer)
        self.twins = find_twins(self.model, self.vocab_size)
        self.rng = np.random.default_rng(20220817)

    def check_row(self, row: StoredRow, messages: list[dict[str, Any]]) -> None:
        """Compare one row with the model's forward on its conversation."""
        where = f"row {row.index}"
        input_ids, positions = assistant_tokens(
            messages, self.tokenizer, chat_template=self.chat_template
        )
        require(
            len(row.tokens) == len(positions),
            where,
            f"num_tokens is {len(row.tokens)}, the assistant has {len(positions)}",
        )
        if self.settings.store_tokens:
            require(row.input_ids == input_ids, where, "input_ids are not the conversation's")
            require(row.token_positions == positions, where, "token_positions are not right")
        logits = full_forward(self.model, input_ids)
        for t, (token, position) in enumerate(zip(row.tokens, positions, strict=True)):
            x = logits[position - 1, : self.vocab_size].double().cpu().numpy()
            self.add(self.check_token(token, x, f"row {row.index} token {t}"))
        self.report.rows += 1

    def check_token(self, token: StoredToken, x: np.ndarray, where: str) -> TokenCheck:
        check = TokenCheck(
            token, x, settings=self.settings, tolerance=self.tolerance, where=where,
            twins=self.twins,
        )  # fmt: skip
        check.run()
        order = check.truth.order
        self.report.uniforms.append(
            tail_uniforms(x, order, token.top_ids, token.sampled_ids, self.rng)
        )
        return check

    def add(self, check: TokenCheck) -> None:
        report, count = self.report, len(check.stored.top_ids)
        report.tokens += 1
        report.entries += count
        report.near_ties += check.near_ties
        report.near_boundaries += check.near_boundaries
        report.tail_draws += len(check.stored.sampled_ids)
        report.nucleus_min = min(report.nucleus_min, count)
        report.mean_mass += (check.mass - report.mean_mass) / report.tokens
        for name, value in {
            "nucleus_max": count, "max_logsumexp_error": check.logsumexp_error,
            "max_forward_noise": check.noise, "max_logit_error": check.logit_error,
            "max_quantization_error_steps": check.steps,
        }.items():  # fmt: skip
            setattr(report, name, max(getattr(report, name), value))

    def finish(self) -> Report:
        """Bound the exemptions (one in a hundred tokens, and two) and test the tail as a whole."""
        report = self.report
        used = report.near_ties + report.near_boundaries
        require(
            used <= 2 + report.tokens // 100,
            "run",
            f"{used} near-ties used on {report.tokens} tokens, more than noise explains",
        )
        report.tail_p_value = tail_p_value(report.uniforms)
        require(
            report.tail_p_value >= TAIL_FALSE_ALARM,
            "run",
            f"the tail is not drawn by its law, p = {report.tail_p_value:.3g}",
        )
        return report


def check_run(
    output: str | Path,
    model: Any,
    tokenizer: Any,
    conversations: Mapping[int, list[dict[str, Any]]],
    *,
    settings: Settings | None = None,
    skipped: Collection[int] = (),
    chat_template: str | None = None,
    tolerance: Tolerance = OTHER_FORWARD,
) -> Report:
    """Check every row of `output` and return the figures.

    Args:
        output: folder with data/*.parquet and extraction_config.json.
        model: causal LM of transformers, float32 weights.
        conversations: messages by the index their row must have.
        settings: what the run was asked for; default: what the output says.
        skipped: indices that must not be there; all others must.

    Raises:
        Violation: naming the first row and token that is wrong.
    """
    folder = Path(output)
    check = RunCheck(
        model, tokenizer, settings or Settings.from_output(folder), tolerance, chat_template
    )
    check.report.shards, rows = read_run(folder, check.settings)
    wanted = set(conversations) - set(skipped)
    for index in sorted(wanted ^ set(rows)):
        raise Violation(f"row {index}: {'missing' if index in wanted else 'not asked for'}")
    for index in sorted(rows):
        check.check_row(rows[index], conversations[index])
    return check.finish()


# 6 Command line -----------------------------------------------------------------------------------


def read_conversations(
    dataset: Path, said: Mapping[str, Any] | None = None
) -> dict[int, list[dict[str, Any]]]:
    """Read the conversations of a .jsonl or .parquet file by index.

    Args:
        said: `extraction_config.json` of a run, for the names of the columns.
    """
    if dataset.suffix == ".parquet":
        records = pq.read_table(dataset).to_pylist()
    else:
        lines = dataset.read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines if line.strip()]
    said = said or {}
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
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return teacher, AutoTokenizer.from_pretrained(model)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check a run against the model's own forward.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True, type=Path, help=".jsonl or .parquet")
    parser.add_argument("--output", required=True, type=Path, help="folder of the run")
    parser.add_argument("--skipped", type=int, nargs="*", default=[], help="rows rightly left out")
    parser.add_argument("--noise", type=float, help="nats per logit, for other dtypes and devices")
    args = parser.parse_args(argv)
    said = json.loads((args.output / "extraction_config.json").read_text(encoding="utf-8"))
    conversations = read_conversations(args.dataset, said)
    noise = args.noise
    tolerance = OTHER_FORWARD if noise is None else Tolerance(noise, noise, 2 * noise)
    template = args.output / "chat_template.jinja"
    report = check_run(
        args.output,
        *load_reference(args.model),
        conversations,
        skipped=args.skipped,
        chat_template=template.read_text(encoding="utf-8") if template.exists() else None,
        tolerance=tolerance,
    )
    print(json.dumps(report.figures()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The oracle passes a right run and rejects every wrong one that we could think of.

The run is written here by a plain writer of its own, from a random teacher of 300 ids that has
padding rows with the largest logits, and ties; then one thing at a time is made wrong.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_teachers import tiny_model, tiny_tokenizer

V, PADDING, TWINS = 300, 20, 140
TOP_P, K, M = 0.9, 20, 6
SETTINGS = {
    "top_p": TOP_P, "top_p_max": K, "sampled_n": M, "logit_bits": 16,
    "store_tokens": True, "seed": 42,
}  # fmt: skip
CONVERSATIONS = {
    3: [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Two and two?"},
        {"role": "assistant", "content": "Four, as ever. 四"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Quite sure."},
    ],
    7: [{"role": "user", "content": "Say nothing."}, {"role": "assistant", "content": ""}],
    8: [
        {"role": "user", "content": "A list, please"},
        {"role": "assistant", "content": "1. one\n2. two\n\n" + "and so on, " * 12},
    ],
}


@dataclass
class Token:
    """What the plain writer knows of a token before quantization."""

    x: np.ndarray  # (V,) float32, the logits it came from
    padded: np.ndarray  # (V + PADDING,) float32
    top: list[int]
    tail: list[int]
    logsumexp: float


@dataclass
class Run:
    rows: dict[int, list[Token]]
    records: list[dict[str, Any]]


def right_tail(x: np.ndarray, top: list[int], rng: np.random.Generator) -> list[int]:
    weights = np.exp(x.astype(np.float64))
    weights[top] = 0
    drawn: list[int] = []
    for _ in range(M):
        drawn.append(int(rng.choice(V, p=weights / weights.sum())))
        weights[drawn[-1]] = 0
    return drawn


def right_token(padded: np.ndarray, rng: np.random.Generator) -> Token:
    x = padded[:V]
    p = np.exp(x.astype(np.float64))
    logsumexp = float(np.log(p.sum()))
    ranked = sorted(range(V), key=lambda i: (-x[i], i))
    top: list[int] = []
    while len(top) < K and sum(p[i] for i in top) < TOP_P * p.sum():
        top.append(ranked[len(top)])
    return Token(x, padded, top, right_tail(x, top, rng), logsumexp)


def pack(ids: list[int]) -> bytes:
    bits = [i >> 16 for i in ids] + [0, 0, 0]
    groups = [bits[i : i + 4] for i in range(0, len(ids), 4)]
    return bytes(a | b << 2 | c << 4 | d << 6 for a, b, c, d in groups)


def quantize(values: list[float]) -> tuple[list[int], float, float]:
    low, high = min(values), max(values)
    scale = 65535 / (high - low) if high > low else 0.0
    return [round((value - low) * scale) for value in values], low, high


def flat(lists: Iterable[list[int]]) -> list[int]:
    return [value for values in lists for value in values]


def record_of(index: int, tokens: list[Token], ids: list[int], at: list[int]) -> dict[str, Any]:
    """Make the Parquet record of a row; the helper columns of `Token` flattened and quantized."""
    top = [quantize([float(t.x[i]) for i in t.top]) for t in tokens]
    tail = [quantize([float(t.x[i]) for i in t.tail]) for t in tokens]
    top_ids, tail_ids = flat(t.top for t in tokens), flat(t.tail for t in tokens)
    return {
        "index": index,
        "num_tokens": len(tokens),
        "top_indices_low": [i & 65535 for i in top_ids],
        "top_indices_high": pack(top_ids),
        "top_logits_quantized": flat(q for q, _, _ in top),
        "top_counts": [len(t.top) for t in tokens],
        "top_min": [low for _, low, _ in top],
        "top_max": [high for _, _, high in top],
        "sampled_indices_low": [i & 65535 for i in tail_ids],
        "sampled_indices_high": pack(tail_ids),
        "sampled_logits_quantized": flat(q for q, _, _ in tail),
        "sampled_min": [low for _, low, _ in tail],
        "sampled_max": [high for _, _, high in tail],
        "logsumexp": [t.logsumexp for t in tokens],
        "input_ids": ids,
        "token_positions": at,
    }


@pytest.fixture(scope="module")
def teacher() -> tuple[Any, Any]:
    return tiny_model(V, padding=PADDING, twins=TWINS, seed=5), tiny_tokenizer(V)


@pytest.fixture(scope="module")
def right_rows(teacher: tuple[Any, Any]) -> dict[int, tuple[list[Token], list[int], list[int]]]:
    """Rows of a right run: tokens, input ids, positions, by index."""
    model, tokenizer = teacher
    rng = np.random.default_rng(0)
    rows = {}
    for index, messages in CONVERSATIONS.items():
        ids, positions = oracle.assistant_tokens(messages, tokenizer)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids])).logits[0].numpy()
        rows[index] = ([right_token(logits[p - 1], rng) for p in positions], ids, positions)
    return rows


@pytest.fixture
def check(teacher: tuple[Any, Any], tmp_path: Path) -> Callable[..., oracle.Report]:
    """Write records as a run and let the oracle look at it."""

    def write_and_check(
        records: list[dict[str, Any]],
        *,
        columns: list[tuple[str, Any]] | None = None,
        tolerance: oracle.Tolerance = oracle.OTHER_FORWARD,
    ) -> oracle.Report:
        schema = pa.schema(
            columns or oracle.COLUMNS + oracle.TOKEN_COLUMNS,
            metadata={"settings": json.dumps(SETTINGS)},
        )
        (tmp_path / "data").mkdir()
        for part, record in enumerate(records):
            table = pa.Table.from_pylist([record], schema=schema)
            pq.write_table(table, tmp_path / "data" / f"part-{part:05d}.parquet")
        (tmp_path / "extraction_config.json").write_text(json.dumps(SETTINGS))
        return oracle.check_run(tmp_path, *teacher, CONVERSATIONS, tolerance=tolerance)

    return write_and_check


def records_of(rows: dict[int, Any]) -> list[dict[str, Any]]:
    return [record_of(index, *row) for index, row in rows.items()]


# --------------------------------------------------------------------------------------------------
# A right run passes
# --------------------------------------------------------------------------------------------------


def test_a_right_run_passes_with_its_figures(check: Any, right_rows: Any) -> None:
    report = check(records_of(right_rows), tolerance=oracle.SAME_LOGITS)
    assert report.rows == 3
    assert report.tokens == sum(len(tokens) for tokens, _, _ in right_rows.values())
    assert report.max_logsumexp_error < 1e-9
    assert 0.4 < report.max_quantization_error_steps <= 0.5 + oracle.FLOAT_STEPS
    assert report.near_ties == report.near_boundaries == 0
    assert report.tail_p_value > 1e-3
    json.dumps(report.figures())


def test_the_example_has_what_the_mutations_need(right_rows: Any) -> None:
    tokens = [token for row in right_rows.values() for token in row[0]]
    assert any(token.padded.argmax() >= V for token in tokens)
    assert any(1 < len(token.top) < K for token in tokens)
    assert any(len(token.top) == K for token in tokens)
    assert any(i < TWINS and i + TWINS in token.top for token in tokens for i in token.top)


def test_assistant_tokens_are_what_the_assistant_says(teacher: tuple[Any, Any]) -> None:
    tokenizer = teacher[1]
    ids, positions = oracle.assistant_tokens(CONVERSATIONS[3], tokenizer)
    said = tokenizer.decode([ids[p] for p in positions])
    assert said == "Four, as ever. 四<|im_end|>Quite sure.<|im_end|>"
    ids, positions = oracle.assistant_tokens(CONVERSATIONS[7], tokenizer)
    assert [ids[p] for p in positions] == [V - 1]


@pytest.mark.parametrize(
    ("logits", "top_p", "cap", "nucleus"),
    [
        (np.log([0.5, 0.25, 0.125, 0.125]), 0.5, 4, [0]),
        (np.log([0.5, 0.25, 0.125, 0.125]), 0.5 + 1e-9, 4, [0, 1]),
        (np.log([0.125, 0.25, 0.5, 0.125]), 0.8, 4, [2, 1, 0]),
        (np.log([0.125, 0.25, 0.5, 0.125]), 0.8, 2, [2, 1]),
        (np.array([1.0, 1.0, 1.0]), 0.5, 3, [0, 1]),
        (np.array([-np.inf, 3.0, -np.inf]), 1.0, 3, [1]),
        (np.array([0.0, -50.0, -np.inf, -60.0]), 1.0, 4, [0, 1, 3]),
    ],
)
def test_oracle_token_takes_the_smallest_prefix(
    logits: np.ndarray, top_p: float, cap: int, nucleus: list[int]
) -> None:
    assert oracle.oracle_token(logits, top_p, cap).nucleus == nucleus


def test_oracle_token_has_a_log_sum_exp_of_full_precision() -> None:
    x = np.array([1000.0, 1000.0, 0.0, -np.inf])
    assert oracle.oracle_token(x, 1.0, 4).logsumexp == 1000 + np.log(2.0)
    with pytest.raises(ValueError, match="nan"):
        oracle.oracle_token(np.array([0.0, np.nan]), 1.0, 4)


# --------------------------------------------------------------------------------------------------
# A wrong run does not
# --------------------------------------------------------------------------------------------------

Rows = dict[int, tuple[list[Token], list[int], list[int]]]


def change_tokens(rows: Rows, change: Callable[[Token], Token]) -> None:
    for tokens, _, _ in rows.values():
        tokens[:] = [change(token) for token in tokens]


def find(rows: Rows, wanted: Callable[[Token], bool]) -> Token:
    return next(token for row in rows.values() for token in row[0] if wanted(token))


def stored_one_position_late(rows: Rows) -> None:
    tokens = rows[8][0]
    tokens[:] = tokens[1:] + tokens[-1:]


def stored_one_position_early(rows: Rows) -> None:
    tokens = rows[8][0]
    tokens[:] = tokens[:1] + tokens[:-1]


def crossing_token_left_out(rows: Rows) -> None:
    change_tokens(rows, lambda t: replace(t, top=t.top[:-1] if 1 < len(t.top) < K else t.top))


def one_token_too_many(rows: Rows) -> None:
    token = find(rows, lambda t: len(t.top) < K)
    ranked = sorted(range(V), key=lambda i: (-token.x[i], i))
    token.top = ranked[: len(token.top) + 1]
    token.tail = right_tail(token.x, token.top, np.random.default_rng(1))


def cap_counted_one_short(rows: Rows) -> None:
    find(rows, lambda t: len(t.top) == K).top.pop()


def logits_rounded_to_bf16(rows: Rows) -> None:
    def rounded(token: Token) -> Token:
        return replace(token, x=torch.tensor(token.x).bfloat16().float().numpy())

    change_tokens(rows, rounded)


def padding_in_the_log_sum_exp(rows: Rows) -> None:
    change_tokens(
        rows, lambda t: replace(t, logsumexp=float(np.log(np.exp(np.float64(t.padded)).sum())))
    )


def padding_in_the_nucleus(rows: Rows) -> None:
    def with_padding(token: Token) -> Token:
        best = V + int(token.padded[V:].argmax())
        return replace(token, x=token.padded, top=[best, *token.top[:-1]])

    change_tokens(rows, with_padding)


def padding_in_the_tail(rows: Rows) -> None:
    token = rows[3][0][0]
    token.x, token.tail[2] = token.padded, V + 3


def tail_holds_a_nucleus_token(rows: Rows) -> None:
    token = rows[3][0][1]
    token.tail[0] = token.top[0]


def tail_holds_an_id_twice(rows: Rows) -> None:
    token = rows[3][0][2]
    token.tail[4] = token.tail[1]


def tail_is_the_runners_up(rows: Rows) -> None:
    def runners_up(token: Token) -> Token:
        ranked = sorted(range(V), key=lambda i: (-token.x[i], i))
        return replace(token, tail=ranked[len(token.top) : len(token.top) + M])

    change_tokens(rows, runners_up)


def tail_is_sorted(rows: Rows) -> None:
    change_tokens(rows, lambda t: replace(t, tail=sorted(t.tail, key=lambda i: -t.x[i])))


def log_sum_exp_off_by_2e_5(rows: Rows) -> None:
    rows[8][0][4].logsumexp += 2e-5


def log_sum_exp_of_the_nucleus_only(rows: Rows) -> None:
    change_tokens(
        rows, lambda t: replace(t, logsumexp=float(np.log(np.exp(np.float64(t.x[t.top])).sum())))
    )


def exact_ties_by_descending_id(rows: Rows) -> None:
    token = find(rows, lambda t: any(i < TWINS and i + TWINS in t.top for i in t.top))
    low = next(i for i in token.top if i < TWINS and i + TWINS in token.top)
    a, b = token.top.index(low), token.top.index(low + TWINS)
    token.top[a], token.top[b] = token.top[b], token.top[a]


def nucleus_sorted_by_id(rows: Rows) -> None:
    change_tokens(rows, lambda t: replace(t, top=sorted(t.top)))


def nucleus_reversed(rows: Rows) -> None:
    change_tokens(rows, lambda t: replace(t, top=t.top[::-1]))


def conversation_forgotten(rows: Rows) -> None:
    del rows[7]


def conversation_under_a_wrong_index(rows: Rows) -> None:
    rows[3], rows[8] = rows[8], rows[3]


def last_token_forgotten(rows: Rows) -> None:
    rows[3][0].pop()


def positions_of_the_token_before(rows: Rows) -> None:
    rows[8][2][:] = [p - 1 for p in rows[8][2]]


@pytest.mark.parametrize(
    ("mutate", "reason"),
    [
        (stored_one_position_late, "row 8 token 0: logsumexp"),
        (stored_one_position_early, "row 8 token 1: logsumexp"),
        (crossing_token_left_out, "is below top_p"),
        (one_token_too_many, "hold .* already"),
        (cap_counted_one_short, "of 19 is below top_p"),
        (logits_rounded_to_bf16, "nucleus min"),
        (padding_in_the_log_sum_exp, "logsumexp"),
        (padding_in_the_nucleus, "V is 300"),
        (padding_in_the_tail, "tail id 303, V is 300"),
        (tail_holds_a_nucleus_token, "in the nucleus and in the tail"),
        (tail_holds_an_id_twice, "tail holds an id twice"),
        (tail_is_the_runners_up, "not drawn by its law"),
        (tail_is_sorted, "not drawn by its law"),
        (log_sum_exp_off_by_2e_5, "row 8 token 4: logsumexp"),
        (log_sum_exp_of_the_nucleus_only, "logsumexp"),
        (exact_ties_by_descending_id, "the lower id comes first"),
        (nucleus_sorted_by_id, "nats apart"),
        (nucleus_reversed, "nats apart"),
        (conversation_forgotten, "row 7: missing"),
        (conversation_under_a_wrong_index, "row 3: num_tokens"),
        (last_token_forgotten, "num_tokens is 30, the assistant has 31"),
        (positions_of_the_token_before, "token_positions"),
    ],
)
def test_wrong_content_is_rejected(
    check: Any, right_rows: Any, mutate: Callable, reason: str
) -> None:
    rows = copy.deepcopy(right_rows)
    mutate(rows)
    with pytest.raises(oracle.Violation, match=reason):
        check(records_of(rows))


def range_over_all_candidates(records: list[dict[str, Any]], rows: Rows) -> None:
    tokens = rows[3][0]
    candidates = [sorted(map(float, token.x))[-K:] for token in tokens]
    lows = [values[0] for values in candidates]
    q = [
        round((float(token.x[i]) - low) / (max(values) - low) * 65535)
        for token, values, low in zip(tokens, candidates, lows, strict=True)
        for i in token.top
    ]
    records[0].update(top_min=lows, top_logits_quantized=q)


def q_rounded_down(records: list[dict[str, Any]], rows: Rows) -> None:
    q = []
    for token in rows[3][0]:
        values = [float(token.x[i]) for i in token.top]
        span = max(values) - min(values) or 1.0
        q += [int((value - min(values)) / span * 65535) for value in values]
    records[0]["top_logits_quantized"] = q


STEP_12 = 65535 / 4095


def q_of_twelve_bits(records: list[dict[str, Any]], rows: Rows) -> None:
    q = records[0]["sampled_logits_quantized"]
    records[0]["sampled_logits_quantized"] = [round(round(v / STEP_12) * STEP_12) for v in q]


def tail_range_of_another_token(records: list[dict[str, Any]], rows: Rows) -> None:
    lows = records[2]["sampled_min"]
    records[2]["sampled_min"] = lows[1:] + lows[:1]


def high_bits_that_do_not_belong(records: list[dict[str, Any]], rows: Rows) -> None:
    records[0]["top_indices_high"] = bytes([1]) + records[0]["top_indices_high"][1:]


def padding_bits_set(records: list[dict[str, Any]], rows: Rows) -> None:
    record = next(r for r in records if len(r["top_indices_low"]) % 4)
    high = record["top_indices_high"]
    record["top_indices_high"] = high[:-1] + bytes([high[-1] | 0b11000000])


def row_stored_twice(records: list[dict[str, Any]], rows: Rows) -> None:
    records.append(records[1])


def count_moved_to_the_next_token(records: list[dict[str, Any]], rows: Rows) -> None:
    counts = records[0]["top_counts"]
    t = next(t for t in range(len(counts) - 1) if counts[t] > 1 and counts[t + 1] < K)
    counts[t], counts[t + 1] = counts[t] - 1, counts[t + 1] + 1


def a_log_sum_exp_missing(records: list[dict[str, Any]], rows: Rows) -> None:
    records[2]["logsumexp"].pop()


def a_null(records: list[dict[str, Any]], rows: Rows) -> None:
    records[2]["sampled_max"][0] = None


def nan_in_a_range(records: list[dict[str, Any]], rows: Rows) -> None:
    records[2]["top_max"][0] = float("nan")


@pytest.mark.parametrize(
    ("mutate", "reason"),
    [
        (range_over_all_candidates, "nucleus min"),
        (q_rounded_down, "nucleus logit"),
        (q_of_twelve_bits, "tail logit"),
        (tail_range_of_another_token, "tail min"),
        (high_bits_that_do_not_belong, "V is 300"),
        (padding_bits_set, "zero padded"),
        (row_stored_twice, "row 7: stored twice"),
        (count_moved_to_the_next_token, "wrong size"),
        (a_log_sum_exp_missing, "row 8: logsumexp has 147"),
        (a_null, "null in sampled_max"),
        (nan_in_a_range, "nucleus max is nan"),
    ],
)
def test_wrong_storage_is_rejected(
    check: Any, right_rows: Any, mutate: Callable, reason: str
) -> None:
    records = copy.deepcopy(records_of(right_rows))
    mutate(records, right_rows)
    with pytest.raises(oracle.Violation, match=reason):
        check(records)


def swapped(columns: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return [columns[1], columns[0], *columns[2:]]


def retyped(columns: list[tuple[str, Any]], name: str, kind: Any) -> list[tuple[str, Any]]:
    return [(column, kind if column == name else old) for column, old in columns]


@pytest.mark.parametrize(
    "columns",
    [
        swapped(oracle.COLUMNS + oracle.TOKEN_COLUMNS),
        oracle.COLUMNS,
        [*oracle.COLUMNS, *oracle.TOKEN_COLUMNS, ("extra", pa.int32())],
        retyped(oracle.COLUMNS + oracle.TOKEN_COLUMNS, "logsumexp", pa.list_(pa.float32())),
        retyped(oracle.COLUMNS + oracle.TOKEN_COLUMNS, "index", pa.int64()),
        retyped(oracle.COLUMNS + oracle.TOKEN_COLUMNS, "top_indices_high", pa.large_binary()),
    ],
    ids=["order", "missing", "extra", "float32", "int64", "large_binary"],
)
def test_another_schema_is_rejected(check: Any, right_rows: Any, columns: Any) -> None:
    with pytest.raises(oracle.Violation, match="column"):
        check(records_of(right_rows), columns=columns)


def test_the_violation_names_row_and_token(check: Any, right_rows: Any) -> None:
    rows = copy.deepcopy(right_rows)
    rows[8][0][4].logsumexp += 2e-5
    with pytest.raises(oracle.Violation, match="row 8 token 4: logsumexp"):
        check(records_of(rows))


# --------------------------------------------------------------------------------------------------
# Grace is counted and bounded
# --------------------------------------------------------------------------------------------------


def token_check(
    x: list[float], stored: list[int], tolerance: oracle.Tolerance
) -> oracle.TokenCheck:
    values = sorted((x[i] for i in stored), reverse=True)  # what the run itself saw
    q, low, high = quantize(values)
    logsumexp = oracle.oracle_token(np.array(x), 0.9, 4).logsumexp
    token = oracle.StoredToken(stored, q, low, high, [], [], 0.0, 0.0, logsumexp)
    settings = oracle.Settings(top_p=0.9, top_p_max=4, sampled_n=0)
    return oracle.TokenCheck(
        token, np.array(x), settings=settings, tolerance=tolerance, where="row 0 token 0"
    ).run()


def test_a_near_tie_is_counted_between_forwards_and_refused_on_the_same_logits() -> None:
    x = [2.0, 2.0 + 5e-6, -4.0]
    assert token_check(x, [1, 0], oracle.SAME_LOGITS).near_ties == 0
    assert token_check(x, [0, 1], oracle.OTHER_FORWARD).near_ties == 2
    with pytest.raises(oracle.Violation, match="place 0"):
        token_check(x, [0, 1], oracle.SAME_LOGITS)
    with pytest.raises(oracle.Violation, match="place 0"):
        token_check([2.0, 2.0 + 4e-5, -4.0], [0, 1], oracle.OTHER_FORWARD)


def test_a_mass_at_top_p_is_counted_between_forwards() -> None:
    x = [np.log(0.9 - 1e-6), np.log(0.05), np.log(0.05 + 1e-6)]
    assert token_check(x, [0, 2], oracle.SAME_LOGITS).near_boundaries == 0
    assert token_check(x, [0], oracle.OTHER_FORWARD).near_boundaries == 1
    with pytest.raises(oracle.Violation, match="wrong size"):
        token_check(x, [0], oracle.SAME_LOGITS)


def test_an_id_that_lost_its_high_bits_is_rejected() -> None:
    x = np.full(70_000, -30.0)
    x[69_999] = 5.0
    token_check(x.tolist(), [69_999], oracle.SAME_LOGITS)
    with pytest.raises(oracle.Violation, match="place 0 is id 4463, right is 69999"):
        token_check(x.tolist(), [69_999 & 65535], oracle.SAME_LOGITS)


def test_ids_are_unpacked_two_high_bits_each_from_the_lowest() -> None:
    ids = oracle.unpack_ids([5, 65535, 3, 0, 9], bytes([0b10_00_11_01, 0b10]), where="row 0")
    assert ids == [65536 + 5, 262_143, 3, 131_072, 131_072 + 9]


def test_too_many_near_ties_are_refused(teacher: tuple[Any, Any]) -> None:
    check = oracle.RunCheck(*teacher, oracle.Settings())
    check.report.tokens, check.report.near_ties = 500, 7
    check.finish()
    check.report.near_boundaries = 1
    with pytest.raises(oracle.Violation, match="more than noise explains"):
        check.finish()

"""Decoding rows and tokens: the vectorised answers equal a plain loop over the definition."""

from itertools import chain, islice, product
from typing import Any

import numpy as np
import pytest
from small_output import SETTINGS, random_logits, random_rows

import explore_logits as explore
from explore_logits import decode_top_tokens, get_sample, iter_samples, logits_to_probs

ROWS = random_rows(12, settings=SETTINGS | {"vocab_size": 262_144, "top_p_max": 40}, tokens=6)


def loop_decode(row: dict[str, Any], part: str) -> list[tuple[list[int], list[float]]]:
    """Decode a stored row token by token with plain Python, from the written definition."""
    lows, high = row[f"{part}_indices_low"], row[f"{part}_indices_high"]
    ids = iter(low | (high[i // 4] >> (2 * (i % 4)) & 3) << 16 for i, low in enumerate(lows))
    levels, each = iter(row[f"{part}_logits_quantized"]), len(lows) // row["num_tokens"]
    counts = row["top_counts"] if part == "top" else [each] * row["num_tokens"]
    return [
        ([*islice(ids, count)], [q / 65535 * (top - low) + low for q in islice(levels, count)])
        for low, top, count in zip(row[f"{part}_min"], row[f"{part}_max"], counts, strict=True)
    ]


def test_a_whole_row_decodes_as_the_plain_loop_does():
    for sample, row in zip(iter_samples(ROWS), ROWS, strict=True):
        top, tail = loop_decode(row, "top"), loop_decode(row, "sampled")
        assert (sample["index"], sample["num_tokens"]) == (row["index"], row["num_tokens"])
        assert sample["logsumexp"].tolist() == row["logsumexp"]
        assert {part.dtype for part in sample["top_indices"]} == {np.dtype(np.int32)}
        assert {part.dtype for part in sample["top_logits_quantized"]} == {np.dtype(np.uint16)}
        masses = explore.get_nucleus_probability_mass(sample)
        decoders = explore.dequantize_top_logits, explore.dequantize_sampled_logits
        for decode, tokens in zip(decoders, (top, tail), strict=True):
            whole = [list(chain(*parts)) for parts in zip(*tokens, strict=True)]
            for t, wanted in ((None, whole), *enumerate(tokens)):
                ids, logits = decode(sample) if t is None else decode(sample, t)
                assert ids.tolist() == wanted[0]
                np.testing.assert_allclose(logits, wanted[1], rtol=1e-14)
        for t in range(row["num_tokens"]):
            mass = np.exp(np.array(top[t][1]) - row["logsumexp"][t]).sum()
            assert masses[t] == explore.get_nucleus_probability_mass(sample, t)
            assert masses[t] == pytest.approx(mass)
            assert explore.dequantize_all_logits(sample, t)[0].tolist() == top[t][0] + tail[t][0]


def test_probabilities_are_the_teachers_own():
    logits = random_logits(np.random.default_rng(11), 1, 600)[0].astype(np.float64)
    total = np.log(np.exp(logits).sum())
    for probabilities in (logits_to_probs(logits, total), logits_to_probs(logits)):
        np.testing.assert_allclose(probabilities, np.exp(logits - total), rtol=1e-12)
    assert logits_to_probs([1e4, 1e4 - 1]).sum() == pytest.approx(1)
    assert logits_to_probs(np.zeros(0)).size == 0


def test_the_top_tokens_are_the_first_of_the_nucleus():
    sample = get_sample(ROWS, 2)
    predictions = decode_top_tokens(sample, 0, k=3)
    assert [p.id for p in predictions] == sample["top_indices"][0][:3].tolist()
    likeliest = np.exp(sample["top_max"][0] - sample["logsumexp"][0])
    assert predictions[0].probability == pytest.approx(float(likeliest))
    decoders = explore.dequantize_top_logits, explore.dequantize_all_logits, decode_top_tokens
    alone = get_sample(random_rows(1, tokens=1))
    for decode, t in product(decoders, (1, -2)):
        with pytest.raises(explore.RowError, match="1 token,"):
            decode(alone, t)


SIZE = ROWS[3]["num_tokens"]
MORE: dict[str, Any] = {  # one tail token too many in all of its lists
    "sampled_indices_low": [5] * (SIZE + 1), "sampled_logits_quantized": [0] * (SIZE + 1),
    "sampled_indices_high": bytes(-(-(SIZE + 1) // 4)),
}  # fmt: skip
STRUCTURE: list[dict[str, Any]] = [
    {"num_tokens": 2**31 - 1}, {"top_counts": [255] * SIZE}, {"top_indices_low": [1, 2, 3]},
    {"top_indices_high": b""}, {"top_logits_quantized": [0]}, {"top_min": [0.0]}, MORE,
    {"sampled_indices_low": [5]}, {"logsumexp": []}, {"top_counts": None},
    {"logsumexp": [None] * SIZE}, {"index": None}, {"logsumexp": [-99.0] * SIZE},
    *({name: [float("nan")] * SIZE} for name in ("logsumexp", "top_min", "sampled_max")),
]  # fmt: skip


@pytest.mark.parametrize("change", STRUCTURE, ids=lambda change: f"{change!s:.40}")
def test_a_row_whose_lists_do_not_fit_is_refused_by_its_number_in_the_whole(change):
    rows = [*ROWS[:3], *random_rows(150, tokens=1), {**ROWS[3], **change}, *ROWS[4:6]]
    with pytest.raises(explore.FormatError, match="row 153: "):
        list(iter_samples(rows))
    assert get_sample(rows, 2)["index"] == 2

"""Section 3 of `extract_logits.py`: batches of like length, longest first, within the limits."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

import extract_logits as el

LIMIT = st.none() | st.integers(1, 9000)
PADDED = [1000] * 10 + [1] * 10
THRESHOLDS = st.none() | st.dictionaries(st.integers(1, 5000), st.integers(1, 40), min_size=1)


def row(index: int, size: int = 4) -> el.EncodedRow:
    return el.EncodedRow(index, np.arange(size, dtype=np.int32), np.arange(1, size, dtype=np.int32))


@given(st.lists(st.integers(1, 5000), max_size=200), LIMIT, LIMIT, THRESHOLDS)
@example(PADDED, 10**6, None, None)
@example(PADDED, 10**6, None, {1000: 20})  # as the user chose
def test_every_row_is_in_one_batch_longest_first_within_limits(lengths, tokens, size, thresholds):
    """And no batch but the last has room for the next row."""
    sampler = el.TokenBudgetBatchSampler(
        lengths, max_batch_tokens=tokens, max_batch_size=size, thresholds=thresholds
    )
    batches = list(sampler)
    assert len(batches) == len(sampler)
    order = [at for batch in batches for at in batch]
    assert order == sorted(range(len(lengths)), key=lambda at: (-lengths[at], at))

    def exceeds(longest: int, rows: int) -> bool:
        fitting = [n for top, n in sorted((thresholds or {}).items()) if longest <= top]
        return (
            rows > (size or 256)
            or (tokens is not None and rows * longest > tokens)
            or (thresholds is not None and rows > (fitting or [1])[0])
        )

    for batch, following in itertools.zip_longest(batches, batches[1:]):
        longest, wanted = lengths[batch[0]], len(batch) + 1
        assert len(batch) == 1 or not exceeds(longest, len(batch))
        if following and not exceeds(longest, wanted):  # it was closed for its padding
            assert thresholds is None
            assert tokens is not None
            assert wanted * longest > 8192
            together = sum(lengths[at] for at in [*batch, following[0]])
            assert together < 0.985 * wanted * longest


def test_thresholds_may_have_the_string_keys_of_json():
    lengths = [4000, 1025, *[1024] * 4, 513, *[512] * 9]
    for thresholds in ({512: 8, 1024: 4}, {"1024": 4, "512": 8}):
        sampler = el.TokenBudgetBatchSampler(lengths, thresholds=thresholds)  # type: ignore[arg-type]
        assert [len(batch) for batch in sampler] == [1, 1, 4, 4, 6]


def test_options_come_before_the_token_budget_of_the_device():
    for options, size in (
        ({}, 10), ({"max_batch_tokens": 700}, 7), ({"max_batch_size": 3}, 3),
        ({"batch_thresholds": {100: 50}}, 50),
        ({"batch_thresholds": {100: 50}, "max_batch_tokens": 800}, 8),
    ):  # fmt: skip
        config = el.ExtractionConfig(model="m", dataset="d", output="./o", **options)
        rows = [row(number, 100) for number in range(1000)]
        first = next(iter(el.token_budget_batches(config, rows, 1024)))
        assert len(first.rows) == size, options


def test_halves_hold_every_row_once_in_order():
    for count in (2, 3, 8):
        first, second = el.Batch([row(n) for n in range(count)]).halves()
        assert [each.index for each in first.rows + second.rows] == list(range(count))
        assert 0 < len(first.rows) < count

"""Pack and unpack, quantize and dequantize: inverse pairs, for every length and every id."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import explore_logits as explore
from explore_logits import MAX_TOKEN_ID, FormatError, pack_indices, quantize_logits, unpack_indices


def test_every_id_of_the_format_survives_packing():
    ids = np.arange(MAX_TOKEN_ID + 1)
    assert np.array_equal(unpack_indices(*pack_indices(ids)), ids)


@given(st.lists(st.lists(st.integers(0, MAX_TOKEN_ID), max_size=5), max_size=6))
def test_counts_cut_the_ids_into_tokens(tokens):
    flat = [token for part in tokens for token in part]
    low, high = pack_indices(flat)
    assert (low.dtype, len(high)) == (np.uint16, -(-len(flat) // 4))
    parts = unpack_indices(low, high, counts=[len(part) for part in tokens])
    assert [part.tolist() for part in parts] == tokens


def test_an_id_outside_the_format_is_refused_by_name():
    for bad in (MAX_TOKEN_ID + 1, 2**31 - 1, -1):
        with pytest.raises(FormatError, match=str(bad)):
            pack_indices([5, bad])


FLOATS = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 40), elements=FLOATS), st.integers(4, 16))
def test_dequantized_logits_are_within_half_a_step(logits, bits):
    q, vmin, vmax = quantize_logits(logits, bits=bits)
    back = explore.dequantize_logits(q, vmin, vmax)
    half_range = (float(vmax[0]) - float(vmin[0])) / 2
    # One level of the 65,536 grid more, where 2**bits - 1 does not divide 65,535.
    steps = 2**bits - 1
    half_step = half_range / steps + (half_range / 65535 if 65535 % steps else 0.0)
    starts, none = np.array([0, q.size]), np.zeros(0, np.int32)
    entries = explore.Entries(starts, none, q, vmin, vmax, np.zeros(1), bits)
    assert entries.error == pytest.approx(half_step), "what checks and comparisons allow for"
    assert np.abs(back - logits).max() <= half_step + 1e-9 * np.abs(logits).max()
    assert back.min() == logits.min()
    assert back.max() == pytest.approx(float(logits.max()), abs=1e-15 * float(np.ptp(logits)))


def test_equal_logits_quantize_to_zero_and_come_back():
    q, vmin, vmax = quantize_logits([3.5, 3.5, 7.0], counts=[2, 1])
    assert q.tolist() == [0, 0, 0]
    back = explore.dequantize_logits(q, vmin.repeat([2, 1]), vmax.repeat([2, 1]))
    assert back.tolist() == [3.5, 3.5, 7]


def test_a_logit_that_is_not_finite_is_refused():
    for bad in (float("nan"), float("-inf")):
        with pytest.raises(FormatError, match="logit 2 of 3 is"):
            quantize_logits([1.0, 2.0, bad])

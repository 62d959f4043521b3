"""Read, decode, check and picture compressed teacher logits.

    shards (Parquet, local or Hub) ──open──► sample ──decode──► ids, logits, probabilities
                                                └──align with the conversation──► tables, HTML, plots

This file is also the ground floor of the suite: it holds the format (schema, pack, unpack,
quantize, dequantize) and the conversation alignment (which tokens are the assistant's), and
`compute_lengths` and `extract_logits` import both from here. Importing it needs the standard
library, numpy and pyarrow only.

Letters: S sequence length, N extracted tokens, V vocabulary size, K nucleus cap, M tail samples
per token, B sequences in a batch.

    python explore_logits.py OUTPUT --sample 3
    python explore_logits.py OUTPUT --validate
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = [
    "FORMAT_VERSION",
    "MAX_TOKEN_ID",
    "SCHEMA",
    "FormatError",
    "LogitsError",
    "dequantize_logits",
    "pack_indices",
    "quantize_logits",
    "shard_schema",
    "unpack_indices",
]


class LogitsError(Exception):
    """Anything the user can act on: bad input, a bad file, a refused request. Shown as one line."""


class FormatError(LogitsError):
    """A file or an array is not in the shard format; met when reading foreign or damaged shards."""


# --------------------------------------------------------------------------------------------------
# 1 Format
# --------------------------------------------------------------------------------------------------

FORMAT_VERSION = 1
MAX_TOKEN_ID = 2**18 - 1  # 16 bits in *_indices_low, 2 in *_indices_high
METADATA_VERSION = b"logits.format_version"
METADATA_SETTINGS = b"logits.extraction"  # JSON object: the settings of the run

_U16_LIST = pa.list_(pa.uint16())
_F32_LIST = pa.list_(pa.float32())
_I32_LIST = pa.list_(pa.int32())

SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("num_tokens", pa.int32()),
        ("top_indices_low", _U16_LIST),
        ("top_indices_high", pa.binary()),
        ("top_logits_quantized", _U16_LIST),
        ("top_counts", pa.list_(pa.uint8())),
        ("top_min", _F32_LIST),
        ("top_max", _F32_LIST),
        ("sampled_indices_low", _U16_LIST),
        ("sampled_indices_high", pa.binary()),
        ("sampled_logits_quantized", _U16_LIST),
        ("sampled_min", _F32_LIST),
        ("sampled_max", _F32_LIST),
        ("logsumexp", pa.list_(pa.float64())),
    ]
)
TOKEN_FIELDS = (pa.field("input_ids", _I32_LIST), pa.field("token_positions", _I32_LIST))


def shard_schema(
    *, store_tokens: bool = False, settings: Mapping[str, Any] | None = None
) -> pa.Schema:
    """Return the schema of a shard, with the settings of the run in its key-value metadata.

    `store_tokens` appends `input_ids` and `token_positions` (`TOKEN_FIELDS`). `settings` is stored
    as JSON with sorted keys, so equal settings give equal bytes.
    """
    schema = SCHEMA
    if store_tokens:
        for field in TOKEN_FIELDS:
            schema = schema.append(field)
    if settings is None:
        return schema
    return schema.with_metadata(
        {
            METADATA_VERSION: str(FORMAT_VERSION).encode(),
            METADATA_SETTINGS: json.dumps(dict(settings), sort_keys=True).encode(),
        }
    )


def pack_indices(ids: npt.ArrayLike) -> tuple[npt.NDArray[np.uint16], bytes]:
    """Split token ids into their low 16 bits and their packed bits 16-17.

    Args:
        ids: (n,) integers in 0..262,143, any number of tokens flattened.

    Returns:
        `low`, (n,) uint16, and `high`, ceil(n / 4) bytes: four ids a byte, the first in bits 0-1,
        zero padded.

    Raises:
        FormatError: an id is negative or above 262,143; nothing is ever wrapped.
    """
    full = np.asarray(ids).reshape(-1)
    if full.size == 0:
        return np.zeros(0, np.uint16), b""
    if not np.issubdtype(full.dtype, np.integer):
        raise FormatError(f"token ids must be integers, got {full.dtype}")
    if int(full.min()) < 0 or int(full.max()) > MAX_TOKEN_ID:
        bad = int(full.max()) if int(full.max()) > MAX_TOKEN_ID else int(full.min())
        raise FormatError(
            f"token id {bad} does not fit the format, which holds ids 0..{MAX_TOKEN_ID}"
        )
    low = (full & 0xFFFF).astype(np.uint16)
    bits = np.zeros(-(-full.size // 4) * 4, np.uint8)
    bits[: full.size] = full >> 16
    quads = bits.reshape(-1, 4)
    high = quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6
    return low, high.astype(np.uint8).tobytes()


def unpack_indices(low: npt.ArrayLike, high: bytes, counts: npt.ArrayLike | None = None) -> Any:
    """Join packed token ids again: the inverse of `pack_indices`.

    Args:
        low: (n,) low 16 bits.
        high: ceil(n / 4) bytes of bits 16-17.
        counts: ids per token; when given, must sum to n.

    Returns:
        (n,) int32, or with `counts` a list of one int32 array per token.

    Raises:
        FormatError: `high` or `counts` does not match `low`.
    """
    low16 = np.asarray(low, np.uint16).reshape(-1)
    packed = np.frombuffer(high, np.uint8)
    if packed.size != -(-low16.size // 4):
        raise FormatError(
            f"{low16.size} ids need {-(-low16.size // 4)} high bytes, found {packed.size}"
        )
    quads = np.empty((packed.size, 4), np.int32)
    for slot in range(4):
        quads[:, slot] = (packed >> (2 * slot)) & 3
    full = low16.astype(np.int32) | (quads.reshape(-1)[: low16.size] << 16)
    if counts is None:
        return full
    per_token = np.asarray(counts, np.int64).reshape(-1)
    if int(per_token.sum()) != full.size:
        raise FormatError(f"counts sum to {int(per_token.sum())}, but there are {full.size} ids")
    return np.split(full, np.cumsum(per_token)[:-1]) if per_token.size else []


def quantize_logits(
    logits: npt.ArrayLike, counts: npt.ArrayLike | None = None, *, bits: int = 16
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Quantize logits to 16 bits over each token's own range.

    `q = round((x - min) / (max - min) * 65535)`, and 0 where all are equal. With `bits` below 16
    only 2**bits of the 65,536 levels occur (the end points always do), so files compress better.

    Args:
        logits: (n,) finite logits, the tokens flattened.
        counts: logits per token, each at least 1; None: all belong to one token.
        bits: resolution kept, 4..16.

    Returns:
        (n,) uint16, and the per-token minimum and maximum, float32.
    """
    values = np.asarray(logits, np.float32).reshape(-1)
    per_token = np.asarray([values.size] if counts is None else counts, np.int64).reshape(-1)
    if values.size == 0:
        return np.zeros(0, np.uint16), np.zeros(0, np.float32), np.zeros(0, np.float32)
    starts = np.concatenate(([0], np.cumsum(per_token)[:-1]))
    vmin = np.minimum.reduceat(values, starts)
    vmax = np.maximum.reduceat(values, starts)
    low = np.repeat(vmin.astype(np.float64), per_token)
    span = np.repeat(vmax.astype(np.float64) - vmin.astype(np.float64), per_token)
    part = np.divide(values - low, span, out=np.zeros_like(low), where=span > 0)
    levels = 2**bits - 1
    quantized = np.rint(np.rint(part * levels) * (65535 / levels))
    return quantized.astype(np.uint16), vmin, vmax


def dequantize_logits(
    q: npt.ArrayLike, vmin: npt.ArrayLike, vmax: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Undo `quantize_logits`: `q / 65535 * (max - min) + min`, float64, broadcast over arrays."""
    low = np.asarray(vmin, np.float64)
    high = np.asarray(vmax, np.float64)
    return np.asarray(q, np.float64) / 65535 * (high - low) + low


# --------------------------------------------------------------------------------------------------
# 2 Conversation
# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# 3 Open
# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# 4 Decode
# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# 5 Probabilities
# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# 6 Statistics
# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# 7 Align with text
# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# 8 Tables and HTML
# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# 9 Plots
# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# 10 Training
# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# 11 CLI
# --------------------------------------------------------------------------------------------------

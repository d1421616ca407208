"""Public arguments in the core's form. Errors name the field, the value and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from kvpool.config import Retention, Scope

# numpy.typing.NDArray, without its module.
Int32Array = np.ndarray[tuple[Any, ...], np.dtype[np.int32]]
ByteArray = np.ndarray[tuple[Any, ...], np.dtype[np.uint8]]
Tokens = Sequence[int] | Int32Array

_TOKEN_END = 2**31
INT32 = np.dtype(np.int32)  # an array's dtype is compared with it in half the time that the class takes


def token_array(tokens: Tokens, name: str = "tokens") -> Int32Array:
    """Token ids as a one-dimensional int32 array, of any stride; ValueError names what is wrong."""
    if isinstance(tokens, np.ndarray):
        if tokens.dtype != INT32:
            raise ValueError(f"{name}: dtype {tokens.dtype} is not int32: use {name}.astype(numpy.int32)")
        array = tokens
    else:
        try:
            given = list(tokens) if not isinstance(tokens, str | bytes | bytearray) else None
        except TypeError:
            given = None
        if given is None:
            raise ValueError(f"{name}: {tokens!r} is neither a list of ints nor an int32 array")
        if not given:
            return np.empty(0, np.int32)
        try:
            wide = np.array(given)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{name}: not a list of ints: {error}") from None
        if wide.dtype.kind not in "iu" or any(isinstance(token, bool) for token in given):
            raise ValueError(f"{name}: must be ints 0..2**31-1, got {wide.dtype} from {given[:4]!r}...")
        if wide.ndim == 1 and (int(wide.min()) < 0 or int(wide.max()) >= _TOKEN_END):
            bad = next(token for token in given if not 0 <= token < _TOKEN_END)
            raise ValueError(f"{name}: {bad} is not in 0..2**31-1")
        array = wide.astype(np.int32)
    if array.ndim != 1:
        raise ValueError(f"{name}: shape {array.shape} is not one-dimensional")
    return array


def count(value: SupportsIndex, name: str) -> int:
    """A non-negative int; ValueError names the field and its value."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name}: {value!r} is not an int")
    number = value.__index__()
    if not 0 <= number < 2**63:
        raise ValueError(f"{name}: {number} is not in 0..2**63-1")
    return number


def scope_key(scope: Scope | None) -> tuple[bytes, int | None]:
    """The core's key of a scope: equal only for equal ids of equal type."""
    if scope is None:
        return b"(None, None)", None
    if not isinstance(scope, Scope):
        raise ValueError(f"scope: {scope!r} is not a kvpool.Scope")
    return ascii((scope.lora_id, scope.salt)).encode("ascii"), scope.epoch


RetentionSpec = tuple[list[tuple[int, int | None, int, float | None]], int, float | None]


def retention_spec(retention: Retention | None) -> RetentionSpec | None:
    """Retention in the core's form."""
    if retention is None:
        return None
    if not isinstance(retention, Retention):
        raise ValueError(f"retention: {retention!r} is not a kvpool.Retention")
    ranges = [(r.start, r.end, r.priority, r.duration_s) for r in retention.ranges]
    return ranges, retention.decode_priority, retention.decode_duration_s

"""What the engine tells kvpool: pools, sizes, scopes, retention. Plain values, checked at construction.

Plain dataclasses rather than a validation library: the core depends on numpy alone.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from kvpool.errors import ConfigError

_T = TypeVar("_T")

# Bytes of one element for dtypes that numpy does not know.
_ITEMSIZE = {
    "bfloat16": 2,
    "float8_e4m3": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "fp8": 1,
    "bf16": 2,
    "fp16": 2,
    "fp32": 4,
}

_RESERVATIONS = ("none", "aligned", "sliding")


def _int(name: str, value: object, low: int, high: int = 2**63 - 1) -> int:
    """`value` as int within [low, high]; ConfigError names the field."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ConfigError(f"{name}: {value!r} is not an int; give an int >= {low}")
    number: int = value.__index__()
    if not low <= number <= high:
        raise ConfigError(f"{name}: {number} is out of range; give an int from {low} to {high}")
    return number


def _opt_int(name: str, value: object, low: int, high: int = 2**63 - 1) -> int | None:
    return None if value is None else _int(name, value, low, high)


def _seq(name: str, value: object, kind: type[_T]) -> tuple[_T, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise ConfigError(f"{name}: {value!r} is not a sequence; give a list of {kind.__name__}")
    items = tuple(value)
    for item in items:
        if not isinstance(item, kind):
            raise ConfigError(f"{name}: {item!r} is not a {kind.__name__}; give only those")
    return items


def _itemsize(dtype: object) -> int:
    """Bytes of one element of a numpy or torch dtype, or of its name."""
    if isinstance(dtype, str):
        known = _ITEMSIZE.get(dtype)
        if known is not None:
            return known
    else:
        size = getattr(dtype, "itemsize", None)
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            return size
    try:
        size = 0 if dtype is None else np.dtype(dtype).itemsize  # type: ignore[call-overload]  # None is float64 to NumPy
    except TypeError:
        size = 0
    if not isinstance(size, int) or size <= 0:
        raise ConfigError(f"dtype: {dtype!r} is unknown; give a numpy or torch dtype, or a name such as 'bfloat16'")
    return size


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """Layers that share a page size and a retention rule.

    page_bytes: bytes of one block over all layers of the pool. window: tokens of the attention window,
    None is full attention. sink_tokens: leading tokens that never leave the window.
    """

    name: str
    page_bytes: int
    window: int | None = None
    sink_tokens: int = 0
    shape: tuple[int, int, int, int, int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"name: {self.name!r} is not a name; give a non-empty str")
        _int("page_bytes", self.page_bytes, 1)
        _opt_int("window", self.window, 1)
        _int("sink_tokens", self.sink_tokens, 0)
        if self.sink_tokens and self.window is None:
            raise ConfigError(f"sink_tokens: {self.sink_tokens} without a window; set window or sink_tokens=0")

    @classmethod
    def attention(
        cls,
        name: str,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: Any,
        tokens_per_block: int,
        window: int | None = None,
        sink_tokens: int = 0,
    ) -> PoolConfig:
        """Pool of attention layers; a page has `.shape` (layer, 2, token, kv_head, head_dim)."""
        shape = (
            _int("layers", layers, 1),
            2,
            _int("tokens_per_block", tokens_per_block, 1),
            _int("kv_heads", kv_heads, 1),
            _int("head_dim", head_dim, 1),
        )
        return cls(name, math.prod(shape) * _itemsize(dtype), window, sink_tokens, shape=shape)


@dataclass(frozen=True, slots=True)
class KVCacheDesc:
    """One request of a plan: tokens with storage, and tokens before the next input."""

    capacity: int
    history_length: int

    def __post_init__(self) -> None:
        _int("capacity", self.capacity, 0)
        _int("history_length", self.history_length, 0)
        if self.history_length > self.capacity:
            raise ConfigError(f"history_length: {self.history_length} exceeds capacity = {self.capacity}; lower it")


@dataclass(frozen=True, slots=True)
class BatchDesc:
    """Requests that must be able to run at the same time, with a shared system prompt (tokens)."""

    requests: tuple[KVCacheDesc, ...]
    system_prompt_length: int = 0

    def __init__(self, requests: Iterable[KVCacheDesc], system_prompt_length: int = 0) -> None:
        object.__setattr__(self, "requests", _seq("requests", requests, KVCacheDesc))
        object.__setattr__(self, "system_prompt_length", _int("system_prompt_length", system_prompt_length, 0))


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Everything the manager is built from. Sizes in bytes and tokens; floors are `plan_pools`' business."""

    tokens_per_block: int
    pools: Sequence[PoolConfig]
    device_bytes: int
    host_bytes: int = 0
    max_batch_size: int = 1
    max_seq_len: int | None = None
    max_num_tokens: int | None = None
    draft_tokens: int = 0
    constraints: Sequence[BatchDesc] = ()
    typical_step: BatchDesc | None = None
    decode_reservation: str = "sliding"
    partial_reuse: bool = True
    offload_min_priority: int = 30
    max_blocks: int | None = None
    hash_seed: int | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        _int("tokens_per_block", self.tokens_per_block, 1, 2**20)
        object.__setattr__(self, "pools", _seq("pools", self.pools, PoolConfig))
        object.__setattr__(self, "constraints", _seq("constraints", self.constraints, BatchDesc))
        if not self.pools:
            raise ConfigError("pools: () is empty; give at least one PoolConfig")
        names = [pool.name for pool in self.pools]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"pools: name {name!r} occurs {names.count(name)} times; names must differ")
        for pool in self.pools:
            if pool.shape is not None and pool.shape[2] != self.tokens_per_block:
                raise ConfigError(
                    f"tokens_per_block: {self.tokens_per_block}, but pool {pool.name!r} was made for "
                    f"{pool.shape[2]}; use one value for both"
                )
        _int("device_bytes", self.device_bytes, 1)
        _int("host_bytes", self.host_bytes, 0)
        _int("max_batch_size", self.max_batch_size, 1)
        _opt_int("max_seq_len", self.max_seq_len, 1, 2**31 - 1)
        _opt_int("max_num_tokens", self.max_num_tokens, 1)
        _int("draft_tokens", self.draft_tokens, 0)
        if self.typical_step is not None and not isinstance(self.typical_step, BatchDesc):
            raise ConfigError(
                f"typical_step: {self.typical_step!r} is not a BatchDesc; use BatchDesc([KVCacheDesc(...)])"
            )
        if self.decode_reservation not in _RESERVATIONS:
            raise ConfigError(f"decode_reservation: {self.decode_reservation!r} is none of {', '.join(_RESERVATIONS)}")
        if not isinstance(self.partial_reuse, bool):
            raise ConfigError(f"partial_reuse: {self.partial_reuse!r} is not a bool; use True or False")
        _int("offload_min_priority", self.offload_min_priority, 0, 100)
        _opt_int("max_blocks", self.max_blocks, 1, 2**31 - 2)
        _opt_int("hash_seed", self.hash_seed, 0, 2**64 - 1)
        if not callable(self.clock):
            raise ConfigError(f"clock: {self.clock!r} is not callable; give a function that returns seconds")


@dataclass(frozen=True, slots=True)
class Scope:
    """Identity under which reuse is allowed. Types count: 1, "1" and b"1" are three salts."""

    lora_id: int | str | None = None
    salt: int | str | bytes | None = None
    epoch: int | None = None

    def __post_init__(self) -> None:
        for name, value, kinds in (("lora_id", self.lora_id, (int, str)), ("salt", self.salt, (int, str, bytes))):
            if value is not None and (isinstance(value, bool) or type(value) not in kinds):
                raise ConfigError(f"{name}: {value!r} is none of {', '.join(k.__name__ for k in kinds)}, None")
        _opt_int("epoch", self.epoch, 0)


def _seconds(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{name}: {value!r} is not a positive number of seconds; use None for ever")


def _duration(name: str, value: object) -> None:
    if value is not None:
        _seconds(name, value)


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Prompt tokens [start, end) with a priority 0..100 (lower goes first) and an optional duration in seconds.

    The clock starts with every release of a block's last claim. When the duration is over the priority falls to 35 if
    it is above, and the expiry counts as the block's last use. None: for ever.
    """

    start: int
    end: int | None
    priority: int
    duration_s: float | None = None

    def __post_init__(self) -> None:
        start = _int("start", self.start, 0)
        if self.end is not None and _int("end", self.end, 0) <= start:
            raise ConfigError(f"end: {self.end} is not above start = {start}; use end=None for an open range")
        _int("priority", self.priority, 0, 100)
        _duration("duration_s", self.duration_s)


@dataclass(frozen=True, slots=True)
class Retention:
    """Priorities of one request's blocks: by prompt range, and for decoded tokens.

    The range with a block's first token decides. A block that others made gets the maximum of each value; a request
    without retention changes none.

    The first request of a manager that gives a duration makes the tables for them (24 bytes per block of `max_blocks`,
    8 more per windowed pool): MemoryError, and nothing has changed, if they cannot be had.
    """

    ranges: Sequence[TokenRange] = ()
    decode_priority: int = 35
    decode_duration_s: float | None = None

    def __post_init__(self) -> None:
        ranges = _seq("ranges", self.ranges, TokenRange)
        object.__setattr__(self, "ranges", ranges)
        ordered = sorted(ranges, key=lambda r: r.start)
        for before, after in itertools.pairwise(ordered):
            if before.end is None or before.end > after.start:
                raise ConfigError(
                    f"ranges: [{before.start}, {before.end}) overlaps [{after.start}, {after.end}); make them disjoint"
                )
        _int("decode_priority", self.decode_priority, 0, 100)
        _duration("decode_duration_s", self.decode_duration_s)

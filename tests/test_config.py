"""Values of kvpool.config: what is accepted, and that each refusal names its field."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvpool.config import BatchDesc, CacheConfig, KVCacheDesc, PoolConfig, Retention, Scope, TokenRange
from kvpool.errors import (
    ConfigError,
    InvariantError,
    KVPoolError,
    LogicError,
    RequestTooLargeError,
    StalledError,
)

POOL = PoolConfig("full", 4096)


def cache_config(**changes: Any) -> CacheConfig:
    base: dict[str, Any] = {"tokens_per_block": 16, "pools": [POOL], "device_bytes": 1 << 20}
    return CacheConfig(**{**base, **changes})


def attention(**changes: Any) -> PoolConfig:
    base: dict[str, Any] = {"layers": 3, "kv_heads": 4, "head_dim": 64, "dtype": "float16", "tokens_per_block": 16}
    return PoolConfig.attention("a", **{**base, **changes})


def test_errors_form_one_tree() -> None:
    for kind in (ConfigError, LogicError, InvariantError, StalledError, RequestTooLargeError):
        assert issubclass(kind, KVPoolError)
        assert kind.__doc__
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("tokens_per_block", v) for v in (0, -1, 1.5, True, "16", None)],
        *[("device_bytes", v) for v in (0, -1, 1.0, False, None)],
        *[("host_bytes", v) for v in (-1, 0.5, True, None)],
        *[("max_batch_size", v) for v in (0, -3, True, None)],
        *[("max_seq_len", v) for v in (0, -1, 2.0, True)],
        *[("max_num_tokens", v) for v in (0, -1, "8", True)],
        *[("draft_tokens", v) for v in (-1, 1.0, True, None)],
        *[("pools", v) for v in ((), 5, "full", [4096], [POOL, POOL])],
        *[("constraints", v) for v in ([KVCacheDesc(1, 0)], KVCacheDesc(1, 0), 3)],
        *[("typical_step", v) for v in list[object]([KVCacheDesc(1, 0), 3, []])],
        *[("decode_reservation", v) for v in ("", "Sliding", None, 1)],
        *[("partial_reuse", v) for v in (1, None, "yes")],
        *[("offload_min_priority", v) for v in (-1, 101, 3.5, True, None)],
        *[("max_blocks", v) for v in (0, -1, 1.0, True)],
        *[("hash_seed", v) for v in (-1, 1 << 64, 1.0, True)],
        ("clock", 3.0),
    ],
)
def test_cache_config_refusal_names_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        cache_config(**{field: value})


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("name", lambda: PoolConfig("", 1)),
        ("name", lambda: PoolConfig(3, 1)),  # type: ignore[arg-type]
        ("page_bytes", lambda: PoolConfig("p", 0)),
        ("page_bytes", lambda: PoolConfig("p", True)),
        ("window", lambda: PoolConfig("p", 1, window=0)),
        ("sink_tokens", lambda: PoolConfig("p", 1, window=8, sink_tokens=-1)),
        ("sink_tokens", lambda: PoolConfig("p", 1, sink_tokens=4)),
        ("layers", lambda: attention(layers=0)),
        ("kv_heads", lambda: attention(kv_heads=0)),
        ("head_dim", lambda: attention(head_dim=1.0)),
        ("tokens_per_block", lambda: attention(tokens_per_block=0)),
        ("dtype", lambda: attention(dtype="float12")),
        ("dtype", lambda: attention(dtype="int4")),
        ("dtype", lambda: attention(dtype=None)),
        ("capacity", lambda: KVCacheDesc(-1, 0)),
        ("history_length", lambda: KVCacheDesc(4, -1)),
        ("history_length", lambda: KVCacheDesc(4, 5)),
        ("requests", lambda: BatchDesc([3])),  # type: ignore[list-item]
        ("system_prompt_length", lambda: BatchDesc([], -1)),
        ("lora_id", lambda: Scope(lora_id=True)),
        ("salt", lambda: Scope(salt=1.5)),  # type: ignore[arg-type]
        ("epoch", lambda: Scope(epoch=-1)),
        ("start", lambda: TokenRange(-1, 4, 35)),
        ("end", lambda: TokenRange(4, 4, 35)),
        ("priority", lambda: TokenRange(0, 4, 101)),
        ("priority", lambda: TokenRange(0, 4, -1)),
        ("duration_s", lambda: TokenRange(0, 4, 35, 0)),
        ("duration_s", lambda: TokenRange(0, 4, 35, float("nan"))),
        ("ranges", lambda: Retention([TokenRange(0, 5, 1), TokenRange(4, 6, 1)])),  # type: ignore[arg-type]
        ("ranges", lambda: Retention([TokenRange(9, 12, 1), TokenRange(0, None, 1)])),  # type: ignore[arg-type]
        ("decode_priority", lambda: Retention(decode_priority=101)),
        ("decode_duration_s", lambda: Retention(decode_duration_s=-1.0)),
    ],
)
def test_refusal_names_field(field: str, make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        make()


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("bfloat16", 2), ("float16", 2), ("float8_e4m3", 1), ("int8", 1), (np.float32, 4), (np.dtype("int8"), 1)],
)
def test_attention_page(dtype: object, size: int) -> None:
    pool = attention(dtype=dtype, window=128, sink_tokens=4)
    assert pool.shape == (3, 2, 16, 4, 64)
    assert pool.page_bytes == 3 * 2 * 16 * 4 * 64 * size
    assert (pool.window, pool.sink_tokens) == (128, 4)


def test_attention_of_another_block_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokens_per_block"):
        cache_config(pools=[attention(tokens_per_block=32)])


def test_sequences_become_tuples_and_values_are_frozen() -> None:
    batch = BatchDesc([KVCacheDesc(2, 1)])
    config = cache_config(constraints=[batch], hash_seed=(1 << 64) - 1, offload_min_priority=100)
    assert config.pools == (POOL,)
    assert config.constraints == (batch,)
    assert batch.requests == (KVCacheDesc(2, 1),)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.device_bytes = 1  # type: ignore[misc]


def test_adjacent_ranges_in_any_order_are_disjoint() -> None:
    ranges = (TokenRange(4, None, 90), TokenRange(0, 4, 10))
    assert Retention(list(ranges)).ranges == ranges  # type: ignore[arg-type]

"""The pages of a pool as a torch tensor."""

from __future__ import annotations

import math

import torch

from kvpool.errors import ConfigError
from kvpool.manager import KVCacheManager


def page_tensor(manager: KVCacheManager, pool: str, dtype: torch.dtype, tier: str = "device") -> torch.Tensor:
    """Pages of `pool` over the same memory, no copy: (slot, layer, 2, token, kv_head, head_dim); [:, :, 0] are keys.

    The pool comes from `PoolConfig.attention`, with this dtype. ConfigError: it does not, or pages have other bytes.
    """
    config = next((one for one in manager.config.pools if one.name == pool), None)
    if config is None:
        raise ConfigError(f"pool: {pool!r} is unknown; there are {[one.name for one in manager.config.pools]}")
    if config.shape is None:
        raise ConfigError(f"pool: {pool!r} has no shape; make it with PoolConfig.attention")
    wanted = math.prod(config.shape) * dtype.itemsize
    if wanted != config.page_bytes:
        raise ConfigError(
            f"dtype: a page of {dtype} and shape {config.shape} has {wanted} bytes, one of pool {pool!r} has "
            f"{config.page_bytes}; use the dtype of the pool"
        )
    pages = torch.from_dlpack(manager.pages(pool, tier))
    return pages.view(dtype).view(-1, *config.shape)

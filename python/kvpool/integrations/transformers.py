"""Models of the transformers package on kvpool's pages, through that package's own `Cache` interface.

`pools_of(model, ...)` are the pools that a model needs, `PagedCache` is what its `generate` and `forward` take as
`cache`.
Full-attention and sliding-window layers, one sequence to a cache, any number of caches to a manager.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from kvpool.integrations.extras import need

need("torch", "transformers")
need("transformers", "transformers")

import torch  # noqa: E402
from transformers import cache_utils  # noqa: E402

from kvpool.arguments import Tokens  # noqa: E402
from kvpool.cache import CacheState  # noqa: E402
from kvpool.config import PoolConfig, Retention, Scope  # noqa: E402
from kvpool.errors import ConfigError, LogicError  # noqa: E402
from kvpool.integrations.torch.pages import page_tensor  # noqa: E402
from kvpool.manager import KVCacheManager  # noqa: E402

__all__ = ["PagedCache", "pools_of"]


def _windows(model: Any) -> list[int | None]:
    """Of each layer its window, None for full attention; ConfigError for a layer of another kind."""
    windows: list[int | None] = []
    for i, layer in enumerate(cache_utils.DynamicCache(config=model.config).layers):
        if type(layer) is cache_utils.DynamicSlidingWindowLayer:
            windows.append(int(layer.sliding_window))
        elif type(layer) is cache_utils.DynamicLayer:
            windows.append(None)
        else:
            raise ConfigError(f"model: layer {i} wants a {type(layer).__name__}; only attention, full or in a window")
    return windows


def _pool_name(window: int | None) -> str:
    return "full" if window is None else f"window {window}"


def pools_of(model: Any, tokens_per_block: int) -> list[PoolConfig]:
    """One pool for the full-attention layers of a model, and one for each window.

    ConfigError: it has layers that are neither.
    """
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    windows = _windows(model)
    return [
        PoolConfig.attention(
            _pool_name(window),
            layers=windows.count(window),
            kv_heads=heads,
            head_dim=head_dim,
            dtype=model.dtype,
            tokens_per_block=tokens_per_block,
            window=window,
        )
        for window in dict.fromkeys(windows)
    ]


class _PagedLayer(cache_utils.CacheLayerMixin):  # type: ignore[misc]
    """One layer; asks its `PagedCache` for everything."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, owner: PagedCache, place: int, window: int | None) -> None:
        super().__init__()
        self.owner, self.place, self.window = owner, place, window
        self.is_sliding = window is not None
        self.is_initialized = True
        self.length = 0  # tokens whose keys and values are written

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the pages are there."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Write (1, kv_head, query, head_dim) and return all that the queries may see, in the same form."""
        return self.owner._update(self, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that `update` will return, and the position of the first."""
        first = self._first()
        return self.length + query_length - first, first

    def _first(self) -> int:
        return 0 if self.window is None else max(0, self.length + 1 - self.window)

    def get_seq_length(self) -> int:
        """Tokens written."""
        return self.length

    def get_max_length(self) -> int:
        """The window, or -1."""
        return -1 if self.window is None else self.window

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(
            "PagedCache: one sequence, forward only; beam search, several returned sequences and assisted decoding, "
            "which reorder, repeat or crop a cache, are not supported"
        )

    reset = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse


class PagedCache(cache_utils.Cache):  # type: ignore[misc]
    """The cache of one sequence, to be given as `cache` to a model's `generate` or `forward`.

    tokens: the prompt, (n) or (1, n); what is cached of it is claimed here, and that many tokens the cache has at once.
    Prompt tokens are committed as they are computed, generated ones by `commit`. A context manager that closes.

    ConfigError: the manager's pools are not `pools_of(model, ...)`. MemoryError: no room, here or, during a forward
    pass, for its tokens. ValueError: a batch of several sequences.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        model: Any,
        request_id: int | str,
        tokens: torch.Tensor | Tokens,
        *,
        scope: Scope | None = None,
        retention: Retention | None = None,
    ) -> None:
        windows = _windows(model)
        pools = {pool.name: pool for pool in manager.config.pools}
        for pool in pools_of(model, manager.config.tokens_per_block):
            if pools.get(pool.name) != pool:
                raise ConfigError(f"manager: pool {pool.name!r} is not as the model needs it; make it with pools_of")
        super().__init__(layers=[_PagedLayer(self, windows[:i].count(w), w) for i, w in enumerate(windows)])
        self.manager = manager
        self._pages = {w: page_tensor(manager, _pool_name(w), model.dtype) for w in dict.fromkeys(windows)}
        self._tables: dict[int | None, torch.Tensor] = {}
        self._prompt = _one_sequence(tokens)
        self._final = self._prompt  # begins with all that is committed
        self._running = False  # between step_begin and step_end
        self._cache = manager.create(request_id, self._prompt, scope=scope, retention=retention)
        try:
            if not self._cache.resume():
                raise MemoryError(f"request {request_id!r}: no room for the pages of its prefix")
        except BaseException:
            self._cache.close()
            raise
        for layer in self.layers:
            layer.length = self._cache.history_length

    @property
    def num_reused_tokens(self) -> int:
        """Prompt tokens that were found."""
        return self._cache.num_reused_tokens

    def commit(self, tokens: torch.Tensor | Tokens) -> None:
        """Prompt and generated tokens, (n) or (1, n), as `generate` returns them: those that are written are final.

        LogicError: they do not begin with the prompt, or with what was committed before.
        """
        sequence = _one_sequence(tokens)
        known = self._cache.num_committed_tokens
        if sequence[: len(self._prompt)] != self._prompt[: len(sequence)]:
            raise LogicError("commit: the sequence does not begin with the prompt of this cache")
        if sequence[:known] != self._final[:known][: len(sequence)]:
            raise LogicError(f"commit: the sequence does not begin with the {known} tokens that were committed before")
        self._cache.commit(sequence[known : self.layers[-1].length])
        self._final = max(self._final, sequence, key=len)

    def close(self) -> None:
        """Give everything back; full committed blocks stay cached. Twice is a no-op."""
        if self._running:  # a forward pass was broken off
            self._running = False
            self.manager.step_end([self._cache])
        self._cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, num_tokens: int) -> None:
        """Room for a forward pass over so many tokens."""
        if self._cache.state is not CacheState.ACTIVE:
            raise LogicError(f"request {self._cache.request_id!r}: its cache is {self._cache.state.value}")
        start = self.layers[0].length
        if not self._cache.resize(start + num_tokens, start):
            raise MemoryError(
                f"request {self._cache.request_id!r}: no room for {num_tokens} tokens behind {start}; close other "
                "caches, give the manager more device_bytes, or, where its windowed pools are too small for so many "
                f"tokens at once, max_num_tokens={num_tokens}"
            )
        self._tables = {w: torch.from_numpy(self._cache.block_table(_pool_name(w))).long() for w in self._pages}
        self.manager.step_begin([self._cache])
        self._running = True

    def _end(self) -> None:
        """The last layer has read its pages."""
        self._running = False
        self.manager.step_end([self._cache])
        known = self._cache.num_committed_tokens
        self._cache.commit(self._prompt[known : self.layers[-1].length])

    def _update(self, layer: _PagedLayer, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if k.shape[0] != 1:
            raise ValueError(f"a batch of {k.shape[0]} sequences; a PagedCache holds one")
        if layer is self.layers[0]:
            self._begin(k.shape[2])
        pages, table = self._pages[layer.window][:, layer.place], self._tables[layer.window]
        t = pages.shape[2]
        first, start, end = layer._first(), layer.length, layer.length + k.shape[2]
        new, seen = torch.arange(start, end), torch.arange(first, end)
        for i, states in enumerate((k, v)):
            pages[table[new // t], i, new % t] = states[0].transpose(0, 1)
        keys, values = (pages[table[seen // t], i, seen % t].transpose(0, 1)[None] for i in (0, 1))
        layer.length = end
        if layer is self.layers[-1]:
            self._end()
        return keys, values


def _one_sequence(tokens: torch.Tensor | Tokens) -> list[int]:
    array = torch.as_tensor(tokens)
    if array.ndim == 2 and len(array) == 1:
        array = array[0]
    if array.ndim != 1:
        raise ValueError(f"tokens: shape {tuple(array.shape)} is not one sequence, (n) or (1, n)")
    return [int(token) for token in array]

"""A decoder transformer with seeded random weights: RMS norm, rotary positions, grouped-query attention, gated MLP.

How a layer attends is the caller's business: `forward` asks for each layer's attention, so that the same weights run
with pages and without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kvpool.config import PoolConfig
from kvpool.integrations.torch.attention import plain_attention

Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q (token, head, dim), k and v (token, kv_head, dim)) -> (token, head, dim)"""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """In which pool a layer keeps its keys and values, and how far it sees."""

    pool: str = "full"
    window: int | None = None
    sink_tokens: int = 0


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes. Layers that share a pool share its window and sinks."""

    layers: tuple[DecoderLayer, ...] = (DecoderLayer(),) * 4
    vocab_size: int = 512
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 704
    dtype: torch.dtype = torch.float32
    rope_theta: float = 10_000.0

    def pools(self, tokens_per_block: int) -> list[PoolConfig]:
        """One pool for each name in `layers`, in the order in which they occur."""
        pools = {layer.pool: layer for layer in self.layers}
        return [
            PoolConfig.attention(
                name,
                layers=len(self.layers_of(name)),
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                dtype=self.dtype,
                tokens_per_block=tokens_per_block,
                window=layer.window,
                sink_tokens=layer.sink_tokens,
            )
            for name, layer in pools.items()
        ]

    def layers_of(self, pool: str) -> list[int]:
        """Layers of a pool; their order is that of the pages."""
        return [i for i, layer in enumerate(self.layers) if layer.pool == pool]


@dataclass(frozen=True, slots=True)
class Adapter:
    """Low-rank deltas of the q, k and v projections: per layer (hidden, rank) and (rank, q + 2 kv)."""

    down: Sequence[torch.Tensor]
    up: Sequence[torch.Tensor]


@dataclass(slots=True)
class Decoder:
    """The model. seed: of the weights."""

    config: DecoderConfig
    seed: int = 0
    weights: dict[str, list[torch.Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        c = self.config
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        shapes = {
            "qkv": (c.hidden, q + 2 * kv),
            "out": (q, c.hidden),
            "gate": (c.hidden, c.mlp),
            "up": (c.hidden, c.mlp),
            "down": (c.mlp, c.hidden),
        }
        random = torch.Generator().manual_seed(self.seed)

        def normal(rows: int, columns: int) -> torch.Tensor:
            drawn = torch.randn(rows, columns, generator=random, dtype=torch.float64) / rows**0.5
            return drawn.to(c.dtype)

        self.weights = {name: [normal(*shape) for _ in c.layers] for name, shape in shapes.items()}
        self.weights["embed"] = [normal(c.vocab_size, c.hidden) * c.vocab_size**0.5]
        self.weights["head"] = [normal(c.hidden, c.vocab_size)]

    def adapter(self, seed: int, rank: int = 4) -> Adapter:
        """A seeded random adapter, about as strong as the weights that it changes."""
        c = self.config
        random = torch.Generator().manual_seed(seed)
        wide = (c.heads + 2 * c.kv_heads) * c.head_dim

        def normal(rows: int, columns: int) -> list[torch.Tensor]:
            drawn = [torch.randn(rows, columns, generator=random, dtype=torch.float64) for _ in c.layers]
            return [one.to(c.dtype) / rows**0.5 for one in drawn]

        return Adapter(normal(c.hidden, rank), normal(rank, wide))

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attention: Attention,
        adapters: Iterable[tuple[slice, Adapter]] = (),
        extra: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Final hidden states (token, hidden) of tokens at positions, both (token).

        adapters: which tokens use one. extra: added to the embeddings, what token ids do not tell.
        """
        c = self.config
        q_width, kv_width = c.heads * c.head_dim, c.kv_heads * c.head_dim
        x = self.weights["embed"][0][tokens]
        if extra is not None:
            x = x + extra
        angles = _angles(positions, c)
        for i in range(len(c.layers)):
            h = _norm(x)
            qkv = h @ self.weights["qkv"][i]
            for part, adapter in adapters:
                qkv[part] += (h[part] @ adapter.down[i]) @ adapter.up[i]
            q, k, v = (part.unflatten(-1, (-1, c.head_dim)) for part in qkv.split([q_width, kv_width, kv_width], -1))
            x = x + attention(i, _rotate(q, angles), _rotate(k, angles), v).flatten(1) @ self.weights["out"][i]
            h = _norm(x)
            gated = torch.nn.functional.silu(h @ self.weights["gate"][i]) * (h @ self.weights["up"][i])
            x = x + gated @ self.weights["down"][i]
        return _norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(token, vocab_size) of final hidden states."""
        return hidden @ self.weights["head"][0]

    def plain(
        self, tokens: Sequence[int], adapter: Adapter | None = None, extra: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (token, vocab_size) of one whole sequence, computed from scratch: no pages, no cache."""

        def attention(i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            layer = self.config.layers[i]
            return plain_attention(q, k, v, layer.window, layer.sink_tokens)

        adapters: Mapping[int, Adapter] = {} if adapter is None else {0: adapter}
        parts = [(slice(None), one) for one in adapters.values()]
        return self.logits(self.forward(torch.tensor(tokens), torch.arange(len(tokens)), attention, parts, extra))


def _norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def _angles(positions: torch.Tensor, c: DecoderConfig) -> torch.Tensor:
    """(token, 1, head_dim / 2), of rotary positions (Su et al., arXiv 2104.09864)."""
    rates = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    return (positions[:, None].double() * rates).to(c.dtype)[:, None]


def _rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    one, other = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


def greedy(
    model: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    adapter: Adapter | None = None,
    extra: torch.Tensor | None = None,
) -> list[int]:
    """The most likely continuation, each token computed from the whole sequence again."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        tokens.append(int(model.plain(tokens, adapter, extra)[-1].argmax()))
    return tokens[len(prompt) :]

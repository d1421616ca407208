"""Attention of a ragged batch over pages, and the same without pages.

The tokens of all requests of a step lie one after the other. Of request r they are `lengths[r]` tokens at positions
starts[r] .. starts[r] + lengths[r] - 1, and everything before them is in the pages:

    position   0 ........... starts[r] ........ starts[r] + lengths[r] ...... capacity
               written before | written by this step |      not written yet
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Rows:
    """The shape of a ragged batch: first position and number of tokens of each request."""

    starts: Sequence[int]
    lengths: Sequence[int]
    row: torch.Tensor = field(init=False)  # of each token: its request
    column: torch.Tensor = field(init=False)  # of each token: which one of its request
    positions: torch.Tensor = field(init=False)  # of each token
    ends: torch.Tensor = field(init=False)  # of each request: tokens that attention may see

    def __post_init__(self) -> None:
        starts, lengths = torch.tensor(self.starts), torch.tensor(self.lengths)
        self.row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        first = torch.cumsum(lengths, 0) - lengths
        self.column = torch.arange(int(lengths.sum())) - first[self.row]
        self.positions = starts[self.row] + self.column
        self.ends = starts + lengths


def visible(queries: torch.Tensor, keys: torch.Tensor, window: int | None, sink_tokens: int) -> torch.Tensor:
    """Whether positions `queries` attend to positions `keys` (broadcast): causal, and within the window or a sink."""
    seen = keys <= queries
    if window is not None:
        seen &= (queries - keys < window) | (keys < sink_tokens)
    return seen


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """q (row, query, head, dim), k and v (row, key, kv_head, dim), seen (row, query, key) -> as q."""
    rows, queries, heads, dim = q.shape
    grouped = q.view(rows, queries, k.shape[2], -1, dim)
    scores = torch.einsum("rqgmd,rkgd->rgmqk", grouped, k) / dim**0.5
    scores = scores.masked_fill(~seen[:, None, None], torch.finfo(q.dtype).min)
    out = torch.einsum("rgmqk,rkgd->rqgmd", torch.softmax(scores, -1), v)
    return out.reshape(rows, queries, heads, dim)


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None, sink_tokens: int = 0
) -> torch.Tensor:
    """One whole sequence from position 0, without pages: q (token, head, dim), k and v (token, kv_head, dim)."""
    at = torch.arange(len(q))
    seen = visible(at[:, None], at[None, :], window, sink_tokens)
    return _attend(q[None], k[None], v[None], seen[None])[0]


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor,
    tables: torch.Tensor,
    rows: Rows,
    window: int | None = None,
    sink_tokens: int = 0,
) -> torch.Tensor:
    """Write k and v (token, kv_head, dim) of the step into their pages, then attend to all that the tables show.

    pages: one layer of a pool, (slot, 2, token, kv_head, dim). tables: (request, block) slots, stale entries 0, the
    null page, whose zeros the mask hides. q and the result: (token, head, dim). IndexError: a token has no page.
    """
    t = pages.shape[2]
    slots = tables[rows.row, rows.positions // t].long()
    if not bool((slots > 0).all()):
        raise IndexError("tables: a token of this step has no page; nobody writes slot 0")
    pages[slots, 0, rows.positions % t] = k
    pages[slots, 1, rows.positions % t] = v

    most = int(rows.ends.max())
    blocks = tables[:, : -(-most // t)].long()
    at = torch.arange(blocks.shape[1] * t)
    written = at[None, :] < rows.ends[:, None]
    keys, values = pages[blocks, 0].flatten(1, 2), pages[blocks, 1].flatten(1, 2)
    # Behind the end of a shorter request there may be anything, and 0 * NaN is NaN.
    keys, values = (part.masked_fill(~written[:, :, None, None], 0) for part in (keys, values))

    padded = q.new_zeros((len(rows.starts), max(rows.lengths), *q.shape[1:]))
    padded[rows.row, rows.column] = q
    positions = torch.tensor(rows.starts)[:, None] + torch.arange(padded.shape[1])
    seen = visible(positions[:, :, None], at[None, None, :], window, sink_tokens)
    return _attend(padded, keys, values, seen)[rows.row, rows.column]

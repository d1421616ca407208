"""What the simulated engine computes: tokens from an id, page bytes from a block's key.

    word w of block b's page in pool p  =  mix(mix(key(b) + mix(mix(seed) + p)) + w * odd)

over 64-bit words with splitmix64's mix, so every word of every page tells which block and pool it belongs
to, and a page that went to the wrong block, moved by a word or kept an old content reads as wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
WORD_BYTES = 8


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finalizer, in place; a bijection of 64-bit words."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def block_tokens(ids: NDArray[np.uint32], tokens_per_block: int) -> NDArray[np.int32]:
    """The prompt of these blocks and one more token, int32, shape (len(ids) * tokens_per_block + 1,).

    A block's first token is its id's number, so no two ids share even one leading token; the rest is mixed
    from the number and the position. The last prompt token is never reused: the one more token is there so
    that each whole block can be.
    """
    count = len(ids)
    out = np.empty(count * tokens_per_block + 1, dtype=np.uint32)
    body = out[:-1].reshape(count, tokens_per_block)
    odd = np.arange(tokens_per_block, dtype=np.uint32) * np.uint32(0x9E3779BA) | np.uint32(1)
    np.multiply((ids * np.uint32(0x85EBCA6B) + np.uint32(0xC2B2AE35))[:, None], odd[None, :], out=body)
    body >>= np.uint32(1)
    body[:, 0] = ids
    out[-1] = 0
    return out.view(np.int32)


@dataclass(frozen=True, slots=True)
class WrongByte:
    """The first byte that differs: `row` counts the pages compared, `offset` the bytes inside the page."""

    row: int
    offset: int
    expected: int
    found: int


class Pattern:
    """The pattern of one pool's pages. `page_bytes` is a multiple of 8."""

    def __init__(self, page_bytes: int, pool_index: int, seed: int) -> None:
        if page_bytes <= 0 or page_bytes % WORD_BYTES:
            raise ValueError(f"page_bytes must be a positive multiple of {WORD_BYTES}, got {page_bytes}")
        start = np.array([seed & _MASK], dtype=np.uint64)
        self._base = mix(mix(start) + np.uint64(pool_index + 1))
        self._steps = np.arange(1, page_bytes // WORD_BYTES + 1, dtype=np.uint64) * np.uint64(_GOLDEN)

    def pages(self, keys: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """What the pages of blocks with these keys hold: (len(keys), page_bytes) uint8."""
        own = mix(keys + self._base)
        return mix(own[:, None] + self._steps[None, :]).view(np.uint8)

    def check(self, pages: NDArray[np.uint8], keys: NDArray[np.uint64]) -> WrongByte | None:
        """Compare every byte of `pages` (len(keys), page_bytes) with the pattern; None: all are right."""
        expected = self.pages(keys)
        if np.array_equal(pages, expected):
            return None
        row, offset = (int(i) for i in np.argwhere(pages != expected)[0])
        return WrongByte(row, offset, int(expected[row, offset]), int(pages[row, offset]))

"""What the simulated engine writes for a token: words that tell a whole prefix, at several places in each page.

A page of T tokens holds up to 32 words of 8 bytes; word j belongs to the tokens up to min((j + 1) * S, T), with
S = ceil(T / 32):

    word = mix(start(seed, pool) + sum over positions p of the prefix of mix(token(p) * A + p * B))

so a page of another prefix, another position, another block, another pool or an older content reads as wrong, also
where only part of the block is reused. A word is written when the last token of its run is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.replay.pattern import mix

_WORDS = 32
_A = np.uint64(0x9E3779B97F4A7C15)
_B = np.uint64(0xD1B54A32D192ED03)

Words = NDArray[np.uint64]


@dataclass(slots=True)
class Content:
    """Words of one sequence: `ends[i]` tokens must be computed before word i stands; ascending."""

    ends: NDArray[np.int64]
    words: Words
    per_page: int

    def count(self, tokens: int) -> int:
        """Words that stand once so many tokens are computed."""
        return int(self.ends.searchsorted(tokens, "right"))

    def write(self, pages: Words, table: NDArray[np.int32], first: int, last: int) -> None:
        """Words [first, last) into the pages (slots, words per page) of a block table."""
        at = np.arange(first, last)
        pages[table[at // self.per_page], at % self.per_page] = self.words[first:last]

    def wrong(
        self, pages: Words, table: NDArray[np.int32], last: int, stale: tuple[int, int] = (0, 0)
    ) -> tuple[int | None, int]:
        """The first of the words [0, last) that is not in its page (None: all are there), and how many were compared.

        stale: blocks [s, e) that have no page.
        """
        at = np.arange(last)
        if stale[1] > stale[0]:
            at = np.delete(at, slice(stale[0] * self.per_page, stale[1] * self.per_page))
        different = (pages[table[at // self.per_page], at % self.per_page] != self.words[at]).nonzero()[0]
        return int(at[different[0]]) if len(different) else None, len(at)


class Contents:
    """Makes the content of sequences in one pool. `page_bytes`: what a page must have."""

    def __init__(self, tokens_per_block: int, seed: int, pool: int = 0) -> None:
        run = -(-tokens_per_block // _WORDS)
        self._block = tokens_per_block
        self._ends = np.minimum(np.arange(run, tokens_per_block + run, run), tokens_per_block)
        self._start = mix(mix(np.array([seed], np.uint64)) + np.uint64(pool))
        self.page_bytes = 8 * len(self._ends)

    def of(self, tokens: NDArray[np.int32]) -> Content:
        """Content of a sequence."""
        x = tokens.astype(np.uint64) * _A
        x += np.arange(1, len(tokens) + 1, dtype=np.uint64) * _B
        prefix = np.cumsum(mix(x), dtype=np.uint64)
        blocks = np.arange(-(-len(tokens) // self._block), dtype=np.int64) * self._block
        ends = (blocks[:, None] + self._ends[None, :]).ravel()
        ends = ends[: ends.searchsorted(len(tokens), "right")]
        return Content(ends, mix(prefix[ends - 1] + self._start), len(self._ends))

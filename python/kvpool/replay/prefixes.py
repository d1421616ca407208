"""Numbers for hash ids and for block prefixes, and the bound on reuse that follows from them.

A block is the same as another only if its whole prefix is, so what identifies it is the path of ids that
leads to it. Each new path gets the next number: an exact key, where a hash of the path could collide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Numbered:
    """One request's blocks: the number of each id, the key of each prefix, how many were seen."""

    ids: NDArray[np.uint32]
    keys: NDArray[np.uint64]
    seen: int


class PrefixIndex:
    """Numbers every id and every prefix at its first appearance, from 0."""

    def __init__(self) -> None:
        self._ids: dict[int, int] = {}
        self._paths: dict[tuple[int, int], int] = {}

    def add(self, hash_ids: Sequence[int]) -> Numbered:
        """Number one request's blocks.

        `seen`: leading blocks that an earlier request had. No cache, whatever its size and policy, can
        reuse more; one without a bound, that drops nothing, reuses just these.
        """
        ids = self._ids
        paths = self._paths
        numbers = [ids.setdefault(h, len(ids)) for h in hash_ids]
        known = len(paths)
        keys: list[int] = []
        parent = -1
        for number in numbers:
            parent = paths.setdefault((parent, number), len(paths))
            keys.append(parent)
        seen = next((depth for depth, key in enumerate(keys) if key >= known), len(keys))
        return Numbered(np.array(numbers, dtype=np.uint32), np.array(keys, dtype=np.uint64), seen)

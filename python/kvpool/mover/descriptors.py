"""Descriptors of moves: where pools are, slot lists that the GPU reads, runs of neighbours for the copy engine."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvpool.arguments import Int32Array
from kvpool.mover.pinned import PinnedMemory, Registrar

PER_CALL = 4096  # pages of one launch
SLAB = 64  # buffers that are made at once


@dataclass(frozen=True, slots=True)
class CudaPool:
    """device: address of (device_slots, page_bytes) bytes, slot 0 the null page. host: whole pages, pinned.

    owner: what keeps the device memory; let go when no move is on its way any more.
    """

    page_bytes: int
    device: int
    device_slots: int
    host: PinnedMemory | None = None
    owner: object = None


@dataclass(eq=False, slots=True)
class Buffer:
    """Slot lists of one launch: row 0 sources, row 1 destinations, PER_CALL each. `sources`, `targets`: addresses."""

    lists: Int32Array
    sources: int
    targets: int


class Buffers:
    """Buffers in pinned memory; whoever took one has it until it is given back. Not for several threads at once."""

    def __init__(self, registrar: Registrar) -> None:
        self._registrar = registrar
        self._slabs: list[PinnedMemory] = []
        self._spare: list[Buffer] = []
        self._grow()

    def _grow(self) -> None:
        slab = PinnedMemory(SLAB * 2 * PER_CALL * 4, 2 * PER_CALL * 4, self._registrar, threads=1)
        self._slabs.append(slab)
        for lists in slab.array.view(np.int32).reshape(SLAB, 2, PER_CALL):
            self._spare.append(Buffer(lists, lists[0].ctypes.data, lists[1].ctypes.data))

    def take(self) -> Buffer:
        """A buffer; its content is whatever it was."""
        if not self._spare:
            self._grow()
        return self._spare.pop()

    def give_back(self, buffers: Sequence[Buffer]) -> None:
        """Nobody reads them any more."""
        self._spare += buffers

    def close(self) -> None:
        """Takes the registrations back."""
        for slab in self._slabs:
            slab.close()


def runs(src: Int32Array, dst: Int32Array) -> list[tuple[int, int]]:
    """Stretches [start, end) of the lists in which both sides are neighbours."""
    if not src.size:
        return []
    breaks = np.flatnonzero((np.diff(src) != 1) | (np.diff(dst) != 1)) + 1
    return list(zip([0, *breaks.tolist()], [*breaks.tolist(), src.size], strict=True))


def pieces(first_slot: int, count: int, page_bytes: int, edges: Sequence[int]) -> list[tuple[int, int]]:
    """`count` slots from `first_slot` as [start, end) from 0, cut where they pass from one registration to the next.

    edges: of the registrations, in bytes, ascending; inner ones are multiples of `page_bytes`.
    """
    found, start = list[tuple[int, int]](), 0
    while start < count:
        edge = edges[bisect_right(edges, (first_slot + start) * page_bytes)] // page_bytes
        end = min(count, edge - first_slot)
        found.append((start, end))
        start = end
    return found

"""Descriptors of moves: where pools are, slot lists that the GPU reads, fragments for the copy engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvpool.arguments import Int32Array
from kvpool.mover.pinned import PinnedMemory, Registrar

PER_CALL = 4096  # pages of one launch
SLAB = 64  # buffers that are made at once
Int64s = npt.NDArray[np.int64]


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


def starts(src: Int32Array, dst: Int32Array, host: Int32Array | None, page_bytes: int, edges: Sequence[int]) -> Int64s:
    """Where fragments of the lists begin: runs of neighbours on both sides, cut where the host's side (`host`, one of
    the two, or None) passes from one registration to the next.

    edges: of the registrations, in bytes, ascending; inner ones are multiples of `page_bytes`.
    """
    if not src.size:
        return np.zeros(0, np.int64)
    breaks = (np.diff(src) != 1) | (np.diff(dst) != 1)
    if host is not None and len(edges) > 2:
        breaks |= np.diff(np.searchsorted(edges, host.astype(np.int64) * page_bytes, side="right")) != 0
    return np.concatenate([[0], np.flatnonzero(breaks) + 1]).astype(np.int64)


def count_runs(slots: Int32Array) -> int:
    """Runs of neighbours, in any order."""
    return int(np.count_nonzero(np.diff(np.sort(slots)) != 1)) + 1 if slots.size else 0

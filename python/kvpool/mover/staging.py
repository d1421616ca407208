"""Device memory through which scattered pages travel as few large copies, and the events of its parts.

    offload    gather stream:   pages -> part          offload stream:  part -> host, behind the gather
    onboard    onboard stream:  host -> part, part -> pages, one behind the other

Parts are taken in turn. A part has the event sets of a slot: who fills it waits for the copy that read it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvpool.arguments import Int32Array
from kvpool.mover.cuda_runtime import CudaRuntime
from kvpool.mover.slot_events import SlotEvents

PARTS = 2  # of a direction: one is filled while the other one is sent
STAGING_BYTES = 32 << 20  # of a direction, all parts
_ALIGNMENT = 512


class Staging:
    """Of one direction, on the device. MemoryError: it cannot be had; ValueError: `num_bytes` is less than PARTS."""

    def __init__(self, direction: str, num_bytes: int, runtime: CudaRuntime) -> None:
        self.part_bytes = num_bytes // PARTS
        if self.part_bytes < 1:
            raise ValueError(f"staging_bytes: {num_bytes} is less than {PARTS}")
        self._stride = -(-self.part_bytes // _ALIGNMENT) * _ALIGNMENT
        self._memory: Any = runtime.allocate(PARTS * self._stride)
        self._next = 0
        self.events = SlotEvents(direction, "staging", PARTS)

    def take(self) -> int:
        """The next part; what it held goes when its events allow."""
        part, self._next = self._next, (self._next + 1) % PARTS
        return part

    def address(self, part: int) -> int:
        """Where it begins."""
        return int(self._memory.ptr) + part * self._stride

    @staticmethod
    def slots(part: int) -> Int32Array:
        """As `events` counts it."""
        return np.array([part], np.int32)

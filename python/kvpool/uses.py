"""What a step uses: the slots of all its caches, read off the core by one call when the step begins."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from kvpool._core import Cache, Core
from kvpool.arguments import Int32Array
from kvpool.mover import SlotUse


def _parts(slots: Int32Array, ends: Sequence[int], positions: Sequence[int]) -> Int32Array:
    """The slots of the caches at these positions."""
    if len(positions) == len(ends):
        return slots
    return np.concatenate([slots[ends[i - 1] if i else 0 : ends[i]] for i in positions])


class StepUses:
    """Of one step on `stream`: it reads all pages of its caches, and writes those from each one's history on."""

    __slots__ = ("_pools", "stream")

    def __init__(self, core: Core, handles: Sequence[Cache], stream: object) -> None:
        self.stream = stream
        self._pools = [
            ((np.frombuffer(read, np.int32), read_ends), (np.frombuffer(written, np.int32), written_ends))
            for read, read_ends, written, written_ends in core.step_slots(handles)
        ]

    def of(
        self, positions: Sequence[int], names: Sequence[str], stuck: Collection[tuple[int, bool, int]]
    ) -> list[SlotUse]:
        """Of its caches at these positions, pools by their names; not of device slots that are stuck.

        Those are a LOST cache's, nobody else ever uses them.
        """
        uses = []
        for pool, (name, accesses) in enumerate(zip(names, self._pools, strict=True)):
            for (slots, ends), writes in zip(accesses, (False, True), strict=True):
                used = _parts(slots, ends, positions)
                if stuck:
                    used = used[~np.isin(used, [slot for at, host, slot in stuck if at == pool and not host])]
                uses.append(SlotUse(name, "device", used, writes))
        return uses

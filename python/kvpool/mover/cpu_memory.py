"""Memory of a manager on the CPU: both tiers are NumPy's arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvpool.arguments import ByteArray
from kvpool.buffers import as_pages
from kvpool.mover.cpu import CpuMover

_DEVICE = "lower device_bytes, or use device=None for books only"
_HOST = "lower host_bytes"


class CpuMemory:
    """As `CudaMemory`, in the memory of this process."""

    def __init__(self) -> None:
        self._pools: dict[str, tuple[ByteArray, ByteArray | None]] = {}

    def add(
        self, name: str, page_bytes: int, device_slots: int, host_slots: int, buffer: Any = None
    ) -> tuple[ByteArray, ByteArray | None]:
        """Pages of a pool: (device_slots, page_bytes) and (host_slots, page_bytes) or None.

        Zeroed; a `buffer` is taken as it is, but for the null page. MemoryError: they cannot be had. ConfigError: the
        buffer is not what the pool needs.
        """
        shape = (device_slots, page_bytes)
        pages = _zeros("device_bytes", name, shape, _DEVICE) if buffer is None else as_pages(buffer, name, shape)
        pages[0] = 0
        host = _zeros("host_bytes", name, (host_slots, page_bytes), _HOST) if host_slots else None
        self._pools[name] = (pages, host)
        return self._pools[name]

    def places(self) -> dict[str, tuple[int, int]]:
        """{pool: (address, bytes)} of the device's pages."""
        return {name: (pages.ctypes.data, pages.nbytes) for name, (pages, _) in self._pools.items()}

    def null_page(self, name: str) -> ByteArray:
        """Its bytes."""
        page: ByteArray = self._pools[name][0][0]
        return page

    def mover(self) -> CpuMover:
        """Between the pages of all pools."""
        return CpuMover(self._pools)

    def close(self) -> None:
        """Nothing to give back."""


def _zeros(field: str, name: str, shape: tuple[int, int], remedy: str) -> ByteArray:
    try:
        return np.zeros(shape, np.uint8)
    except (MemoryError, ValueError) as error:
        raise MemoryError(
            f"{field}: pool {name!r} needs {shape[0] * shape[1]} bytes of memory, which cannot be allocated; {remedy}"
        ) from error

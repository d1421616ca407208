"""Memory of a manager on a GPU: pages of the device and pinned ones of the host, and the mover between them."""

from __future__ import annotations

import warnings
from typing import Any

from kvpool import machine
from kvpool.mover.calibration import CalibrationError, load
from kvpool.mover.cuda import CudaMover
from kvpool.mover.cuda_runtime import CudaRuntime
from kvpool.mover.descriptors import CudaPool
from kvpool.mover.paths import Chooser, Thresholds
from kvpool.mover.pinned import PinnedMemory, StderrProgress


def chooser_for(ordinal: int) -> Chooser:
    """The calibration of GPU N of "cuda:N"; without one the default. One that cannot be used is a RuntimeWarning."""
    found = machine.find_gpu(ordinal)
    try:
        calibration = None if found is None else load(found[0].name, found[1])
    except CalibrationError as error:
        warnings.warn(f"{error}. The default is used; kvpool doctor --calibrate measures again", RuntimeWarning, 2)
        calibration = None
    return calibration or Thresholds()


class CudaMemory:
    """Of one GPU ("cuda", "cuda:1"). ConfigError: this machine cannot use it; says why."""

    def __init__(self, device: str) -> None:
        machine.check_cuda(device)
        self._ordinal = machine.parse_device(device) or 0
        self._runtime = CudaRuntime(self._ordinal)
        self._pools: dict[str, CudaPool] = {}
        self._pinned: list[PinnedMemory] = []

    def add(self, name: str, page_bytes: int, device_slots: int, host_slots: int) -> tuple[Any, Any | None]:
        """Zeroed pages of a pool: CuPy's array (device_slots, page_bytes), NumPy's (host_slots, page_bytes) or None.

        MemoryError: they cannot be had.
        """
        try:
            pages, address = self._runtime.zeros((device_slots, page_bytes))
        except MemoryError as error:  # CuPy's OutOfMemoryError is one
            needed = device_slots * page_bytes
            raise MemoryError(
                f"device_bytes: pool {name!r} needs {needed} bytes of GPU memory ({error}); lower device_bytes"
            ) from error
        host = None
        if host_slots:
            host = PinnedMemory(host_slots * page_bytes, page_bytes, self._runtime, progress=StderrProgress())
            self._pinned.append(host)
        self._pools[name] = CudaPool(page_bytes, address, device_slots, host, pages)
        return pages, None if host is None else host.array.reshape(host_slots, page_bytes)

    def mover(self) -> CudaMover:
        """Between the pages of all pools, by what was measured on this GPU."""
        return CudaMover(self._pools, self._runtime, chooser=chooser_for(self._ordinal))

    def close(self) -> None:
        """Takes the registrations back; no move may be on its way."""
        for memory in self._pinned:
            memory.close()

"""Memory of a manager on a GPU: pages of the device and pinned ones of the host, and the mover between them."""

from __future__ import annotations

import warnings
from typing import Any

from kvpool import machine
from kvpool.buffers import gpu_bytes, is_on_gpu
from kvpool.errors import ConfigError
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
    """Of one GPU ("cuda", "cuda:1"), host pages on a NUMA node. ConfigError: this machine cannot use it; says why."""

    def __init__(self, device: str, numa_node: int | None = None) -> None:
        machine.check_cuda(device)
        self._device, self._numa_node = device, numa_node
        self._runtime = CudaRuntime(machine.parse_device(device) or 0)
        self._pools: dict[str, CudaPool] = {}
        self._pinned: list[PinnedMemory] = []

    def add(
        self, name: str, page_bytes: int, device_slots: int, host_slots: int, buffer: Any = None
    ) -> tuple[Any, Any | None]:
        """Pages of a pool: CuPy's array (device_slots, page_bytes), NumPy's (host_slots, page_bytes) or None.

        Zeroed; a `buffer` is taken as it is, but for the null page. MemoryError: they cannot be had. ConfigError: the
        buffer is not what the pool needs.
        """
        shape = (device_slots, page_bytes)
        pages, address = self._zeros(name, shape) if buffer is None else self._adopt(name, shape, buffer)
        host = None
        if host_slots:
            host = self._pin(host_slots * page_bytes, page_bytes)
            self._pinned.append(host)
        self._pools[name] = CudaPool(page_bytes, address, device_slots, host, pages)
        return pages, None if host is None else host.array.reshape(host_slots, page_bytes)

    def _pin(self, num_bytes: int, page_bytes: int) -> PinnedMemory:
        try:
            return PinnedMemory(
                num_bytes, page_bytes, self._runtime, numa_node=self._numa_node, progress=StderrProgress()
            )
        except OSError as error:  # of the node: what cannot be registered is a MemoryError
            raise ConfigError(error.strerror or str(error)) from error

    def _zeros(self, name: str, shape: tuple[int, int]) -> tuple[Any, int]:
        try:
            return self._runtime.zeros(shape)
        except MemoryError as error:  # CuPy's OutOfMemoryError is one
            raise MemoryError(
                f"device_bytes: pool {name!r} needs {shape[0] * shape[1]} bytes of GPU memory ({error}); lower "
                "device_bytes"
            ) from error

    def _adopt(self, name: str, shape: tuple[int, int], buffer: Any) -> tuple[Any, int]:
        """The engine's memory, which stays its own: it is kept alive, and never freed."""
        try:
            array = buffer if is_on_gpu(buffer, name) else self._runtime.from_dlpack(buffer)
        except ConfigError:
            raise
        except Exception as error:  # whatever an exporter raises
            raise ConfigError(
                f"buffers[{name!r}]: DLPack does not hand it over ({type(error).__name__}: {error}); give it as bytes "
                "(in PyTorch: tensor.detach().view(torch.uint8))"
            ) from error
        memory = gpu_bytes(array, name, shape)
        gpu = self._runtime.gpu_of(memory.address)
        if gpu != self._runtime.ordinal:
            where = "is no GPU memory" if gpu is None else f"is memory of GPU {gpu}"
            raise ConfigError(
                f"buffers[{name!r}]: address {memory.address:#x} {where}; device={self._device!r} needs memory of GPU "
                f"{self._runtime.ordinal}"
            )
        self._runtime.clear(memory.address, shape[1])
        return self._runtime.wrap(memory.address, shape, array), memory.address

    def places(self) -> dict[str, tuple[int, int]]:
        """{pool: (address, bytes)} of the device's pages."""
        return {name: (pool.device, pool.device_slots * pool.page_bytes) for name, pool in self._pools.items()}

    def null_page(self, name: str) -> Any:
        """Its bytes, as the device has them now."""
        pool = self._pools[name]
        return self._runtime.download(pool.device, pool.page_bytes)

    def mover(self) -> CudaMover:
        """Between the pages of all pools, by what was measured on this GPU."""
        return CudaMover(self._pools, self._runtime, chooser=chooser_for(self._runtime.ordinal))

    def close(self) -> None:
        """Takes the registrations back; no move may be on its way."""
        for memory in self._pinned:
            memory.close()

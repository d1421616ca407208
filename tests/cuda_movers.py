"""The random world of movers.py on `CudaMover`, under the stand-in for CuPy with the real kernels."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np

import fake_cupy
from cpu_kernels import plain_kernels
from kvpool.mover.cuda import CudaMover
from kvpool.mover.cuda_runtime import CudaRuntime
from kvpool.mover.descriptors import CudaPool
from kvpool.mover.pinned import PinnedMemory
from movers import PAGE_BYTES, World, page
from switched_mover import EngineStream


def fake_gpu(seed: int = 0, **settings: Any) -> tuple[CudaRuntime, fake_cupy.World]:
    """A runtime on the stand-in, which is put in CuPy's place while it imports it."""
    gpu = fake_cupy.World(plain_kernels(), seed=seed, **settings)
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = fake_cupy.make(gpu)
    try:
        return CudaRuntime(0), gpu
    finally:
        if before is None:
            del sys.modules["cupy"]
        else:
            sys.modules["cupy"] = before


class CudaWorld(World):
    """Pages of device memory and of pinned memory; the streams' order is drawn from the seed."""

    def __post_init__(self) -> None:
        gpu_settings = {name: self.options.pop(name) for name in ("lazy",) if name in self.options}
        options = {"check": True, "engine_bytes": 3 * PAGE_BYTES, "max_blocks": 2, **self.options}
        self.options = {}
        super().__post_init__()
        self.mover.close()
        self.runtime, self.gpu = fake_gpu(self.seed, **gpu_settings)
        self.memories: list[Any] = []
        pools = {}
        for pool in ("full", "window"):
            device = self.runtime.allocate(self.slots * PAGE_BYTES)
            host = PinnedMemory(self.host * PAGE_BYTES, PAGE_BYTES, self.runtime, threads=1)
            self.memories += [device, host]
            self.pages[pool, "device"] = view(device.ptr, self.slots)
            self.pages[pool, "host"] = host.array.reshape(-1, PAGE_BYTES)
            self.pages[pool, "device"][:] = page(0)
            pools[pool] = CudaPool(PAGE_BYTES, device.ptr, self.slots, host)
        self.mover = CudaMover(pools, self.runtime, **options)  # type: ignore[assignment]
        self.engine = [None, *(EngineStream(self.gpu, non_blocking=True) for _ in range(self.streams))]


def view(address: int, rows: int) -> Any:
    return np.ctypeslib.as_array((ctypes.c_uint8 * (rows * PAGE_BYTES)).from_address(address)).reshape(rows, PAGE_BYTES)

"""The random world of movers.py on `CudaMover`, under the stand-in for CuPy with the real kernels."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import fake_bindings
import fake_cupy
from any_path import AnyPath
from cpu_kernels import plain_kernels
from kvpool.mover.cuda import CudaMover
from kvpool.mover.cuda_runtime import CudaRuntime
from kvpool.mover.descriptors import CudaPool
from kvpool.mover.pinned import PinnedMemory
from kvpool.mover.staging import PARTS
from movers import PAGE_BYTES, World, page
from switched_mover import EngineStream


@contextlib.contextmanager
def stand_ins(gpu: fake_cupy.World, version: int | None = 12080) -> Iterator[None]:
    """The fake GPU's modules in the place of CuPy's and cuda.bindings'. version: of the driver, None: no bindings."""
    modules = {"cupy": fake_cupy.make(gpu)}
    modules |= fake_bindings.missing() if version is None else fake_bindings.make(gpu, version)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield


def plant_a_wrong_ring(patch: pytest.MonkeyPatch) -> None:
    """The ring kernel copies from 16 bytes behind its source."""
    launch = CudaRuntime.launch

    def shifted(self: CudaRuntime, plan: Any, arguments: Any, stream: Any) -> None:
        source, *rest = arguments
        launch(self, plan, (source + 16 if plan.kernel == "copy_ring_u128" else source, *rest), stream)

    patch.setattr(CudaRuntime, "launch", shifted)


def fake_gpu(seed: int = 0, version: int | None = 12080, **settings: Any) -> tuple[CudaRuntime, fake_cupy.World]:
    """A runtime on the stand-ins. It has tried the batched copy if there is one (version: as of `stand_ins`)."""
    gpu = fake_cupy.World(plain_kernels(), seed=seed, **settings)
    with stand_ins(gpu, version):
        runtime = CudaRuntime(0)
        fault, gpu.fault_at = gpu.fault_at, None
        runtime.batch_problem()
    gpu.ran, gpu.fault_at = 0, fault
    gpu.batches.clear()
    return runtime, gpu


class CudaWorld(World):
    """Pages of device memory and of pinned memory; the streams' order is drawn from the seed."""

    def __post_init__(self) -> None:
        gpu_settings = {
            name: self.options.pop(name) for name in ("lazy", "version", "capability") if name in self.options
        }
        options = {
            "check": True,
            "chooser": AnyPath(self.seed),
            "staging_bytes": PARTS * 2 * self.page_bytes,
            **self.options,
        }
        self.options = {}
        super().__post_init__()
        self.mover.close()
        self.runtime, self.gpu = fake_gpu(self.seed, **gpu_settings)
        self.memories: list[Any] = []
        pools = {}
        for pool in ("full", "window"):
            size = self.page_bytes
            device = self.runtime.allocate(self.slots * size)
            host = PinnedMemory(self.host * size, size, self.runtime, chunk_bytes=4 << 10, threads=1)
            self.memories += [device, host]
            self.pages[pool, "device"] = view(device.ptr, self.slots, size)
            self.pages[pool, "host"] = host.array.reshape(-1, size)
            self.pages[pool, "device"][:] = page(0, size)
            pools[pool] = CudaPool(size, device.ptr, self.slots, host)
        self.mover = CudaMover(pools, self.runtime, **options)  # type: ignore[assignment]
        self.engine = [None, *(EngineStream(self.gpu, non_blocking=True) for _ in range(self.streams))]


def view(address: int, rows: int, page_bytes: int = PAGE_BYTES) -> Any:
    return np.ctypeslib.as_array((ctypes.c_uint8 * (rows * page_bytes)).from_address(address)).reshape(rows, page_bytes)

"""On a GPU (`-m gpu`, part of bench/gpu_check): every case of the CPU's, and pinned memory as the GPU sees it."""

from __future__ import annotations

import numpy as np
import pytest

import kernel_cases
from cpu_kernels import SIGNATURES
from gpu_kernels import GpuKernels, manager_round_trip, mover_round_trip
from kvpool import CacheConfig, KVCacheManager, PoolConfig, machine
from kvpool.mover.cuda_runtime import CudaRuntime
from kvpool.mover.launches import plan_launch
from kvpool.mover.paths import PATHS
from kvpool.mover.pinned import PinnedMemory

PROBLEMS = machine.look_for_cuda().problems
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(PROBLEMS), reason=f"no GPU to use: {'; '.join(PROBLEMS)}")]


@pytest.mark.parametrize("kernel", SIGNATURES)
def test_every_case_holds(kernel: str) -> None:
    kernels = GpuKernels(CudaRuntime())
    for case in kernel_cases.cases(kernel, "plain"):
        if not case.sparse:
            kernel_cases.run(kernels, case)


def test_slots_beyond_2_gib_of_pinned_memory() -> None:
    page_bytes, runtime = 1 << 20, CudaRuntime()
    with PinnedMemory(5 << 30, page_bytes, runtime) as host, PinnedMemory(4096, 4096, runtime) as lists:
        slots = lists.array.view(np.int32)
        slots[:3] = 2049, 4097, 5119
        content = np.random.default_rng(0).integers(0, 256, (3, page_bytes), np.uint8)
        host.array.reshape(-1, page_bytes)[slots[:3]] = content
        device, stream = runtime.allocate(3 * page_bytes), runtime.stream()
        launch = plan_launch("gather_pages", (host.address, device.ptr), page_bytes, 3, 16)
        assert launch is not None
        numbers = np.int64(page_bytes), np.int32(3)
        runtime.launch(launch, (host.address, device.ptr, lists.address, *numbers), stream)
        stream.synchronize()
        assert np.array_equal(runtime.download(device.ptr, content.size), content.ravel())


def test_a_manager_on_the_engines_memory_keeps_every_byte() -> None:
    """More requests than the device has room for: pages go down and come up again, each with its bytes."""
    import cupy

    page = 4096
    config = CacheConfig(4, [PoolConfig("kv", page)], device_bytes=page * 9, host_bytes=page * 16)
    memory = cupy.full((9, page // 2), 7, cupy.uint16)
    with KVCacheManager(config, device="cuda", buffers={"kv": memory}) as manager:
        pages = manager.pages("kv")
        assert pages.data.ptr == memory.data.ptr
        assert not cupy.asnumpy(pages[0]).any()
        for number in range(4):
            with manager.create(number, [*range(100 * number, 100 * number + 16)]) as cache:
                assert cache.resume()
                assert cache.resize(16)
                pages[cupy.asarray(manager.block_tables([cache], "kv")[0])] = number + 1
                cupy.cuda.Device().synchronize()
                cache.commit([*range(100 * number, 100 * number + 16)])
        assert manager.stats().offloaded == 8
        for number in range(4):
            with manager.create(number, [*range(100 * number, 100 * number + 17)]) as cache:
                assert cache.num_reused_tokens == 16
                assert cache.resume()
                table = cupy.asarray(manager.block_tables([cache], "kv")[0])
                assert (cupy.asnumpy(pages[table]) == number + 1).all()
        manager.check()
    assert memory.shape == (9, page // 2)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("page_bytes", [24, 4096, 1 << 20])
def test_the_mover_keeps_every_byte(page_bytes: int, path: str) -> None:
    mover_round_trip(CudaRuntime(), page_bytes, path)


def test_a_manager_keeps_every_byte() -> None:
    manager_round_trip(CudaRuntime())

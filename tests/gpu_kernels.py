"""Launches kernels on a GPU, or on the stand-in for one, with the interface of cpu_kernels.CpuKernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cpu_kernels import KERNELS_OF
from kvpool import CacheConfig, KVCacheManager, PoolConfig
from kvpool.mover import MoveBatch
from kvpool.mover.cuda import CudaMover
from kvpool.mover.cuda_runtime import CudaRuntime
from kvpool.mover.descriptors import CudaPool
from kvpool.mover.launches import Launch
from kvpool.mover.paths import INSTEAD, Fixed
from kvpool.mover.pinned import PinnedMemory

GUARD = 256  # bytes on each side of an array on the device, which must stay
FAMILY_OF = {kernel: family for family, kernels in KERNELS_OF.items() for kernel in kernels}


class GpuKernels:
    """Host arrays go to device memory, with the same alignment, and come back after the launch."""

    def __init__(self, runtime: CudaRuntime) -> None:
        self._runtime = runtime

    def launch(self, kernel: str, grid: int, threads: int, arguments: Sequence[Any], order: int = 0) -> None:
        """`order` is the hardware's."""
        runtime, memories = self._runtime, dict[int, tuple[Any, Any, Any]]()
        values: list[Any] = []
        for argument in arguments:
            if not isinstance(argument, np.ndarray):
                values.append(argument)
                continue
            address = argument.ctypes.data
            if address not in memories:
                before = GUARD + address % 16
                content = np.full(before + argument.nbytes + GUARD, 0xA7, np.uint8)
                content[before : before + argument.nbytes] = argument.view(np.uint8)
                memory = runtime.allocate(content.size)
                runtime.upload(content, memory.ptr)
                memories[address] = memory, argument, content
            values.append(memories[address][0].ptr + GUARD + address % 16)
        stream = runtime.stream()
        runtime.launch(Launch(FAMILY_OF[kernel], kernel, grid, threads), values, stream)
        stream.synchronize()
        for address, (memory, argument, content) in memories.items():
            found = runtime.download(memory.ptr, content.size)
            before, after = GUARD + address % 16, GUARD + address % 16 + argument.nbytes
            assert (found[:before] == 0xA7).all(), f"{kernel} wrote before its memory"
            assert (found[after:] == 0xA7).all(), f"{kernel} wrote behind its memory"
            argument.view(np.uint8)[:] = found[before:after]


def mover_round_trip(runtime: CudaRuntime, page_bytes: int, path: str) -> None:
    """Pages go down, across and up by a path of `CudaMover`; every byte of both tiers as NumPy says."""
    n, random = 40, np.random.default_rng(page_bytes)
    block = runtime.allocate((n + 1) * page_bytes)
    with PinnedMemory(n * page_bytes, page_bytes, runtime) as pinned:
        pools = {"kv": CudaPool(page_bytes, block.ptr, n + 1, pinned)}
        staging = 2 * 7 * page_bytes  # 7 pages of 20 at a time
        mover = CudaMover(pools, runtime, chooser=Fixed(path), staging_bytes=staging, check=True)
        device = random.integers(0, 256, (n + 1, page_bytes), np.uint8)
        host = random.integers(0, 256, (n, page_bytes), np.uint8)
        runtime.upload(device, block.ptr)
        pinned.array.reshape(n, page_bytes)[:] = host
        for _ in range(6):
            for direction, source, target, low in (
                ("offload", device, host, (1, 0)),
                ("copy", device, device, (1, 1)),
                ("onboard", host, device, (0, 1)),
            ):
                src = random.permutation(n)[: n // 2] if direction != "copy" else random.permutation(n)
                dst = random.permutation(n)[: n // 2] if direction != "copy" else src[n // 2 :]
                src, dst = src[: n // 2] + low[0], dst + low[1]
                assert mover.submit(MoveBatch("kv", direction, src, dst)) is not None
                target[dst] = source[src]
        assert mover.synchronize(60)
        assert np.array_equal(pinned.array.reshape(n, page_bytes), host)
        assert np.array_equal(runtime.download(block.ptr, device.size), device.ravel())
        assert mover.totals()["pages"] == 6 * 3 * n // 2
        taken = path if path in mover.offered("kv", "offload") else INSTEAD[path]
        assert mover.path_counts()[taken]["offload"]["pages"] == 6 * n // 2
        mover.close()


def manager_round_trip(runtime: CudaRuntime) -> None:
    """A manager on CUDA whose pages go down and come up: what was computed is what is read again, on a stream."""
    size, tokens_per_block, prompts = 4096, 4, 6
    config = CacheConfig(tokens_per_block, [PoolConfig("kv", size)], device_bytes=size * 9, host_bytes=size * 64)
    stream = runtime.stream()
    with KVCacheManager(config, device="cuda") as manager:
        base = int(manager.pages("kv").data.ptr)  # type: ignore[attr-defined]
        for number in [*range(prompts), *range(prompts)]:
            tokens = np.arange(100 * number, 100 * number + 17, dtype=np.int32)
            cache = manager.create(number, tokens)
            assert cache.resume()
            assert cache.resize(17)
            known = cache.num_reused_tokens // tokens_per_block
            manager.step_begin([cache], stream)
            slots = manager.block_tables([cache], "kv")[0].tolist()
            stream.synchronize()
            for index, slot in enumerate(slots):
                page = np.full(size, 10 * number + index, np.uint8)
                if index < known:
                    assert np.array_equal(runtime.download(base + slot * size, size), page), (number, index)
                else:
                    runtime.upload(page, base + slot * size)
            manager.step_end([cache], stream)
            cache.commit(tokens[cache.num_committed_tokens :])
            cache.close()
        stats = manager.stats()
        assert (stats.reused_blocks, stats.failed_moves) == (4 * prompts, 0)
        assert stats.offloaded > 0
        assert stats.onboarded > 0
        assert sum(of["pages"] for path in stats.paths.values() for of in path.values()) >= stats.onboarded
        manager.check()

"""Launches kernels on a GPU, or on the stand-in for one, with the interface of cpu_kernels.CpuKernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cpu_kernels import KERNELS_OF
from kvpool.mover.cuda_runtime import CudaRuntime
from kvpool.mover.launches import Launch

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

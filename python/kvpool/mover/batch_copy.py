"""The driver's batched copy, `cuMemcpyBatchAsync` (CUDA 12.8 and later), through `cuda.bindings`.

`cuda.bindings.driver` finds the function and knows its structure of attributes; the call is made with arrays, not with
the lists that `cuda.bindings` takes: 4,096 copies as lists cost the caller a millisecond. The function of CUDA 12.8 is
asked for by its version, so that later drivers, whose newest form has one argument less, give the same one.

    CUresult cuMemcpyBatchAsync(CUdeviceptr* dsts, CUdeviceptr* srcs, size_t* sizes, size_t count,
                                CUmemcpyAttributes* attrs, size_t* attrsIdxs, size_t numAttrs,
                                size_t* failIdx, CUstream hStream)

Sources are read in the order of the stream (CU_MEMCPY_SRC_ACCESS_ORDER_STREAM): a page that goes down may still be
written by what the stream waits for. The three arrays are read within the call.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

SINCE = 12080  # CUDA 12.8, as the driver counts
MOST = 4096  # copies of one call: much longer ones were seen to crash a driver
Words = npt.NDArray[np.uint64]

_PROTOTYPE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    *[ctypes.c_void_p] * 3,  # dsts, srcs, sizes
    ctypes.c_size_t,  # count
    *[ctypes.c_void_p] * 2,  # attrs, attrsIdxs
    ctypes.c_size_t,  # numAttrs
    *[ctypes.c_void_p] * 2,  # failIdx, hStream
)


class BatchCopy:
    """The function. RuntimeError, saying why, where it cannot be had."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise RuntimeError(f"cuda.bindings is not installed ({error}): pip install kvpool[cuda]") from error
        try:
            result, address, _ = driver.cuGetProcAddress(b"cuMemcpyBatchAsync", SINCE, 0)
        except Exception as error:  # of the loader's own kinds: there is no driver, or it is of before CUDA 12
            raise RuntimeError(f"cuda.bindings finds no driver: {error}") from error
        if int(result) != 0 or not address:
            raise RuntimeError("the NVIDIA driver has no cuMemcpyBatchAsync: it is of before CUDA 12.8")
        self._call: Any = _PROTOTYPE(int(address))
        self._attributes: Any = driver.CUmemcpyAttributes()
        self._attributes.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        self._first = np.zeros(1, np.uint64)  # the attributes are those of all copies from the first on

    def __call__(self, targets: Words, sources: Words, sizes: Words, stream: int) -> None:
        """Enqueue at most MOST copies (addresses, bytes), in any order. RuntimeError: the driver refuses."""
        failed = np.full(1, np.iinfo(np.uint64).max, np.uint64)
        arrays = [np.ascontiguousarray(array, np.uint64) for array in (targets, sources, sizes)]
        if not 0 < len(sizes) <= MOST:
            raise ValueError(f"{len(sizes)} copies are not in 1..{MOST}")
        result = self._call(
            *(array.ctypes.data for array in arrays),
            len(sizes),
            int(self._attributes.getPtr()),
            self._first.ctypes.data,
            1,
            failed.ctypes.data,
            stream,
        )
        if result != 0:
            which = "none in particular" if failed[0] >= len(sizes) else f"number {failed[0]}"
            raise RuntimeError(f"cuMemcpyBatchAsync: error {result}, copy {which} of {len(sizes)}")

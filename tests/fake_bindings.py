"""A stand-in for what kvpool uses of `cuda.bindings.driver`, on a fake GPU of fake_cupy.py: the driver's batched copy.

The function is a real one, at an address, with C's calling convention and the structures of CUDA 12.8 (the real
`cuda.bindings` finds the same in tests/test_batch_copy.py): kvpool calls it as it would call the driver.

- The arrays are read within the call, the pages when the work runs, in an order of the copies that the seed draws.
- Each copy must lie within one allocation or registration on either side; copies must not depend on each other.
"""

from __future__ import annotations

import ctypes
import types
from typing import Any

from fake_cupy import CUDARuntimeError, Work, World

INVALID_VALUE = 1
MOST = 4096


class Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class MemcpyAttributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = [
        ("srcAccessOrder", ctypes.c_int),
        ("srcLocHint", Location),
        ("dstLocHint", Location),
        ("flags", ctypes.c_uint),
    ]

    def getPtr(self) -> int:
        return ctypes.addressof(self)


def _array(address: int, count: int) -> list[int]:
    return list((ctypes.c_uint64 * count).from_address(address))


def _independent(copies: list[tuple[int, int, int]]) -> bool:
    """No copy writes what another one reads or writes."""
    spans = sorted(
        [(to, to + size, True) for to, _, size in copies] + [(of, of + size, False) for _, of, size in copies]
    )
    end, wrote = 0, False
    for start, stop, writes in spans:
        if start < end and (writes or wrote):
            return False
        if stop > end:
            end, wrote = stop, writes
    return True


def _call(world: World, *given: Any) -> int:
    """The arguments of cuMemcpyBatchAsync."""
    targets, sources, sizes, count, attributes, first, number, failed, stream = given
    attribute = MemcpyAttributes.from_address(attributes)
    if not 0 < count <= MOST or number != 1 or _array(first, 1) != [0] or attribute.srcAccessOrder != 1 or not stream:
        return INVALID_VALUE
    copies = list(zip(_array(targets, count), _array(sources, count), _array(sizes, count), strict=True))
    for index, (to, of, size) in enumerate(copies):
        if not (world.covers(to, size) and world.covers(of, size) and world.reaches(to) and world.reaches(of)):
            ctypes.c_uint64.from_address(failed).value = index
            return INVALID_VALUE
    if not _independent(copies):
        return INVALID_VALUE
    order = world.random.sample(copies, count)

    def run() -> None:
        for to, of, size in order:
            if not (world.covers(to, size) and world.covers(of, size)):
                raise CUDARuntimeError("cudaErrorIllegalAddress: memory of a batch was given back before it ran")
            ctypes.memmove(to, of, size)

    world.batches.append(count)
    try:
        world.give(world.streams[stream], Work(run, cost_ms=1e-3 + sum(size for *_, size in copies) / 50e6))
    except CUDARuntimeError:
        return 719  # CUDA_ERROR_LAUNCH_FAILED: a fault is sticky
    return 0


def make(world: World, version: int = 12080) -> dict[str, types.ModuleType]:
    """Modules to stand in sys.modules. version: of the driver, as it counts."""
    kind = ctypes.CFUNCTYPE(
        ctypes.c_int,
        *[ctypes.c_void_p] * 3,
        ctypes.c_size_t,
        *[ctypes.c_void_p] * 2,
        ctypes.c_size_t,
        *[ctypes.c_void_p] * 2,
    )
    function = kind(lambda *given: _call(world, *given))
    world.kept.append(function)

    def get_proc_address(symbol: bytes, asked: int, flags: int) -> tuple[int, int, int]:
        found = symbol == b"cuMemcpyBatchAsync" and 12080 <= asked <= version and flags == 0
        return (0, ctypes.cast(function, ctypes.c_void_p).value or 0, 0) if found else (0, 0, 1)

    driver, bindings, cuda = (types.ModuleType(name) for name in ("cuda.bindings.driver", "cuda.bindings", "cuda"))
    driver.__dict__.update(
        CUmemcpyAttributes=MemcpyAttributes,
        CUmemcpySrcAccessOrder=types.SimpleNamespace(CU_MEMCPY_SRC_ACCESS_ORDER_STREAM=1),
        cuGetProcAddress=get_proc_address,
    )
    bindings.__dict__["driver"], cuda.__dict__["bindings"] = driver, bindings
    return {"cuda": cuda, "cuda.bindings": bindings, "cuda.bindings.driver": driver}


def missing() -> dict[str, Any]:
    """As if `cuda.bindings` were not installed."""
    return {"cuda.bindings": None}

"""The device that a test's managers, movers and streams are on: CPU memory, or CUDA on the stand-in for CuPy.

conftest.py runs every test of the modules in SUITE on both, the second time with `[cuda]` in its name. A test asks here
for whatever depends on the device. On CUDA it is `CudaMover` with the real kernels, all of it but the driver; random
tests take few of their seeds there (`few`), which keeps the suite's time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import pytest

import fake_cupy
from cpu_kernels import plain_kernels
from cuda_movers import SwitchedMover
from kvpool import KVCacheManager, machine
from kvpool.mover import CpuMover
from kvpool.mover.cuda_runtime import CudaRuntime
from kvpool.mover.descriptors import CudaPool
from kvpool.mover.pinned import CHUNK_BYTES, PinnedMemory, chunk_edges

T = TypeVar("T")

SUITE = {
    "test_batches",
    "test_liveness",
    "test_manager",
    "test_model_random",
    "test_moves",
    "test_moves_random",
    "test_scheduler",
    "test_scheduler_bytes",
    "test_scheduler_misuse",
    "test_scheduler_threads",
    "test_state_machine",
    "test_steps",
    "test_tiers",
    "test_tiers_faults",
    "test_tiers_random",
}

# What runs on the CPU alone, and why.
NOT_ON_CUDA: dict[str, str] = {}

_world: fake_cupy.World | None = None


def parameters(module: str, test: str) -> list[str]:
    """The devices on which a test runs."""
    return ["cpu"] if module not in SUITE or f"{module}.{test}" in NOT_ON_CUDA else ["cpu", "cuda"]


def enter_cuda(monkeypatch: pytest.MonkeyPatch) -> fake_cupy.World:
    """A GPU of the stand-in, as far as kvpool can see, until `monkeypatch` ends; for `leave_cuda` to forget."""
    global _world
    _world = fake_cupy.World(plain_kernels(), seed=1)
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy.make(_world))
    monkeypatch.setattr(machine, "_cupy", lambda: "fake")
    monkeypatch.setattr(machine, "_driver", lambda: ("12.8", [machine.Gpu(0, "stand-in", 1 << 30, "9.0")], None))
    monkeypatch.setattr(machine, "nvrtc_release", lambda library: "12.9")
    return _world


def leave_cuda() -> None:
    """Tests are on the CPU again."""
    global _world
    _world = None


def device() -> str:
    """Of a manager: "cpu" or "cuda"."""
    return "cpu" if _world is None else "cuda"


def books() -> str | None:
    """Of a manager that needs no pages on the CPU."""
    return None if _world is None else "cuda"


def few(all_of_them: Sequence[T], on_cuda: int) -> Sequence[T]:
    """All of them, or so many of them on CUDA."""
    return all_of_them if _world is None else all_of_them[:on_cuda]


def mover(**options: Any) -> Callable[[Any], Any]:
    """A manager's `mover`: takes the options, and has the test switches, of `CpuMover`.

    Of a simulation CUDA takes the seed, by which its streams go on, and whether they hurry.
    """
    if _world is None:
        return partial(CpuMover, **options)
    order, seed = options.pop("simulate", None) or ("", 1)
    options.pop("staging", None)
    _world.random.seed(f"{order} {seed}")
    _world.slow = order.endswith("-last")
    return partial(_cuda_mover, _world, {"engine_bytes": 24, **options})


def _cuda_mover(gpu: fake_cupy.World, options: dict[str, Any], pages: Any) -> SwitchedMover:
    pools = {}
    for name, (on_device, host) in pages.items():
        size = on_device.shape[1]
        pinned = None if host is None else _Pinned(host, size)
        pools[name] = CudaPool(size, on_device.data.ptr, len(on_device), pinned, on_device)
    return SwitchedMover(pools, CudaRuntime(0), gpu, **options)


class _Pinned(PinnedMemory):
    """The manager's pinned memory, as its array tells of it."""

    def __init__(self, pages: Any, page_bytes: int) -> None:
        self.array, self.address = pages.reshape(-1), pages.ctypes.data
        self.edges = chunk_edges(pages.nbytes, page_bytes, CHUNK_BYTES)


def mover_of(manager: KVCacheManager) -> Any:
    """The mover, with its test switches."""
    moves = manager._moves
    assert moves is not None
    assert isinstance(moves.mover, CpuMover if _world is None else SwitchedMover)
    return moves.mover

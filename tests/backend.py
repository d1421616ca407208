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

import numpy as np
import pytest

import fake_bindings
import fake_cupy
from any_path import AnyPath
from cpu_kernels import plain_kernels
from kvpool import CacheConfig, KVCacheManager, machine
from kvpool.mover import CpuMover
from kvpool.mover.cuda_runtime import CudaRuntime
from kvpool.mover.descriptors import CudaPool
from kvpool.mover.paths import Fixed
from kvpool.mover.pinned import CHUNK_BYTES, PinnedMemory, chunk_edges
from kvpool.mover.staging import PARTS
from kvpool.replay import options
from switched_mover import SwitchedMover

T = TypeVar("T")

SUITE = {
    "test_batches",
    "test_liveness",
    "test_lost",
    "test_manager",
    "test_model_random",
    "test_mover",
    "test_mover_random",
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

# Of a replay, what runs a manager: the rest is traces, arithmetic and plots.
OF_A_REPLAY = {
    "test_replay.test_every_whole_block_is_reused",
    "test_replay.test_hits_equal_a_plain_lru",
    "test_replay.test_runs_repeat",
    "test_replay.test_wrong_byte_stops_the_run",
    "test_timed.test_memory_running_out_on_both_tiers_frees_the_newest_and_everything_ends",
    "test_timed.test_memory_running_out_suspends_the_newest_and_everything_ends",
    "test_timed.test_windowed_pool_has_books_of_its_own",
    "test_timed.test_with_room_for_all_everything_that_was_seen_is_reused",
    "test_timed.test_without_a_tier_requests_start_only_if_they_fit_to_their_end",
    "test_timed.test_wrong_byte_ends_the_run_and_names_the_place",
    "test_timed.test_wrong_byte_of_a_page_that_nobody_reuses_is_found_at_the_end",
    "test_timed.test_wrong_byte_on_the_host_is_found_after_the_move",
}

# What of them runs on the CPU alone, by reason: "{module}.{test}". docs/MOVER.md has the same list.
WHY_NOT_ON_CUDA: dict[str, list[str]] = {
    "it says what is refused where there is no driver": ["test_manager.test_what_is_not_available_is_refused"],
    "it has no device": ["test_manager.test_books_only"],
    "it runs in a new process, where no stand-in is": [
        "test_manager.test_exit_with_open_caches_neither_hangs_nor_crashes",
        "test_manager.test_import_takes_no_extra",
    ],
    "it is about CPU memory that the caller hands over": [
        "test_manager.test_buffers_are_the_engines_memory",
        "test_mover.test_the_memory_stays_while_the_mover_lives_and_may_be_any_writable_array",
    ],
    "its movers copy by NumPy, which reads no GPU's memory": [
        "test_moves.test_any_mover_serves",
        "test_mover.test_the_simple_movers_have_the_same_interface",
    ],
    "CUDA's mover splits batches otherwise": [
        "test_mover.test_a_batch_of_any_length_is_split_into_driver_calls_of_at_most_4096_runs"
    ],
    "what a GPU was given cannot be taken back": ["test_mover.test_close_ends_everything_and_what_stands_still_fails"],
    "the switches are the tests' own there": ["test_mover.test_faults_are_for_movers_that_were_made_with_them"],
    "a page that fails leaves rubbish there": ["test_mover.test_pages_may_go_by_way_of_a_staging_buffer"],
    "there are no threads to end": ["test_mover.test_close_ends_all_threads_although_it_does_the_last_work_itself"],
    "CUDA does not survive a fork": [
        "test_mover.test_a_forked_child_closes_what_it_inherited_without_waiting_for_the_parents_threads"
    ],
}
NOT_ON_CUDA = {test: reason for reason, tests in WHY_NOT_ON_CUDA.items() for test in tests}

_world: fake_cupy.World | None = None
_kept: list[Any] = []  # memory of movers without a manager


def parameters(module: str, test: str) -> list[str]:
    """The devices on which a test runs."""
    name = f"{module}.{test}"
    return ["cpu", "cuda"] if name in OF_A_REPLAY or (module in SUITE and name not in NOT_ON_CUDA) else ["cpu"]


def enter_cuda(monkeypatch: pytest.MonkeyPatch) -> fake_cupy.World:
    """A GPU of the stand-in, as far as kvpool can see, until `monkeypatch` ends; for `leave_cuda` to forget."""
    global _world
    _world = fake_cupy.World(plain_kernels(), seed=1)
    for name, module in {"cupy": fake_cupy.make(_world), **fake_bindings.make(_world)}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(machine, "_cupy", lambda: "fake")
    monkeypatch.setattr(machine, "_driver", lambda: ("12.8", [machine.Gpu(0, "stand-in", 1 << 30, "9.0")], None))
    monkeypatch.setattr(machine, "nvrtc_release", lambda library: "12.9")
    monkeypatch.setattr(options, "KVCacheManager", _for_a_replay)
    return _world


def _for_a_replay(config: CacheConfig, device: str, **more: Any) -> KVCacheManager:
    assert device == "cpu"
    return KVCacheManager(config, "cuda", **more)


def leave_cuda() -> None:
    """Tests are on the CPU again."""
    global _world
    _world = None
    _kept.clear()


def device() -> str:
    """Of a manager: "cpu" or "cuda"."""
    return "cpu" if _world is None else "cuda"


def books() -> str | None:
    """Of a manager that needs no pages on the CPU."""
    return None if _world is None else "cuda"


def few(all_of_them: Sequence[T], on_cuda: int) -> Sequence[T]:
    """All of them, or so many of them on CUDA."""
    return all_of_them if _world is None else all_of_them[:on_cuda]


def page_arrays(device_slots: int, host_slots: int, page_bytes: int) -> tuple[Any, Any]:
    """Zeroed pages of both tiers for `mover(...)({pool: pages})`; on CUDA they live as long as the test."""
    if _world is None:
        return tuple(np.zeros((slots, page_bytes), np.uint8) for slots in (device_slots, host_slots))  # type: ignore[return-value]
    runtime = CudaRuntime(0)
    _kept.append(PinnedMemory(host_slots * page_bytes, page_bytes, runtime, threads=1))
    return runtime.zeros((device_slots, page_bytes))[0], _kept[-1].array.reshape(host_slots, page_bytes)


def mover(**given: Any) -> Callable[[Any], Any]:
    """A manager's `mover`: takes the options, and has the test switches, of `CpuMover`.

    Of a simulation CUDA takes the seed, by which its streams go on, and whether they hurry.
    """
    if _world is None:
        return partial(CpuMover, **given)
    order, seed = given.pop("simulate", None) or ("", 1)
    _world.random.seed(f"{order} {seed}")
    _world.slow = order.endswith("-last")
    return partial(_cuda_mover, _world, {"chooser": AnyPath(seed), **given})


def _cuda_mover(gpu: fake_cupy.World, given: dict[str, Any], pages: Any) -> SwitchedMover:
    """Pages take any path; with `staging` (pages of a part) all go by way of it that can."""
    pools, rows = {}, given.pop("staging", 0)
    if rows:
        given["chooser"] = Fixed("staged")
    for name, (on_device, host) in pages.items():
        size = on_device.shape[1]
        pinned = None if host is None else _Pinned(host, size)
        pools[name] = CudaPool(size, on_device.data.ptr, len(on_device), pinned, on_device)
    staging = PARTS * (rows or 2) * max(pool.page_bytes for pool in pools.values())
    return SwitchedMover(pools, CudaRuntime(0), gpu, staging_bytes=staging, **given)


class _Pinned(PinnedMemory):
    """The manager's pinned memory, as its array tells of it."""

    def __init__(self, pages: Any, page_bytes: int) -> None:
        self.array, self.address = pages.reshape(-1), pages.ctypes.data
        self.edges = chunk_edges(pages.nbytes, page_bytes, CHUNK_BYTES)
        self._registered = self.edges[:-1]


def mover_of(manager: KVCacheManager) -> Any:
    """The mover, with its test switches."""
    moves = manager._moves
    assert moves is not None
    assert isinstance(moves.mover, CpuMover if _world is None else SwitchedMover)
    return moves.mover

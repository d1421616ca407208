"""The CUDA calls under the stand-in for CuPy: its semantics first, then kvpool's runtime and the kernels through it."""

from __future__ import annotations

import gc
import importlib.util
import operator
import sys
import weakref
from collections.abc import Callable

import numpy as np
import pytest

import fake_cupy
import nvrtc
from cpu_kernels import plain_kernels
from fake_cupy import CUDARuntimeError, World
from kvpool import _core
from kvpool.machine import nvrtc_library
from kvpool.mover.cuda_runtime import OPTIONS, CudaRuntime
from kvpool.mover.launches import plan_launch
from kvpool.mover.pinned import PinnedMemory
from kvpool.mover.twins import TWINS


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[CudaRuntime, World]]:
    def make(seed: int = 0, **settings: int) -> tuple[CudaRuntime, World]:
        world = World(plain_kernels(), seed=seed, **settings)
        monkeypatch.setitem(sys.modules, "cupy", fake_cupy.make(world))
        return CudaRuntime(0), world

    return make


Start = Callable[..., tuple[CudaRuntime, World]]


def test_a_wait_binds_to_the_latest_record(start: Start) -> None:
    for seed in range(20):
        runtime, _ = start(seed)
        memory = runtime.allocate(3)
        for at, value in enumerate((1, 2, 3)):
            runtime.upload(np.array([value], np.uint8), memory.ptr + at)
        writer, reader, event = runtime.stream(), runtime.stream(), runtime.event()
        runtime.wait(reader, event)  # no record yet: holds nobody up
        runtime.copy_async(memory.ptr, memory.ptr + 1, 1, writer)
        runtime.record(event, writer)
        runtime.wait(reader, event)
        runtime.copy_async(memory.ptr, memory.ptr + 2, 1, reader)  # after the writer's, whatever the seed
        runtime.record(event, writer)  # too late for the reader's wait
        runtime.synchronize()
        assert runtime.download(memory.ptr, 1).tolist() == [3]


def test_without_a_wait_every_order_comes_up(start: Start) -> None:
    seen = set()
    for seed in range(20):
        runtime, _ = start(seed)
        memory = runtime.allocate(2)
        runtime.upload(np.array([1, 2], np.uint8), memory.ptr)
        runtime.copy_async(memory.ptr, memory.ptr + 1, 1, runtime.stream())
        runtime.copy_async(memory.ptr + 1, memory.ptr, 1, runtime.stream())
        runtime.synchronize()
        seen.add(tuple(runtime.download(memory.ptr, 2).tolist()))
    assert seen == {(2, 2), (1, 1)}


def test_events(start: Start) -> None:
    runtime, _ = start()
    event, begin, end, stream = runtime.event(), runtime.event(True), runtime.event(True), runtime.stream()
    assert runtime.is_done(event)  # never recorded
    memory = runtime.allocate(64)
    runtime.record(begin, stream)
    runtime.copy_async(memory.ptr, memory.ptr + 32, 32, stream)
    runtime.record(end, stream)
    while not runtime.is_done(end):
        pass
    assert runtime.elapsed_ms(begin, end) > 0


def test_memory_must_be_known_to_the_gpu_and_live_until_its_work_is_over(start: Start) -> None:
    runtime, world = start()
    stream, device, host = runtime.stream(), runtime.allocate(64), np.zeros(64, np.uint8)
    with pytest.raises(CUDARuntimeError, match="InvalidValue"):
        runtime.copy_async(device.ptr, host.ctypes.data, 64, stream)  # not registered
    with pytest.raises(CUDARuntimeError, match="InvalidValue"):
        runtime.copy_async(device.ptr, device.ptr, 65, stream)
    other = runtime.allocate(64)
    runtime.copy_async(device.ptr, other.ptr, 64, stream)
    del other
    with pytest.raises(CUDARuntimeError, match="given back before it ran"):
        runtime.synchronize()
    with pytest.raises(CUDARuntimeError, match="given back before it ran"):
        runtime.stream()  # a fault is sticky
    assert world.fault is not None


def test_an_upload_is_there_when_it_returns(start: Start) -> None:
    """CUDA's own copy of pageable memory need not be, for a stream that does not wait for the null stream."""
    runtime, world = start()
    memory, stream, data = runtime.allocate(2), runtime.stream(), np.array([7], np.uint8)
    runtime.upload(np.array([1, 2], np.uint8), memory.ptr)
    fake_cupy.Runtime(world).memcpy(memory.ptr, data.ctypes.data, 1, 4)
    runtime.copy_async(memory.ptr + 1, memory.ptr, 1, stream)
    stream.synchronize()
    assert runtime.download(memory.ptr, 2).tolist() == [7, 1]  # the stream was faster
    runtime.upload(data, memory.ptr)
    runtime.copy_async(memory.ptr + 1, memory.ptr, 1, stream)
    stream.synchronize()
    assert runtime.download(memory.ptr, 2).tolist() == [7, 7]


def test_a_fault_is_sticky(start: Start) -> None:
    runtime, _ = start(fault_at=0)
    stream, memory = runtime.stream(), runtime.allocate(64)
    runtime.copy_async(memory.ptr, memory.ptr + 32, 32, stream)
    for call in (runtime.synchronize, runtime.stream, runtime.event, lambda: runtime.allocate(1)):
        with pytest.raises(RuntimeError, match="IllegalAddress"):
            call()


@pytest.mark.parametrize("page_bytes", [16, 4096, 333])
@pytest.mark.parametrize("operation", ["copy_pages", "copy_ring"])
def test_kernels_between_pinned_memory_and_the_device(start: Start, operation: str, page_bytes: int) -> None:
    """Out and back through other slots, the lists in pinned memory too: every byte as the twins say."""
    runtime, world = start(seed=page_bytes)
    random = np.random.default_rng(page_bytes)
    n, slots = 30, 64
    with (
        PinnedMemory(slots * page_bytes, page_bytes, runtime) as host,
        PinnedMemory(4 * 4096, 4096, runtime) as descriptors,
    ):
        lists = descriptors.array.view(np.int32).reshape(4, -1)[:, :n]
        for row in range(4):
            lists[row] = random.permutation(slots)[:n]
        device, stream = runtime.allocate(slots * page_bytes), runtime.stream()
        content = random.integers(0, 256, slots * page_bytes, np.uint8)
        runtime.upload(content, device.ptr)
        sizes = np.int64(page_bytes), np.int32(n)
        expected = host.array.copy()
        for source, target, at in ((device.ptr, host.address, 0), (host.address, device.ptr, 2)):
            launch = plan_launch(operation, (source, target), page_bytes, n, max_blocks=5)
            assert launch is not None
            src_slots, dst_slots = (lists[row].ctypes.data for row in (at, at + 1))
            runtime.launch(launch, (source, target, src_slots, dst_slots, *sizes), stream)
        stream.synchronize()
        TWINS["copy_pages_u8"](content, expected, lists[0], lists[1], page_bytes, n)
        assert np.array_equal(host.array, expected)
        TWINS["copy_pages_u8"](expected, content, lists[2], lists[3], page_bytes, n)
        assert np.array_equal(runtime.download(device.ptr, content.size), content)
    assert len(world.launches) == 2
    assert world.registered == {}


def test_gathered_pages_go_as_one_copy(start: Start) -> None:
    runtime, world = start()
    page_bytes, slots = 512, np.array([5, 2, 7], np.int32)
    with PinnedMemory(8 * page_bytes, page_bytes, runtime) as host:
        pool, staging = runtime.allocate(8 * page_bytes), runtime.allocate(3 * page_bytes)
        list_of = runtime.allocate(slots.nbytes)
        content = np.random.default_rng(0).integers(0, 256, (8, page_bytes), np.uint8)
        runtime.upload(content, pool.ptr)
        runtime.upload(slots, list_of.ptr)
        stream = runtime.stream()
        for operation, source, target in (
            ("gather_pages", pool.ptr, staging.ptr),
            ("", staging.ptr, host.address),
            ("", host.address, staging.ptr),
            ("scatter_pages", staging.ptr, pool.ptr),
        ):
            if operation:
                launch = plan_launch(operation, (source, target), page_bytes, 3, max_blocks=2)
                assert launch is not None
                runtime.launch(launch, (source, target, list_of.ptr, np.int64(page_bytes), np.int32(3)), stream)
            else:
                runtime.copy_async(target, source, 3 * page_bytes, stream)
        stream.synchronize()
        assert np.array_equal(host.array[: 3 * page_bytes], content[slots].ravel())
        assert np.array_equal(runtime.download(pool.ptr, content.size), content.ravel())
    assert world.launches == ["gather_pages_u128", "scatter_pages_u128"]


def test_a_launch_takes_numbers_of_the_kernels_own_types(start: Start) -> None:
    runtime, _ = start()
    memory, stream = runtime.allocate(64), runtime.stream()
    launch = plan_launch("gather_pages", (memory.ptr, memory.ptr), 16, 1, 1)
    assert launch is not None
    with pytest.raises(AssertionError, match="for int"):  # eight bytes where the kernel reads four
        runtime.launch(launch, (memory.ptr, memory.ptr, memory.ptr, 16, 1), stream)


def test_a_gpu_that_is_not_there(start: Start) -> None:
    start()
    with pytest.raises(RuntimeError, match="InvalidDevice"):
        CudaRuntime(1)


def test_registration_goes_through_the_runtime(start: Start) -> None:
    runtime, world = start(pinned_limit=3 << 20)
    with pytest.raises(MemoryError, match=r"cudaErrorMemoryAllocation.*after 2097152 of 4194304 bytes"):
        PinnedMemory(4 << 20, 4096, runtime, chunk_bytes=1 << 21)
    assert world.registered == {}


@pytest.mark.parametrize("name", _core.kernel_names())
def test_kernels_compile_with_the_options_that_cupy_adds(name: str) -> None:
    library = nvrtc_library()
    if library is None:
        pytest.skip("no NVRTC (package nvidia-cuda-nvrtc-cu12): no kernel can be compiled")
    added = ("-ftz=true", "--device-as-default-execution-space")  # of CuPy 14.2's compiler.py
    done = nvrtc.compile_cubin(library, _core.kernel_source(name), "sm_90", (*OPTIONS, *added))
    assert done.result == 0, done.log
    assert "warning" not in done.log, done.log


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy (kvpool[cuda]) is not installed")
def test_the_stand_in_has_nothing_that_cupy_lacks() -> None:
    import cupy

    fake = fake_cupy.make(World(plain_kernels()))
    names = ("RawModule", "ones", "zeros", "ndarray", "from_dlpack", "matmul")
    for name in (*names, *(f"cuda.{name}" for name in vars(fake.cuda))):
        assert operator.attrgetter(name)(cupy) is not None
    for kind, real in ((fake_cupy.Stream, cupy.cuda.Stream), (fake_cupy.Event, cupy.cuda.Event)):
        assert not {name for name in vars(kind) if not name.startswith("_")} - set(dir(real)), kind
    assert not {n for n in vars(fake_cupy.Runtime) if not n.startswith("_")} - set(dir(cupy.cuda.runtime))
    assert cupy.cuda.runtime.memcpyDefault == fake_cupy.Runtime.memcpyDefault
    assert {"use", "synchronize", "compute_capability", "id", "__enter__"} <= set(dir(cupy.cuda.Device))
    assert {"type", "device"} <= set(dir(cupy.cuda.runtime.PointerAttributes))


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy (kvpool[cuda]) is not installed")
def test_somebody_elses_memory_is_an_array_that_keeps_its_owner() -> None:
    """CuPy needs no driver for it."""
    import cupy

    class Owner:
        pass

    owner = Owner()
    kept = weakref.ref(owner)
    block = cupy.cuda.UnownedMemory(1 << 30, 9 * 64, owner, 0)
    array = cupy.ndarray((9, 64), np.uint8, cupy.cuda.MemoryPointer(block, 0))
    del owner, block
    gc.collect()
    assert kept() is not None
    assert (array.shape, array.dtype, array.data.ptr) == ((9, 64), np.uint8, 1 << 30)
    del array
    gc.collect()
    assert kept() is None

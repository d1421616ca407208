"""What a manager does on device="cuda" alone, under the stand-in for CuPy: whose memory its pages are.

The suite of the CPU backend runs there too: backend.py.
"""

from __future__ import annotations

import ast
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backend
import fake_cupy
from kvpool import (
    CacheConfig,
    ConfigError,
    Engine,
    KVCacheManager,
    PoolConfig,
    Request,
    Scheduler,
    SchedulerConfig,
    Step,
)
from kvpool.mover import BooksMover, CpuMover, pinned
from kvpool.mover.cuda import CudaMover
from kvpool.mover.cuda_runtime import CudaRuntime

PAGE = 64
CONFIG = CacheConfig(4, [PoolConfig("kv", PAGE)], device_bytes=PAGE * 9, host_bytes=PAGE * 8)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> fake_cupy.World:
    return backend.enter_cuda(monkeypatch)


def zeros(rows: int = 9, gpu: int = 0) -> Any:
    """CuPy's array of so many pages."""
    return CudaRuntime(gpu).zeros((rows, PAGE))[0]


def run(manager: KVCacheManager, number: int, size: int = 16) -> Any:
    """A request that writes its number into its pages, as a kernel would."""
    tokens = np.arange(100 * number, 100 * number + size, dtype=np.int32)
    cache = manager.create(number, tokens)
    assert cache.resume()
    assert cache.resize(size)
    manager.pages("kv")[manager.block_tables([cache], "kv")[0]] = number + 1
    cache.commit(tokens)
    return cache


def moves_of_a_small_pool(manager: KVCacheManager, world: fake_cupy.World) -> None:
    """More than the device holds: pages go down and come up by the real kernels, each with its bytes."""
    for number in range(3):
        run(manager, number).close()
    assert manager.stats().offloaded == 4
    again = manager.create("again", np.arange(17, dtype=np.int32))
    assert again.num_reused_tokens == 16
    assert again.resume()
    slots = manager.block_tables([again], "kv")[0]
    assert (np.asarray(manager.pages("kv"))[slots[:4]] == 1).all()
    again.close()
    manager.check()
    assert "copy_pages_u128" in world.launches


def test_pages_are_the_devices_and_the_hosts_are_pinned(gpu: fake_cupy.World) -> None:
    with KVCacheManager(CONFIG, device="cuda") as manager:
        assert isinstance(manager.pages("kv"), fake_cupy.DeviceArray)
        assert manager.pages("kv").shape == (9, PAGE)
        assert manager.pages("kv", "host").shape == (8, PAGE)
        assert len(gpu.registered) == 2  # the host's pages, and the mover's descriptors
        moves_of_a_small_pool(manager, gpu)
    assert gpu.registered == {}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_mover_of_ones_own_is_made_from_the_pages_on_every_device(device: str, gpu: fake_cupy.World) -> None:
    seen: list[Any] = []
    with KVCacheManager(CONFIG, device, mover=lambda pages: seen.append(pages) or BooksMover()) as manager:
        assert isinstance(manager._moves.mover, BooksMover)  # type: ignore[union-attr]
        ((on_device, host),) = seen[0].values()
        assert on_device is manager.pages("kv")
        assert np.shares_memory(host, manager.pages("kv", "host"))
    with KVCacheManager(CONFIG, device) as manager:
        assert isinstance(manager._moves.mover, CpuMover if device == "cpu" else CudaMover)  # type: ignore[union-attr]


@pytest.mark.parametrize("after", range(0, 40, 3))
def test_when_the_gpu_is_at_its_end_an_engine_ends_its_requests_and_the_manager_closes(
    after: int, gpu: fake_cupy.World, capfd: pytest.CaptureFixture[str]
) -> None:
    class Executor:
        """Computes nothing: it would go on for ever."""

        def execute(self, step: Step) -> dict[Any, list[int]]:
            due = [chunk.request for chunk in step.context if chunk.is_last] + step.generation
            return {request.request_id: [7] for request in due}

    with KVCacheManager(CONFIG, device="cuda") as manager:
        gpu.fault_at = gpu.ran + after
        scheduler = Scheduler(manager, SchedulerConfig(4, 64))
        scheduler.outlook.expect(0.0)
        engine = Engine(scheduler, Executor())
        for number in range(6):  # prefixes that end inside a block are copied, and some pages go down
            engine.submit(Request(number, [*range(10), 50 + number], 12))
        ended = engine.run()
        assert len(ended) == 6
        for request in ended.values():
            assert request.error is None or "IllegalAddress" in str(request.error)
        assert (gpu.fault is not None) == any(request.error for request in ended.values())
        assert not manager._caches
    gc.collect()
    assert capfd.readouterr().err == ""


def test_host_pages_are_on_the_numa_node_that_is_asked_for(
    gpu: fake_cupy.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(pinned, "_bind", lambda address, num_bytes, node: asked.append((address, num_bytes, node)))
    with KVCacheManager(CONFIG, "cuda", numa_node=3) as manager:
        address = manager.pages("kv", "host").ctypes.data
        assert asked == [(address, PAGE * 8, 3)]
    with KVCacheManager(CONFIG, "cuda"):
        assert len(asked) == 1


def test_a_numa_node_that_cannot_be_had_is_a_config_error(gpu: fake_cupy.World) -> None:
    with pytest.raises(ConfigError, match=r"^numa_node: .*1000"):
        KVCacheManager(CONFIG, "cuda", numa_node=1000)
    assert gpu.registered == {}
    for device in ("cpu", None):
        with pytest.raises(ConfigError, match=r"^numa_node: 0 is for the pinned host memory of a GPU"):
            KVCacheManager(CONFIG, device, numa_node=0)


# -- buffers ------------------------------------------------------------------------------------------


class Exporter:
    """GPU memory of another library: through `__cuda_array_interface__`, as `changes` has it."""

    def __init__(self, array: Any, **changes: Any) -> None:
        self.array = array
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, **changes}


class Dlpack:
    """GPU memory of another library, through DLPack alone."""

    def __init__(self, array: Any, place: tuple[int, int] = (2, 0), error: Exception | None = None) -> None:
        self.array, self.place, self.error = array, place, error

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.place

    def __dlpack__(self, *, stream: int) -> Any:
        if self.error is not None:
            raise self.error
        return self.array.view(np.ndarray).__dlpack__()


FORMS: dict[str, Callable[[Any], Any]] = {
    "CuPy": lambda array: array,
    "CuPy, another shape and type": lambda array: array.view(np.float16).reshape(3, 3, 2, 16),
    "interface": Exporter,
    "interface of a type that NumPy lacks": lambda array: Exporter(array, typestr="<V2", shape=(9, PAGE // 2)),
    "interface with strides": lambda array: Exporter(array, strides=(PAGE, 1)),
    "interface with a stride of one row": lambda array: Exporter(array, shape=(1, 9 * PAGE), strides=(7, 1)),
    "DLPack": Dlpack,
}


@pytest.mark.parametrize("form", FORMS)
def test_buffers_are_the_engines_memory_never_copied_and_never_freed(form: str, gpu: fake_cupy.World) -> None:
    memory = zeros()
    memory[:] = 77
    kept = weakref.ref(memory)
    address = memory.data.ptr
    with KVCacheManager(CONFIG, device="cuda", buffers={"kv": FORMS[form](memory)}) as manager:
        pages = manager.pages("kv")
        assert (pages.shape, pages.dtype, pages.data.ptr) == ((9, PAGE), np.uint8, address)
        assert not memory[0].any()  # the null page
        assert (memory[1:] == 77).all()
        assert sum(size == 9 * PAGE for size in gpu.ranges.values()) == 1, "the manager allocated besides"
        assert len(gpu.registered) == 2  # the host tier is the manager's own
        del memory
        gc.collect()
        assert gpu.covers(address, 9 * PAGE), "the manager does not keep the memory alive"
        moves_of_a_small_pool(manager, gpu)
        memory = kept()
    gc.collect()
    if memory is not None:  # the engine still has it
        del manager, pages
        gc.collect()
        assert gpu.covers(address, 9 * PAGE)
        memory[:] = 3
        assert (memory == 3).all()


def test_the_null_page_is_zeroed_behind_what_the_engine_has_launched(gpu: fake_cupy.World) -> None:
    memory = zeros()
    stream = fake_cupy.Stream(gpu, non_blocking=True)
    gpu.give(stream, fake_cupy.Work(lambda: memory.fill(9)))
    with KVCacheManager(CONFIG, device="cuda", buffers={"kv": memory}) as manager:
        assert not memory[0].any()
        assert (memory[1:] == 9).all()
        manager.check()


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "a list": (lambda: [0] * 9, "a list is no array of GPU memory"),
    "CPU memory": (lambda: np.zeros((9, PAGE), np.uint8), r"ndarray is not in GPU memory \(DLPack device 1, 0\); give"),
    "pinned memory": (lambda: Dlpack(zeros(), (3, 0)), "DLPack device 3, 0"),
    "too few pages": (lambda: zeros(8), r"512 bytes, but 9 pages \(num_slots \+ 1\) of 64 bytes need 576"),
    "too many pages": (lambda: zeros(10), "640 bytes, but 9 pages"),
    "gaps": (lambda: zeros(18)[::2], r"C-contiguous; its shape is \(9, 64\), its strides are \(128, 1\)"),
    "another order": (lambda: Exporter(zeros(), strides=(1, 9)), "C-contiguous; its shape"),
    "read-only": (lambda: Exporter(zeros(), data=(1 << 20, True)), "writable.*it is read-only"),
    "a mask": (lambda: Exporter(zeros(), mask=zeros()), "it has a mask"),
    "not aligned": (lambda: zeros(10).reshape(-1)[8 : 8 + 9 * PAGE], "is no multiple of 16; give memory that begins"),
    "an address of nobody": (lambda: Exporter(zeros(), data=(1 << 20, False)), "0x100000 is no GPU memory; device="),
    "another GPU": (lambda: zeros(gpu=1), "is memory of GPU 1; device='cuda' needs memory of GPU 0"),
    "another GPU behind DLPack": (lambda: Dlpack(zeros(gpu=1), (2, 1)), "is memory of GPU 1"),
    "a type that CuPy lacks": (
        lambda: Dlpack(zeros(), error=NotImplementedError("bfloat16")),
        r"NotImplementedError: bfloat16\); give it as bytes .*view\(torch.uint8\)",
    ),
    "a broken interface": (lambda: Exporter(zeros(), typestr="no type"), "cannot be read .* give it as bytes"),
}  # fmt: skip


class Gradient:
    """As a tensor that wants a gradient: asking for the interface raises."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raise RuntimeError("requires grad")


BAD["an interface that raises"] = (Gradient, r"RuntimeError: requires grad\); give it as bytes")


@pytest.mark.parametrize("what", BAD)
def test_buffers_that_cannot_serve_are_refused_with_field_value_and_remedy(what: str, gpu: fake_cupy.World) -> None:
    gpu.devices = 2
    make, message = BAD[what]
    with pytest.raises(ConfigError, match=message) as refused:
        KVCacheManager(CONFIG, device="cuda", buffers={"kv": make()})
    assert str(refused.value).startswith("buffers['kv']: ")
    del refused
    gc.collect()
    assert gpu.registered == {}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_buffers_of_two_pools_must_not_overlap(device: str, gpu: fake_cupy.World) -> None:
    config = CacheConfig(4, [PoolConfig("a", PAGE), PoolConfig("b", PAGE)], device_bytes=PAGE * 18)
    memory = zeros(20) if device == "cuda" else np.zeros((20, PAGE), np.uint8)
    with KVCacheManager(config, device, buffers={"b": memory[:9], "a": memory[9:18]}) as manager:
        manager.check()
    with pytest.raises(ConfigError, match=r"buffers\['b'\]: begins at 0x.* inside the memory of pool 'a' \(576 bytes"):
        KVCacheManager(config, device, buffers={"a": memory[:9], "b": memory[8:17]})
    with pytest.raises(ConfigError, match="unknown pool 'c'"):
        KVCacheManager(config, device, buffers={"c": memory[:9]})
    with KVCacheManager(config, device, buffers={"a": memory[:9]}) as manager:  # one of them
        assert manager.pages("b").shape == (9, PAGE)


# -- the suite ----------------------------------------------------------------------------------------


def test_what_of_the_suite_runs_on_the_cpu_alone_is_in_the_document_with_its_reason() -> None:
    document = (Path(__file__).parents[1] / "docs" / "MOVER.md").read_text()
    for reason, tests in backend.WHY_NOT_ON_CUDA.items():
        assert all(test.split(".")[0] in backend.SUITE for test in tests)
        names = ", ".join(f"`{test.split('.')[1]}`" for test in tests)
        assert f"| {reason} | {names} |" in document


def test_the_suite_runs_on_both_devices_and_other_tests_on_the_cpu(device: str) -> None:
    assert device == backend.device() == "cpu"
    for module in backend.SUITE:
        assert backend.parameters(module, "test_anything") == ["cpu", "cuda"]
    assert backend.parameters("test_sizing", "test_anything") == ["cpu"]
    for name in [*backend.OF_A_REPLAY, *backend.NOT_ON_CUDA]:
        module, test = name.split(".")
        tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text())
        assert any(isinstance(each, ast.FunctionDef) and each.name == test for each in tree.body), name

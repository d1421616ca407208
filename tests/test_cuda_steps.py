"""Steps of an engine on a CUDA stream: the stream waits on the device, the host for nothing, and no byte is wrong.

In these worlds the GPU does nothing until somebody waits for it, and whoever waits where he should not fails.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import fake_cupy
from any_path import AnyPath
from cpu_kernels import plain_kernels
from cuda_movers import CudaWorld, EngineStream, stand_ins
from kvpool import (
    CacheConfig,
    CacheState,
    Engine,
    KVCacheManager,
    KVPoolError,
    LogicError,
    PoolConfig,
    Request,
    Scheduler,
    SchedulerConfig,
    machine,
)
from kvpool.mover import MoveBatch, SlotUse
from kvpool.mover.paths import PATHS, Fixed

T, PAGE = 4, 64


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_cupy.World]:
    """A machine with one GPU that works only for those who wait; moves take any path."""
    world = fake_cupy.World(plain_kernels(), seed=3, lazy=True)
    monkeypatch.setattr(machine, "check_cuda", lambda device: None)
    monkeypatch.setattr("kvpool.mover.cuda_memory.chooser_for", lambda ordinal: AnyPath(5))
    with stand_ins(world):
        yield world


@contextlib.contextmanager
def without_waiting(gpu: fake_cupy.World, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody waits for the GPU, in whatever way, and it does nothing."""

    def sleep(seconds: float) -> None:
        raise AssertionError("the host waits for the GPU")

    ran = gpu.ran
    gpu.waiting = False
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", sleep)
        yield
    gpu.waiting = True
    assert gpu.ran == ran


@pytest.mark.parametrize("path", PATHS)
def test_step_begin_and_step_end_of_the_mover_never_block(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = CudaWorld(2, page_bytes=48, options={"lazy": True, "chooser": Fixed(path)})
    stream = world.engine[1]
    assert isinstance(stream, EngineStream)
    uses = [SlotUse("full", "device", [1, 2, 3], True)]
    with without_waiting(world.gpu, monkeypatch):
        for _ in range(3):
            world.mover.submit(MoveBatch("full", "offload", [1, 2, 3], [4, 5, 6]))
            world.mover.submit(MoveBatch("full", "onboard", [5, 6, 4], [1, 2, 3]))
            world.mover.submit(MoveBatch("full", "copy", [1, 2], [7, 8]))
            assert world.mover.step_begin(uses, stream)
            stream.launch(lambda: None)
            world.mover.step_end(uses, stream)
    with pytest.raises(AssertionError, match="host waits"), without_waiting(world.gpu, monkeypatch):
        world.mover.step_begin(uses, None)  # the caller itself
    world.gpu.waiting = True
    world.mover.close()


def config(**more: Any) -> CacheConfig:
    return CacheConfig(T, [PoolConfig("kv", PAGE)], device_bytes=PAGE * 9, host_bytes=PAGE * 16, **more)


def fill(manager: KVCacheManager, number: int, stream: EngineStream) -> None:
    """16 tokens whose pages say which they are, computed behind `step_end`, committed and closed."""
    tokens = np.arange(100 * number, 100 * number + 16, dtype=np.int32)
    cache = manager.create(number, tokens)
    assert cache.resume()
    assert cache.resize(16)
    manager.step_begin([cache], stream)
    slots, pages = manager.block_tables([cache], "kv")[0], manager._pages["kv"]

    def compute() -> None:
        for index, slot in enumerate(slots):
            pages[slot] = 10 * number + index

    stream.launch(compute)
    manager.step_end([cache], stream)
    cache.commit(tokens)
    cache.close()


def test_a_managers_step_on_a_stream_waits_on_the_device_alone(
    gpu: fake_cupy.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with KVCacheManager(config(), device="cuda", move_timeout_s=None) as manager:
        assert manager._moves is not None
        stream = EngineStream(gpu, non_blocking=True)
        for number in range(3):  # more than the device holds: pages go down
            fill(manager, number, stream)
        assert manager.stats().offloaded > 0
        again = manager.create("again", np.arange(17, dtype=np.int32))
        assert again.num_reused_tokens == 16
        assert again.resume()  # pages come up
        assert again.resize(17)
        assert manager._moves.flying
        seen: list[Any] = []
        with without_waiting(gpu, monkeypatch):
            manager.step_begin([again], stream)
            slots = manager.block_tables([again], "kv")[0]
            indptr, indices, _ = manager.block_tables_csr([again], "kv")
            stream.launch(lambda: seen.append(np.asarray(manager._pages["kv"])[slots[:4]].copy()))
            manager.step_end([again], stream)
        assert indices[: indptr[1]].tolist() == slots.tolist()
        assert not seen
        stream.synchronize()
        assert [page.tolist() for page in seen[0]] == [[index] * PAGE for index in range(4)]
        assert not again.commit([*range(16), 16][16:])  # waits for the moves, and finds them good
        assert again.state is CacheState.ACTIVE
        again.close()
        manager.check()
        paths = manager.stats().paths
        assert sum(of["moves"] for path in paths.values() for of in path.values()) > 2
        assert (
            sum(path["offload"]["pages"] for path in paths.values() if "offload" in path) == manager.stats().offloaded
        )


def test_a_fault_of_the_gpu_is_known_when_the_tokens_are_to_be_final(gpu: fake_cupy.World) -> None:
    """`step_begin` on a stream does not wait, so it cannot know; nothing becomes final all the same."""
    with KVCacheManager(config(), device="cuda", move_timeout_s=None) as manager:
        stream = EngineStream(gpu, non_blocking=True)
        for number in range(3):
            fill(manager, number, stream)
        again = manager.create("again", np.arange(17, dtype=np.int32))
        assert again.resume()
        assert again.resize(17)
        gpu.fault_at = gpu.ran + 1
        manager.step_begin([again], stream)
        assert again.state is CacheState.ACTIVE
        with pytest.raises(RuntimeError, match="IllegalAddress"):
            stream.synchronize()
        assert manager.lost() == ["again"]
        assert again.state is CacheState.LOST
        manager.block_tables([again], "kv")  # the step is on its way: what it yields is discarded
        manager.step_end([again], stream)
        with pytest.raises(LogicError, match="LOST"):
            again.commit([16])
        with pytest.raises(LogicError, match="LOST"):
            manager.block_tables([again], "kv")
        with pytest.raises(KVPoolError, match="GPU is at its end"):
            manager.step_begin([again], stream)
        again.close()


def test_a_fifth_stream_is_refused_before_anything_is_launched(gpu: fake_cupy.World) -> None:
    """Also before the first step has ended: until then nothing is looked for on the others' streams."""
    with KVCacheManager(config(), device="cuda", move_timeout_s=None) as manager:
        cache = manager.create("x", np.arange(3, dtype=np.int32))
        assert cache.resume()
        assert cache.resize(3)
        streams = [EngineStream(gpu, non_blocking=True) for _ in range(5)]
        for stream in streams[:4]:
            manager.step_begin([cache], stream)
        for wrong, why in ((streams[4], "knows 4 streams"), ("x", "none of CuPy's")):
            with pytest.raises(ValueError, match=why):
                manager.step_begin([cache], wrong)
        assert len(cache._uses) == 4
        for stream in streams[:4]:
            manager.step_end([cache], stream)
        for wrong in (streams[4], "x"):
            with pytest.raises(LogicError, match="without step_begin"):
                manager.step_end([cache], wrong)
        manager.step_begin([cache])  # on none, the caller waits
        manager.step_end([cache])
        cache.close()
        assert not manager._caches  # it was in no other step
        manager.check()


def test_an_engine_on_a_stream_waits_for_moves_in_update_alone(
    gpu: fake_cupy.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many requests in little memory: every page that a step reads is verified when the stream gets there."""
    stream = EngineStream(gpu, non_blocking=True)
    checked: list[int] = []

    class Executor:
        def __init__(self, manager: KVCacheManager) -> None:
            self.manager, self.stream = manager, stream

        def execute(self, step: Any) -> dict[Any, list[int]]:
            with without_waiting(gpu, monkeypatch):
                work = [self.plan(chunk.request, chunk.start, chunk.num_tokens) for chunk in step.context]
                work += [self.plan(request, request.num_computed, 1) for request in step.generation]
                stream.launch(lambda: [run() for run in work])
            stream.synchronize()  # to sample
            due = [chunk.request for chunk in step.context if chunk.is_last] + step.generation
            return {request.request_id: [len(request.output_tokens)] for request in due}

        def plan(self, request: Any, start: int, count: int) -> Any:
            cache = self.manager.cache(request.request_id)
            slots, pages = self.manager.block_tables([cache], "kv")[0], self.manager._pages["kv"]
            words = [*request.tokens, *request.output_tokens]

            def run() -> None:
                for position in range(start):
                    checked.append(position)
                    assert pages[slots[position // T]][position % T] == words[position] % 251, request.request_id
                for position in range(start, start + count):
                    pages[slots[position // T]][position % T] = words[position] % 251

            return run

    with KVCacheManager(config(), device="cuda", move_timeout_s=None) as manager:
        scheduler = Scheduler(manager, SchedulerConfig(max_batch_size=4, max_num_tokens=32, chunk_tokens=8))
        engine = Engine(scheduler, Executor(manager))
        begin = manager.step_begin

        def begun(*given: Any) -> None:
            with without_waiting(gpu, monkeypatch):
                begin(*given)

        monkeypatch.setattr(manager, "step_begin", begun)
        for number in range(12):
            engine.submit(Request(number, [number % 3] * 4 + list(range(number, number + 9)), max_new_tokens=6))
        ended = engine.run()
        assert len(ended) == 12
        assert all(request.output_tokens == list(range(6)) for request in ended.values())
        stats = manager.stats()
        assert stats.offloaded > 0
        assert stats.onboarded > 0
        assert len(checked) > 500
        manager.check()

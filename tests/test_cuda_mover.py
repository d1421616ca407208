"""CudaMover, every line of it but the driver: under the stand-in for CuPy, with the real kernels and planted bugs."""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import fake_cupy
from cuda_movers import CudaWorld, fake_gpu, view
from kvpool import InvariantError, LogicError
from kvpool.mover import MoveBatch, MoveError, Mover, SlotUse
from kvpool.mover.cuda import CudaMover
from kvpool.mover.descriptors import SLAB, CudaPool
from kvpool.mover.paths import PATHS, Fixed, Thresholds
from kvpool.mover.pinned import PinnedMemory
from kvpool.mover.slot_events import DIRECTIONS
from kvpool.mover.staging import PARTS
from movers import PAGE_BYTES, World, page
from test_mover_checker import PLANTS

KERNELS = {24: {"copy_pages_u8", "gather_pages_u8", "scatter_pages_u8"}}
KERNELS[48] = {"copy_pages_u128", "copy_ring_u128", "gather_pages_u128", "scatter_pages_u128"}


@pytest.mark.parametrize("page_bytes", KERNELS)
@pytest.mark.parametrize("seed", range(5))
def test_every_byte_is_right_after_random_operations(seed: int, page_bytes: int) -> None:
    """Every path that pages of this size can take, one after the other as the seed says."""
    world = CudaWorld(seed, page_bytes=page_bytes)
    world.run(500, every=100)  # a finding of the checker raises, a wrong byte fails
    assert world.checked > 500
    counts = world.mover.path_counts()
    assert set(counts) == {path for path in PATHS if path != "ring" or page_bytes == 48}
    for path, of in counts.items():
        assert set(of) == set(DIRECTIONS[:2] if path == "staged" else DIRECTIONS)
    assert set(world.gpu.launches) == KERNELS[page_bytes]
    assert world.gpu.batches
    world.mover.close()


@pytest.mark.parametrize("path", PATHS)
def test_every_path_alone_keeps_every_byte(path: str) -> None:
    world = CudaWorld(7, page_bytes=48, options={"chooser": Fixed(path, 2)})
    world.run(400, every=100)
    counts = world.mover.path_counts()
    assert set(counts) == {path, "registers"} if path == "staged" else {path}  # a device copy needs no staging
    world.mover.close()


def test_what_the_checker_found_is_raised_by_one_thread_alone() -> None:
    """Both have looked before one of them takes it."""
    world, both = CudaWorld(1), threading.Barrier(2)
    looked = threading.local()

    class Watched(CudaMover):
        kept = ("unordered: it",)

        @property
        def _findings(self) -> tuple[str, ...]:  # type: ignore[override]
            found = self.kept
            if not hasattr(looked, "once"):
                looked.once = True
                both.wait(10)
            return found

        @_findings.setter
        def _findings(self, found: list[str]) -> None:
            self.kept = (*found,)

    world.mover.__class__ = Watched
    raised = []

    def check() -> None:
        try:
            world.mover._checked()  # type: ignore[attr-defined]
        except InvariantError as error:
            raised.append(str(error))

    threads = [threading.Thread(target=check) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised == ["unordered: it"]
    world.mover.close()


def _can_show(plant: str, path: str) -> bool:
    """Only some paths have staging memory, or lists of slots."""
    if plant == "staging-reuse":
        return path == "staged"
    return plant != "descriptor-rewrite" or path not in ("engine", "batch")


CASES = [(*each, path) for each in PLANTS for path in PATHS if _can_show(each[0], path)]


@pytest.mark.parametrize(
    ("plant", "scenario", "text", "path"), CASES, ids=[f"{scenario.__name__}-{path}" for _, scenario, _, path in CASES]
)
def test_a_planted_bug_is_named_by_the_checker(
    plant: str, scenario: Callable[[World], None], text: str, path: str
) -> None:
    """Whatever path the moves take."""
    options = {"chooser": Fixed(path), "staging_bytes": PARTS * 48}  # three pages need a part of staging memory twice
    world = CudaWorld(1, page_bytes=48, options={**options, "plant": plant, "lazy": True})
    if plant == "descriptor-rewrite":
        text = "descriptors are rewritten"
    text = re.sub(r"compute stream \d", "compute stream 1", text)  # places of a stream count its steps
    text = text.replace("copy 2 writes staging", "gather 3 writes staging")
    if path == "staged":  # the page is read by the gather, not by what sends it
        text = re.sub(r"offload 1 reads device", "gather 1 reads device", text)
        text = re.sub(r"(writes device slot 1 .*) offload 1", r"\1 gather 1", text)
    with pytest.raises(InvariantError, match=f"{plant}: {text}"):
        scenario(world)
    clean = CudaWorld(1, page_bytes=48, options=options)
    scenario(clean)
    clean.settle()
    clean.mover.close()


@pytest.mark.parametrize("plant", sorted({name for name, _, _ in PLANTS}))
def test_a_planted_bug_is_a_wrong_byte_for_some_seed(plant: str) -> None:
    """The stand-in's orders are adverse enough, without the checker."""
    for seed in range(40):
        path = "staged" if plant == "staging-reuse" else "registers"
        world = CudaWorld(seed, options={"plant": plant, "check": False, "chooser": Fixed(path)})
        try:
            world.run(200)
        except AssertionError:
            return
    raise AssertionError(f"{plant} went unnoticed")


class Memory:
    """One pool of 9 device pages and 6 host pages, each with its own content."""

    def __init__(self, seed: int = 0, options: dict[str, Any] | None = None, **settings: Any) -> None:
        self.runtime, self.gpu = fake_gpu(seed, **settings)
        self.block = self.runtime.allocate(9 * PAGE_BYTES)
        self.pinned = PinnedMemory(6 * PAGE_BYTES, PAGE_BYTES, self.runtime, threads=1)
        self.device, self.host = view(self.block.ptr, 9), self.pinned.array.reshape(6, PAGE_BYTES)
        self.device[:] = [page(100 + i) for i in range(9)]
        self.host[:] = [page(200 + i) for i in range(6)]
        pools = {"kv": CudaPool(PAGE_BYTES, self.block.ptr, 9, self.pinned)}
        self.mover = CudaMover(pools, self.runtime, **{"check": True, **(options or {})})

    def submit(self, direction: str, src: list[int], dst: list[int], after: Any = ()) -> Any:
        ticket = self.mover.submit(MoveBatch("kv", direction, src, dst), after)
        assert ticket is not None
        return ticket


@pytest.mark.parametrize("engine_bytes", [1, 1 << 30])
def test_pages_go_down_up_and_across(engine_bytes: int) -> None:
    memory = Memory(options={"chooser": Thresholds(engine_bytes)}, lazy=True, version=None)
    assert isinstance(memory.mover, Mover)
    tickets = [
        memory.submit("offload", [1, 2, 3, 7], [0, 1, 2, 5]),
        memory.submit("onboard", [5, 0], [4, 5]),
        memory.submit("copy", [5, 4], [1, 8]),
    ]
    assert not any(ticket._over for ticket in tickets)  # submit waits for nothing
    assert [ticket.result() for ticket in tickets] == [None] * 3
    for slot, tag in ((0, 101), (1, 102), (2, 103), (3, 203), (5, 107)):
        assert (memory.host[slot] == page(tag)).all()
    for slot, tag in ((4, 107), (5, 101), (1, 101), (8, 107), (2, 102)):
        assert (memory.device[slot] == page(tag)).all()
    totals = memory.mover.totals()
    assert (totals["pages"], totals["bytes"]) == (8, 8 * PAGE_BYTES)
    engine, kernels = (totals[name] for name in ("engine_copies", "kernel_launches"))
    assert (engine, kernels) == ((6, 0) if engine_bytes == 1 else (0, 3))
    memory.mover.close()
    memory.mover.close()
    with pytest.raises(LogicError, match="closed"):
        memory.submit("copy", [1], [2])


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    memory = Memory()
    bad = [
        ("offload", [1, 2], [3, 3], "twice"),
        ("copy", [1, 2], [3, 1], "destination of the same batch"),
        ("offload", [9], [0], "slot 9"),
        ("offload", [1], [6], "host"),
        ("onboard", [1], [0], "null page"),
        ("offload", [0], [1], "null page"),
    ]
    for direction, src, dst, message in bad:
        with pytest.raises(ValueError, match=message):
            memory.mover.submit(MoveBatch("kv", direction, src, dst))
    with pytest.raises(ValueError, match="unknown"):
        memory.mover.submit(MoveBatch("other", "offload", [1], [1]))
    with pytest.raises(ValueError, match="another mover"):
        memory.submit("copy", [1], [2], [Memory().submit("copy", [1], [2])])
    with pytest.raises(ValueError, match="tier"):
        memory.mover.wait_on(None, "kv", "disk", [1])
    assert memory.gpu.ran == 0
    assert not any(memory.gpu.queues)
    assert memory.submit("offload", [], []).done()


def test_a_full_queue_takes_nothing() -> None:
    memory = Memory(options={"queue": 2}, lazy=True)
    first = [memory.submit("offload", [slot], [slot]) for slot in (1, 2)]
    assert memory.mover.submit(MoveBatch("kv", "offload", [3], [3])) is None
    memory.submit("onboard", [5], [5])  # another direction has room
    assert memory.mover.totals()["full"] == 1
    assert memory.mover.pending("offload") == 2
    assert first[0].result() is None
    taken = memory.submit("offload", [3], [3])
    assert taken.result() is None
    assert memory.mover.pending("offload") == 0


def test_a_device_fault_fails_all_outstanding_tickets_and_is_sticky() -> None:
    memory = Memory(fault_at=0)
    tickets = [memory.submit("offload", [1, 2], [0, 1]), memory.submit("onboard", [5], [6])]
    assert tickets[1].result() == MoveError("copy", "kv", 5, "onboard", 0)
    assert [error.index for error in tickets[0].errors()] == [0, 1]
    assert all(ticket.done() for ticket in tickets)
    assert "IllegalAddress" in str(memory.mover.fault)
    late = memory.submit("copy", [1], [2])
    assert late.done()
    assert late.result() == MoveError("copy", "kv", 1, "copy", 0)
    assert memory.mover.step_begin([SlotUse("kv", "device", [3])]) is False
    assert memory.mover.synchronize() is False
    memory.mover.close()


def test_a_ticket_that_is_given_up_fails_and_its_slots_stay_fenced() -> None:
    memory = Memory(lazy=True)
    down, other = memory.submit("offload", [1], [0]), memory.submit("offload", [2], [1])
    assert down.give_up()
    assert not down.give_up()
    assert down.done()
    assert down.result() == MoveError("timeout", "kv", 1, "offload", 0)
    assert memory.mover.fenced() == [("kv", "device", 1), ("kv", "host", 0)]
    up = memory.submit("onboard", [0, 1], [3, 4])
    assert up.result() == MoveError("source", "kv", 0, "onboard", 0)
    assert other.result() is None
    assert (memory.device[4] == page(102)).all()  # the other page arrived
    assert memory.submit("offload", [3], [2]).result() == MoveError("source", "kv", 3, "offload", 0)
    assert not other.give_up()
    rewritten = memory.submit("offload", [2], [0])
    assert rewritten.result() is None  # written again, and well
    assert memory.submit("onboard", [0], [5]).result() is None


def test_a_wait_with_a_timeout_ends_in_time() -> None:
    memory = Memory()
    stream = memory.runtime.stream()
    blocked = memory.runtime.event()
    memory.runtime.record(blocked, stream)
    hold = memory.gpu.queues[stream.ptr - 1][0].after = fake_cupy.Record()
    memory.mover.step_end([SlotUse("kv", "device", [1], True)], stream)
    ticket = memory.submit("offload", [1], [0])
    assert ticket.wait(0.01) is False
    assert not ticket.done()
    assert memory.mover.wait_on(None, "kv", "host", [0], 0.01) is False
    assert memory.mover.synchronize(0.01) is False
    hold.done = True
    assert ticket.wait(30)
    assert memory.mover.synchronize(30)


def test_streams_by_address_and_at_most_four() -> None:
    memory = Memory()
    streams = [memory.runtime.stream() for _ in range(5)]
    for stream in streams[:4]:
        assert memory.mover.step_begin([SlotUse("kv", "device", [1])], stream.ptr)
        memory.mover.step_end([SlotUse("kv", "device", [1])], stream)
        memory.mover.step_end([SlotUse("kv", "device", [1])], SimpleNamespace(cuda_stream=stream.ptr))  # PyTorch's
    with pytest.raises(ValueError, match="4 streams"):
        memory.mover.step_begin([SlotUse("kv", "device", [1])], streams[4])


def test_buffers_are_used_again_only_when_their_ticket_is_over() -> None:
    memory = Memory(options={"chooser": Fixed("registers")}, lazy=True)
    tickets = [memory.submit("offload", [slot], [slot]) for slot in (1, 2, 3)]
    taken = [ticket._buffers[0] for ticket in tickets]
    assert len({id(buffer) for buffer in taken}) == 3
    assert memory.mover.synchronize()
    again = memory.submit("offload", [4], [4])
    assert again._buffers[0] in taken
    assert again.result() is None


def test_any_thread_may_submit_wait_and_step() -> None:
    memory = Memory()
    slots = {0: ([1, 2], [0, 1]), 1: ([3, 4], [2, 3]), 2: ([5, 6], [4, 5])}
    wrong: list[Any] = []

    def work(number: int) -> None:
        device, host = slots[number]
        try:
            for _ in range(20):
                assert memory.mover.step_begin([SlotUse("kv", "device", device, True)])
                memory.device[device] = page(number)
                memory.mover.step_end([SlotUse("kv", "device", device, True)])
                memory.submit("offload", device, host)
                assert memory.submit("onboard", host, device[::-1]).result() is None
                assert memory.mover.wait_on(None, "kv", "host", host)
                assert (memory.host[host] == page(number)).all()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in slots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert memory.mover.totals()["pages"] == 3 * 20 * 4
    memory.mover.close()


def test_a_mover_that_is_dropped_waits_for_its_work() -> None:
    memory = Memory(lazy=True)
    memory.submit("offload", [1], [0])
    del memory.mover
    gc.collect()
    assert (memory.host[0] == page(101)).all()
    assert list(memory.gpu.registered) == [memory.pinned.address]  # its descriptors are given back


def test_without_memory_for_the_lists_nothing_is_taken() -> None:
    memory = Memory(lazy=True, options={"queue": 1000, "chooser": Fixed("registers")})
    memory.gpu.pinned_limit = sum(memory.gpu.registered.values())
    for _ in range(SLAB):
        memory.submit("offload", [1], [0])
    with pytest.raises(MemoryError, match="pinned memory"):
        memory.submit("offload", [2], [1])
    assert memory.mover.pending("offload") == SLAB
    assert memory.mover.synchronize()
    assert (memory.host[0] == page(101)).all()
    assert (memory.host[1] == page(201)).all()
    assert memory.submit("offload", [2], [1]).result() is None
    assert (memory.host[1] == page(102)).all()


def test_who_waits_for_a_slot_may_write_it() -> None:
    """Also one who said to read it: a slot that is handed out again may still be the source of a move."""
    memory = Memory(lazy=True)
    memory.submit("offload", [1], [0])
    assert memory.mover.step_begin([SlotUse("kv", "device", [1])])
    memory.device[1] = 0
    assert memory.mover.synchronize()
    assert (memory.host[0] == page(101)).all()


def test_who_has_seen_a_ticket_done_comes_behind_it() -> None:
    """The checker must know: the caller need not wait for what it has seen end."""
    for wait in ("done", "wait", "synchronize"):
        memory = Memory()
        ticket = memory.submit("onboard", [2], [3])
        if wait == "done":
            while not ticket.done():
                pass
        else:
            assert (ticket if wait == "wait" else memory.mover).__getattribute__(wait)(30)
        memory.device[3] = page(9)
        memory.mover.step_end([SlotUse("kv", "device", [3], True)])
        memory.mover.close()


def test_the_sources_of_a_move_that_was_given_up_are_their_next_owners_at_once() -> None:
    """It may still read them, for nobody; its destinations are nobody's any more."""
    memory = Memory(lazy=True)
    first, second, third = (memory.submit("offload", [slot, 4], [slot, 4]) for slot in (1, 2, 3))
    assert second.give_up()
    assert third.give_up()
    assert memory.mover.step_begin([SlotUse("kv", "device", [1], True)], timeout=0.01) is False  # the first reads it
    assert memory.mover.step_begin([SlotUse("kv", "device", [4], True)], timeout=0.01) is False  # as the first does
    assert first.give_up()
    for slot in (1, 2, 3, 4):
        assert memory.mover.step_begin([SlotUse("kv", "device", [slot], True)], timeout=0.01)
        memory.mover.step_end([SlotUse("kv", "device", [slot], True)])
    assert memory.mover.wait_on(None, "kv", "host", [1], 0.01) is False

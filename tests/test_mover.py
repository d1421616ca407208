"""The mover's interface: what is moved, what is refused, what faults become."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import backend
from kvpool import LogicError
from kvpool.mover import AtOnceMover, BooksMover, CpuMover, MoveBatch, MoveError, Mover, SlotUse
from movers import ORDERS, PAGE_BYTES, page

MODES: dict[str, dict[str, Any]] = {"threads": {}, **{order: {"simulate": (order, 1)} for order in ORDERS}}
Make = Callable[..., Any]  # a CpuMover, or a CudaMover with its test switches


class Memory:
    """One pool of 9 device pages and 6 host pages, each with its own content."""

    def __init__(self) -> None:
        self.device, self.host = backend.page_arrays(9, 6, PAGE_BYTES)
        self.device[1:] = [page(100 + i) for i in range(1, 9)]
        self.host[:] = [page(200 + i) for i in range(6)]
        self.pools = {"kv": (self.device, self.host)}

    def device_is(self, slot: int, tag: int) -> bool:
        return bool((self.device[slot] == page(tag)).all())

    def host_is(self, slot: int, tag: int) -> bool:
        return bool((self.host[slot] == page(tag)).all())


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture(params=MODES)
def make(request: pytest.FixtureRequest, memory: Memory) -> Iterator[Make]:
    made: list[Any] = []

    def build(**options: Any) -> Any:
        made.append(backend.mover(**{"check": True, **MODES[request.param], **options})(memory.pools))
        return made[-1]

    yield build
    for mover in made:
        mover.close()


def submitted(mover: Mover, direction: str, src: list[int], dst: list[int], after: Any = ()) -> Any:
    ticket = mover.submit(MoveBatch("kv", direction, src, dst), after)
    assert ticket is not None
    return ticket


def test_pages_go_down_up_and_across(make: Make, memory: Memory) -> None:
    mover = make()
    tickets = [
        submitted(mover, "offload", [1, 2, 3, 7], [0, 1, 2, 5]),
        submitted(mover, "onboard", [5, 0], [4, 5]),
        submitted(mover, "copy", [5, 4], [1, 8]),
    ]
    assert [ticket.result() for ticket in tickets] == [None] * 3
    assert all(ticket.done() and ticket.errors() == [] for ticket in tickets)
    assert [memory.host_is(s, t) for s, t in ((0, 101), (1, 102), (2, 103), (5, 107), (3, 203))] == [True] * 5
    assert [memory.device_is(s, t) for s, t in ((4, 107), (5, 101), (1, 101), (8, 107), (2, 102))] == [True] * 5
    totals = mover.totals()
    assert (totals["pages"], totals["bytes"]) == (8, 8 * PAGE_BYTES)
    if backend.device() == "cpu":
        assert (totals["runs"], totals["calls"]) == (6, 3)


def test_a_batch_of_any_length_is_split_into_driver_calls_of_at_most_4096_runs() -> None:
    device, host = np.zeros((10_001, 8), np.uint8), np.zeros((10_000, 8), np.uint8)
    device[:] = np.arange(10_001, dtype=np.uint64).view(np.uint8).reshape(-1, 8)
    mover = CpuMover({"kv": (device, host)})
    order = np.random.default_rng(5).permutation(10_000).astype(np.int32)
    assert submitted(mover, "offload", [*range(1, 10_001)], order.tolist()).result() is None
    assert (host.view(np.uint64)[order, 0] == np.arange(1, 10_001)).all()
    assert mover.totals()["calls"] == -(-mover.totals()["runs"] // 4096) == 3
    mover.close()


def test_what_cannot_be_is_refused_and_changes_nothing(make: Make, memory: Memory) -> None:
    mover = make()
    bad = [
        ("offload", [1, 2], [3, 3], "twice"),
        ("copy", [1, 2], [3, 1], "destination of the same batch"),
        ("offload", [9], [0], "slot 9"),
        ("offload", [1], [6], "host"),
        ("onboard", [6], [1], "host"),
        ("onboard", [1], [0], "null page"),
        ("offload", [0], [1], "null page"),
    ]
    for direction, src, dst, message in bad:
        with pytest.raises(ValueError, match=message):
            mover.submit(MoveBatch("kv", direction, src, dst))
    with pytest.raises(ValueError, match="unknown"):
        mover.submit(MoveBatch("other", "offload", [1], [1]))
    with pytest.raises(ValueError, match="none of"):
        MoveBatch("kv", "sideways", [1], [1])
    with pytest.raises(ValueError, match="src has 2"):
        MoveBatch("kv", "copy", [1, 2], [1])
    with pytest.raises(ValueError, match="slot"):
        MoveBatch("kv", "copy", [-1], np.array([2**40]))
    with pytest.raises(ValueError, match="slot -1"):
        mover.submit(MoveBatch("kv", "copy", np.array([-1], np.int32), [1]))
    assert mover.totals()["pages"] == 0
    # A refused batch has left no trace: the same slots are taken at once afterwards.
    assert submitted(mover, "copy", [1, 2], [3, 4]).result() is None
    assert submitted(mover, "offload", [], []).done()


def test_a_full_queue_takes_nothing(make: Make, memory: Memory) -> None:
    mover = make(queue=2, faults=True)
    mover.stall("offload")
    first = [submitted(mover, "offload", [i], [i]) for i in (1, 2)]
    assert mover.submit(MoveBatch("kv", "offload", [3], [3])) is None
    assert (mover.pending("offload"), mover.totals()["full"]) == (2, 1)
    assert submitted(mover, "onboard", [0], [5]).result() is None  # other directions go on
    mover.stall("offload", False)
    assert [ticket.result() for ticket in first] == [None, None]
    assert submitted(mover, "offload", [3], [3]).result() is None
    mover.fill("offload", 1)
    assert mover.submit(MoveBatch("kv", "offload", [4], [4])) is None
    assert mover.synchronize()
    assert memory.host_is(3, 103)
    assert memory.host_is(4, 204)


def test_a_ticket_waits_for_those_it_is_submitted_after(make: Make, memory: Memory) -> None:
    mover = make(faults=True)
    mover.stall("offload")
    first = submitted(mover, "offload", [1], [1])
    second = submitted(mover, "onboard", [2], [2], after=[first])
    assert not second.wait(0.01)
    assert memory.device_is(2, 102)
    mover.stall("offload", False)
    assert second.result() is None
    assert first.done()
    assert memory.device_is(2, 202)
    other = backend.mover()(memory.pools)
    with pytest.raises(ValueError, match="another mover"):
        other.submit(MoveBatch("kv", "copy", [1], [2]), after=[first])
    other.close()


def test_an_engine_that_computes_in_its_own_thread_is_ordered_by_step_begin_and_step_end(
    make: Make, memory: Memory
) -> None:
    mover = make()
    stream = mover.stream()
    seen: list[bool] = []

    def kernel() -> None:
        seen.append(memory.device_is(3, 202))
        memory.device[3] = page(7)

    submitted(mover, "onboard", [2], [3])
    uses = [SlotUse("kv", "device", [3]), SlotUse("kv", "device", [3], writes=True)]
    assert mover.step_begin(uses, stream)
    stream.launch(kernel)
    mover.step_end(uses, stream)
    down = submitted(mover, "offload", [3], [4])
    submitted(mover, "onboard", [0], [3])  # the slot has a new owner at once
    assert down.result() is None
    assert mover.synchronize()
    assert stream.synchronize()
    assert seen == [True]
    assert memory.host_is(4, 7)
    assert memory.device_is(3, 200)


def test_the_caller_waits_for_what_touches_its_slots_and_nothing_else(make: Make, memory: Memory) -> None:
    mover = make(faults=True)
    mover.stall("onboard")
    submitted(mover, "onboard", [2], [3])
    assert mover.wait_on(None, "kv", "device", [4], timeout=0.01)
    assert not mover.wait_on(None, "kv", "device", [3], timeout=0.01)
    assert not mover.step_begin([SlotUse("kv", "device", [1]), SlotUse("kv", "host", [2])], timeout=0.01)
    mover.stall("onboard", False)
    assert mover.wait_on(None, "kv", "device", [3])
    assert memory.device_is(3, 202)
    with pytest.raises(ValueError, match="slot 9"):
        mover.wait_on(None, "kv", "device", [9])
    with pytest.raises(ValueError, match="tier"):
        mover.wait_on(None, "kv", "disk", [1])
    with pytest.raises(ValueError, match="stream"):
        mover.wait_on("mine", "kv", "device", [1])  # type: ignore[arg-type]


@pytest.mark.parametrize("direction", ["offload", "onboard", "copy"])
def test_each_page_that_fails_is_a_value_with_pool_slot_direction_and_index(
    make: Make, memory: Memory, direction: str
) -> None:
    mover = make(faults=True)
    far = "host" if direction == "offload" else "device"
    for k in (1, 2, 3):
        memory.__init__()  # type: ignore[misc]
        mover = make(faults=True)
        before = getattr(memory, far).copy()
        mover.fail(k, direction)
        ticket = submitted(mover, direction, [1, 2, 3], [5, 4, 8] if far == "device" else [5, 4, 0])
        assert ticket.result() == MoveError("copy", "kv", k, direction, k - 1)
        assert ticket.errors() == [ticket.result()]
        slot = ticket_slot = ([5, 4, 8] if far == "device" else [5, 4, 0])[k - 1]
        changed = [row for row in range(len(before)) if (getattr(memory, far)[row] != before[row]).any()]
        if backend.device() == "cpu":
            assert ticket_slot not in changed, f"slot {slot} was to keep its content"
            assert len(changed) == 2
        else:
            assert len(changed) == 3  # the copy that fails leaves rubbish
        assert mover.totals()["failed"] == 1


def test_a_page_whose_source_failed_fails_too_until_it_is_written_anew(make: Make, memory: Memory) -> None:
    mover = make(faults=True)
    mover.fail(1)
    tickets = [
        submitted(mover, "offload", [1, 2], [0, 1]),
        submitted(mover, "onboard", [0, 1], [3, 4]),
        submitted(mover, "copy", [3], [5]),
    ]
    assert [ticket.result() for ticket in tickets] == [
        MoveError("copy", "kv", 1, "offload", 0),
        MoveError("source", "kv", 0, "onboard", 0),
        MoveError("source", "kv", 3, "copy", 0),
    ]
    assert memory.device_is(4, 102)
    written = [SlotUse("kv", "device", [3], writes=True)]
    assert mover.step_begin(written)
    memory.device[3] = page(9)
    mover.step_end(written)
    assert submitted(mover, "copy", [3], [5]).result() is None
    assert memory.device_is(5, 9)
    assert submitted(mover, "offload", [5], [0]).result() is None
    assert submitted(mover, "onboard", [0], [6]).result() is None
    assert memory.device_is(6, 9)


def test_a_ticket_that_is_given_up_counts_as_failed_and_its_slots_are_fenced(make: Make, memory: Memory) -> None:
    mover = make(faults=True)
    mover.stall("offload")
    ticket = submitted(mover, "offload", [1, 2], [3, 4])
    assert not ticket.done()
    assert not ticket.wait(0.01)
    assert ticket.give_up()
    assert not ticket.give_up()
    assert ticket.done()
    assert ticket.result() == MoveError("timeout", "kv", 1, "offload", 0)
    assert [error.slot for error in ticket.errors()] == [1, 2]
    assert sorted(mover.fenced()) == [("kv", "device", 1), ("kv", "device", 2), ("kv", "host", 3), ("kv", "host", 4)]
    mover.stall("offload", False)
    assert mover.synchronize()
    if backend.device() == "cpu":
        assert memory.host_is(3, 203)  # what was given up is never copied later
    assert mover.pending("offload") == 0
    done = submitted(mover, "offload", [5], [5])
    assert done.result() is None
    assert not done.give_up()


def test_close_ends_everything_and_what_stands_still_fails(make: Make, memory: Memory) -> None:
    mover = make(faults=True)
    mover.stall("onboard")
    stuck = submitted(mover, "onboard", [1], [1])
    behind = submitted(mover, "offload", [1, 2], [0, 3])
    mover.close()
    mover.close()
    assert stuck.result() == MoveError("closed", "kv", 1, "onboard", 0)
    assert behind.result() == MoveError("source", "kv", 1, "offload", 0)
    assert memory.host_is(3, 102)
    for call in (
        lambda: mover.submit(MoveBatch("kv", "copy", [1], [2])),
        lambda: mover.wait_on(None, "kv", "device", [1]),
        lambda: mover.step_end([SlotUse("kv", "device", [1])]),
        mover.stream,
    ):
        with pytest.raises(LogicError):
            call()


def test_faults_are_for_movers_that_were_made_with_them(make: Make) -> None:
    mover = make()
    for call in (
        lambda: mover.fail(1),
        lambda: mover.fail_at_random(0.5, 1),
        lambda: mover.fill("copy", 1),
        lambda: mover.stall("copy"),
    ):
        with pytest.raises(LogicError, match="faults=True"):
            call()


@pytest.mark.parametrize("staging", [1, 2, 3])
def test_pages_may_go_by_way_of_a_staging_buffer(make: Make, memory: Memory, staging: int) -> None:
    mover = make(staging=staging, faults=True)
    mover.fail(3, "offload")
    ticket = submitted(mover, "offload", [7, 1, 5, 3, 2], [0, 5, 1, 2, 4])
    assert ticket.result() == MoveError("copy", "kv", 5, "offload", 2)
    assert ticket.errors() == [ticket.result()]
    assert [memory.host_is(s, t) for s, t in ((0, 107), (5, 101), (1, 201), (2, 103), (4, 102))] == [True] * 5
    assert (mover.totals()["pages"], mover.totals()["failed"]) == (4, 1)


def test_waits_let_other_threads_run_python(memory: Memory) -> None:
    mover = backend.mover(faults=True)(memory.pools)
    mover.stall("offload")
    ticket = submitted(mover, "offload", [1], [1])
    started = threading.Event()

    def release() -> None:
        started.set()
        mover.stall("offload", False)

    thread = threading.Thread(target=release)
    thread.start()
    assert ticket.wait(60)  # holding the GIL it would be in vain
    thread.join()
    assert started.is_set()
    mover.close()


def test_several_threads_may_submit_at_once() -> None:
    device, host = backend.page_arrays(4001, 4000, 8)
    device[:] = np.arange(4001, dtype=np.uint64).view(np.uint8).reshape(-1, 8)
    mover = backend.mover(check=True, queue=1000)({"kv": (device, host)})

    def work(part: int) -> None:
        for i in range(50):
            slots = np.arange(part * 1000 + i * 20, part * 1000 + i * 20 + 20, dtype=np.int32)
            assert mover.submit(MoveBatch("kv", "offload", slots + 1, slots)) is not None
            assert mover.submit(MoveBatch("kv", "onboard", slots, slots[::-1] + 1)) is not None

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mover.synchronize(60)
    expected = np.arange(1, 4001).reshape(-1, 20)[:, ::-1].ravel()
    assert (device.view(np.uint64)[1:, 0] == expected).all()
    mover.close()


def test_the_memory_stays_while_the_mover_lives_and_may_be_any_writable_array() -> None:
    device = np.zeros((3, 8), np.uint8)
    mover = CpuMover({"kv": (device, None)})
    with pytest.raises(ValueError, match=r"slot 0 of pool .* is not on the host: it has no slots"):
        mover.submit(MoveBatch("kv", "offload", [1], [0]))
    with pytest.raises(ValueError, match=r"slot 3 of pool .* is not on the device: it has slots 0 to 2$"):
        mover.submit(MoveBatch("kv", "copy", [1], [3]))
    device[1] = 5
    del device
    assert submitted(mover, "copy", [1], [2]).result() is None
    mover.close()
    frozen = np.zeros((3, 8), np.uint8)
    frozen.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        CpuMover({"kv": (frozen, None)})
    with pytest.raises(ValueError, match="contiguous"):
        CpuMover({"kv": (np.zeros((3, 8), np.uint8)[:, ::2], None)})
    with pytest.raises(ValueError, match="queue"):
        CpuMover({"kv": (np.zeros((3, 8), np.uint8), None)}, queue=0)


def test_a_mover_that_is_forgotten_ends_its_threads(memory: Memory) -> None:
    mover = backend.mover()(memory.pools)
    ticket = submitted(mover, "offload", [1], [1])
    del mover
    assert ticket.result() is None
    assert memory.host_is(1, 101)


def test_a_forked_child_closes_what_it_inherited_without_waiting_for_the_parents_threads(memory: Memory) -> None:
    mover = CpuMover(memory.pools)
    assert submitted(mover, "offload", [1], [1]).result() is None
    child = os.fork()
    if child == 0:
        mover.close()
        os._exit(7)
    for _ in range(600):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 7
    assert submitted(mover, "offload", [2], [2]).result() is None
    mover.close()


def test_the_simple_movers_have_the_same_interface(memory: Memory) -> None:
    at_once = AtOnceMover(memory.pools)
    for mover in (at_once, BooksMover(), CpuMover(memory.pools)):
        assert isinstance(mover, Mover)
        ticket = submitted(mover, "offload", [1, 2], [2, 1])
        assert ticket.result() is None
        assert ticket.wait(1)
        assert ticket.done()
        assert not ticket.give_up()
        assert mover.wait_on(None, "kv", "host", [1])
        assert mover.step_begin([SlotUse("kv", "device", [1])])
        mover.step_end([SlotUse("kv", "device", [1])])
        assert mover.synchronize()
        mover.close()
    assert memory.host_is(2, 101)
    assert submitted(at_once, "onboard", [2], [5]).errors() == []
    assert submitted(at_once, "copy", [5], [6]).done()
    assert memory.device_is(6, 101)
    with pytest.raises(ValueError, match="host tier"):
        AtOnceMover({"kv": (memory.device, None)}).submit(MoveBatch("kv", "offload", [1], [1]))


def test_close_ends_all_threads_although_it_does_the_last_work_itself() -> None:
    """A thread that is woken while the closing thread runs the last move of its stream must be woken again."""
    device, host = np.zeros((1025, 4096), np.uint8), np.zeros((1024, 4096), np.uint8)
    slots = np.arange(1024, dtype=np.int32)
    for _ in range(200):
        mover = CpuMover({"kv": (device, host)})
        for direction, src, dst in (("offload", slots + 1, slots), ("onboard", slots, slots + 1)):
            assert mover.submit(MoveBatch("kv", direction, src, dst)) is not None
        mover.close()

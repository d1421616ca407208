"""The paths of CudaMover one by one, under the stand-ins: what each does, where it is not offered, and its counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from any_path import AnyPath
from cuda_movers import fake_gpu
from kvpool.mover import MoveBatch, SlotUse
from kvpool.mover.batch_copy import MOST
from kvpool.mover.cuda import CudaMover
from kvpool.mover.descriptors import PER_CALL, CudaPool, count_runs, starts
from kvpool.mover.paths import PATHS, Choice, Fixed, Shape, Thresholds
from kvpool.mover.pinned import PinnedMemory
from kvpool.mover.staging import PARTS


class Pages:
    """One pool of n pages on either tier (the device's null page besides), with random content."""

    def __init__(
        self,
        n: int,
        page_bytes: int,
        path: str,
        gpu: dict[str, Any] | None = None,
        chunk_pages: int = 1 << 30,
        **options: Any,
    ) -> None:
        self.n, self.page_bytes = n, page_bytes
        self.runtime, self.gpu = fake_gpu(**(gpu or {}))
        self.block = self.runtime.allocate((n + 1) * page_bytes)
        self.pinned = PinnedMemory(
            n * page_bytes, page_bytes, self.runtime, chunk_bytes=chunk_pages * page_bytes, threads=1
        )
        random = np.random.default_rng(1)
        self.device = random.integers(0, 256, (n + 1, page_bytes), np.uint8)
        self.host = random.integers(0, 256, (n, page_bytes), np.uint8)
        self.runtime.upload(self.device, self.block.ptr)
        self.pinned.array.reshape(n, page_bytes)[:] = self.host
        pools = {"kv": CudaPool(page_bytes, self.block.ptr, n + 1, self.pinned)}
        self.mover = CudaMover(pools, self.runtime, **{"chooser": Fixed(path, 2), "check": True, **options})

    def move(self, direction: str, src: Any, dst: Any) -> Any:
        """Submitted; what it should do is done to `device` and `host`."""
        src, dst = np.asarray(src, np.int32), np.asarray(dst, np.int32)
        tiers = {"offload": (self.device, self.host), "onboard": (self.host, self.device)}
        source, target = tiers.get(direction, (self.device, self.device))
        target[dst] = source[src]
        ticket = self.mover.submit(MoveBatch("kv", direction, src, dst))
        assert ticket is not None
        return ticket

    def check(self) -> None:
        """All is over, and every byte as it should be."""
        assert self.mover.synchronize()
        assert np.array_equal(self.pinned.array.reshape(self.n, self.page_bytes), self.host)
        assert np.array_equal(self.runtime.download(self.block.ptr, self.device.size), self.device.ravel())
        self.mover.close()


@pytest.mark.parametrize("path", PATHS)
def test_a_batch_of_any_length_is_split_into_calls(path: str) -> None:
    n = 2 * PER_CALL + 100
    pages = Pages(n, 16, path, staging_bytes=PARTS * 16 * 5000)
    order = np.random.default_rng(2).permutation(n)
    pages.move("offload", order + 1, np.arange(n))
    pages.move("onboard", order, np.arange(n) + 1)
    pages.check()
    totals = pages.mover.totals()
    assert totals["pages"] == 2 * n
    scattered = 2 * len(starts(order, np.arange(n), None, 16, ()))
    expected = {"engine": (scattered, 0, 0), "batch": (0, 6, 0), "staged": (6, 0, 6)}  # 6: 3 pieces either way
    found = tuple(totals[name] for name in ("engine_copies", "batch_copies", "kernel_launches"))
    assert found == expected.get(path, (0, 0, 6))
    assert all(count <= MOST for count in pages.gpu.batches)


@pytest.mark.parametrize("path", ["engine", "batch", "staged"])
def test_copies_are_cut_between_registrations(path: str) -> None:
    """The stand-in refuses a copy that straddles two. 10 host pages in registrations of 3."""
    pages = Pages(10, 4096, path, chunk_pages=3)
    slots = np.arange(1, 10)
    pages.move("offload", slots, slots)
    pages.move("onboard", slots, slots + 1)
    pages.check()
    assert len(pages.pinned.edges) == 5
    if path == "engine":
        assert pages.mover.totals()["engine_copies"] == 8
    else:
        assert pages.gpu.batches == [4, 4]


def test_staged_pages_go_as_few_copies_as_the_host_has_runs() -> None:
    pages = Pages(30, 48, "staged", {"version": None}, staging_bytes=PARTS * 48 * 8)
    scattered = np.array([29, 3, 17, 9, 21, 5, 11])
    pages.move("offload", scattered, [4, 6, 5, 3, 20, 22, 21])  # two runs, in any order
    pages.check()
    assert pages.mover.totals()["engine_copies"] == 2
    assert pages.gpu.launches == ["gather_pages_u128"]


def test_a_source_slot_is_free_once_it_is_gathered() -> None:
    """Who takes the slot next waits for the gather, not for the way over the bus."""
    pages = Pages(8, 48, "staged", {"lazy": True}, staging_bytes=PARTS * 48)
    pages.move("offload", [1, 2], [1, 2])
    stream, event = pages.runtime.stream(), pages.runtime.event()
    pages.mover.step_begin([SlotUse("kv", "device", [1, 2], True)], stream)
    pages.runtime.record(event, stream)
    event.synchronize()  # runs work in the order of the seed until the stream gets there
    assert pages.mover._streams[0].cuda.queue, "all has been sent"
    pages.check()


def test_pages_larger_than_a_part_are_not_staged() -> None:
    pages = Pages(8, 48, "staged", staging_bytes=PARTS * 47)
    assert "staged" not in pages.mover.offered("kv", "offload")
    pages.move("offload", [1, 3], [0, 1])
    pages.check()
    assert set(pages.mover.path_counts()) == {"registers"}


def test_without_staging_memory_moves_go_another_way() -> None:
    pages = Pages(8, 48, "staged", {"memory": 9 * 48 + 4096}, staging_bytes=8192)
    assert "16384 bytes of staging memory cannot be had" in str(pages.mover.problems()["staged"])
    pages.move("offload", [1, 3], [0, 1])
    pages.check()
    assert set(pages.mover.path_counts()) == {"registers"}


@pytest.mark.parametrize(
    ("path", "gpu", "page_bytes", "instead"),
    [
        ("batch", {"version": None}, 48, "engine"),
        ("batch", {"version": 12040}, 48, "engine"),
        ("ring", {"capability": "75"}, 48, "registers"),
        ("ring", {}, 24, "registers"),
        *[(path, {"same_addresses": False}, 48, "engine") for path in ("batch", "registers", "ring", "staged")],
    ],
)
def test_what_a_machine_does_not_offer_another_path_does(path: str, gpu: Any, page_bytes: int, instead: str) -> None:
    pages = Pages(12, page_bytes, path, gpu)
    assert path not in pages.mover.offered("kv", "copy")
    pages.move("offload", [1, 3, 5], [0, 1, 2])
    pages.move("copy", [2, 4], [8, 7])
    pages.move("onboard", [1, 0], [6, 4])
    pages.check()
    assert set(pages.mover.path_counts()) == {instead}
    assert (path in pages.mover.problems()) == (page_bytes == 48)


def test_host_memory_that_is_not_pinned_is_refused() -> None:
    """Copies of pageable memory are not made in the order of their stream."""
    runtime, _ = fake_gpu(pinned_limit=0)
    block = runtime.allocate(3 * 48)
    host = PinnedMemory(2 * 48, 48, runtime, threads=1, fallback=True)
    with pytest.raises(ValueError, match=r"pool 'kv': host memory must be pinned. pinned memory: 96 bytes could not"):
        CudaMover({"kv": CudaPool(48, block.ptr, 3, host)}, runtime)


def test_counts_of_every_path_and_direction() -> None:
    """moves, pages and bytes of each, as they were sent; a move of which nothing could be sent counts nowhere."""

    class InTurn:
        paths = frozenset(PATHS)

        def __init__(self) -> None:
            self.shapes: list[Shape] = []
            self.next = ["engine", "batch", "registers", "ring", "staged", "engine", "ring"]

        def choose(self, shape: Shape, offered: frozenset[str]) -> Choice:
            self.shapes.append(shape)
            return Choice(self.next.pop(0))

    chooser = InTurn()
    pages = Pages(20, 48, "", chooser=chooser)
    for path_slots in ([1, 2], [3, 5, 4], [7], [9, 11], [13, 15, 17]):
        pages.move("offload", path_slots, path_slots)
    pages.move("onboard", [1, 2], [3, 4])
    pages.move("copy", [1], [2])
    pages.move("copy", [], [])
    assert pages.mover.path_counts() == {
        "engine": {
            "offload": {"moves": 1, "pages": 2, "bytes": 96},
            "onboard": {"moves": 1, "pages": 2, "bytes": 96},
        },
        "batch": {"offload": {"moves": 1, "pages": 3, "bytes": 144}},
        "registers": {"offload": {"moves": 1, "pages": 1, "bytes": 48}},
        "ring": {"offload": {"moves": 1, "pages": 2, "bytes": 96}, "copy": {"moves": 1, "pages": 1, "bytes": 48}},
        "staged": {"offload": {"moves": 1, "pages": 3, "bytes": 144}},
    }
    assert chooser.shapes[1] == Shape("offload", 48, 3, 1, 1)  # 3, 4, 5
    assert chooser.shapes[4] == Shape("offload", 48, 3, 3, 3)
    assert chooser.shapes[6] == Shape("copy", 48, 1, 1, 0)
    pages.check()


def test_the_default_goes_by_the_average_fragment() -> None:
    thresholds, every = Thresholds(1000, 7), frozenset(PATHS)
    for fragments, path in ((1, "engine"), (2, "batch"), (3, "registers")):
        choice = thresholds.choose(Shape("offload", 100, 20, fragments, 1), every)
        assert choice.path == path
    assert choice.blocks == 7
    assert thresholds.choose(Shape("offload", 100, 20, 2, 1), every - {"batch"}).path == "engine"
    assert thresholds.choose(Shape("offload", 100, 20, 20, 1), frozenset({"engine"})).path == "engine"


def test_where_fragments_begin() -> None:
    def of(*slots: int) -> Any:
        return np.array(slots, np.int32)

    def begin(src: Any, dst: Any) -> list[int]:
        return starts(src, dst, None, 8, ()).tolist()

    assert begin(of(), of()) == []
    assert begin(of(1, 2, 3), of(5, 6, 7)) == [0]
    assert begin(of(1, 2, 4), of(5, 6, 7)) == [0, 2]
    assert begin(of(1, 2, 3), of(5, 7, 8)) == [0, 1]
    assert begin(of(3, 2), of(3, 2)) == [0, 1]
    edges = [0, 300, 600, 1000]  # bytes; pages of 100
    ten, shifted = np.arange(10, dtype=np.int32), np.arange(1, 11, dtype=np.int32)
    assert starts(shifted, ten, ten, 100, edges).tolist() == [0, 3, 6]
    assert starts(ten, shifted, ten, 100, edges).tolist() == [0, 3, 6]
    assert starts(of(9, 10), of(2, 3), of(2, 3), 100, edges).tolist() == [0, 1]
    assert starts(of(9, 10, 11), of(3, 4, 5), of(3, 4, 5), 100, edges).tolist() == [0]
    assert [count_runs(of(*slots)) for slots in ((), (4,), (4, 2, 3), (7, 2, 3), (1, 3, 5))] == [0, 1, 1, 2, 3]


def test_a_staged_ticket_of_many_pieces_is_lost_as_a_whole() -> None:
    """Given up before it ran, or ended by a fault: no page of any piece counts as arrived."""
    pages = Pages(12, 48, "staged", {"lazy": True}, staging_bytes=PARTS * 48)
    down = pages.mover.submit(MoveBatch("kv", "offload", [1, 2, 3], [0, 2, 4]))
    assert down is not None
    assert down.give_up()
    assert [error.code for error in down.errors()] == ["timeout"] * 3
    up = pages.mover.submit(MoveBatch("kv", "onboard", [0, 2, 4, 5], [7, 8, 9, 10]))
    assert up is not None
    assert [(error.code, error.slot) for error in up.errors()] == [("source", 0), ("source", 2), ("source", 4)]
    assert up.wait()
    assert len(up.errors()) == 3
    assert np.array_equal(pages.runtime.download(pages.block.ptr + 10 * 48, 48), pages.host[5])
    pages.gpu.fault_at = pages.gpu.ran + 2
    broken = pages.mover.submit(MoveBatch("kv", "offload", [4, 5, 6], [6, 7, 8]))
    assert broken is not None
    assert broken.result() is not None
    assert [error.code for error in broken.errors()] == ["copy"] * 3
    pages.mover.close()


def test_tickets_of_all_paths_are_over_in_their_order() -> None:
    pages = Pages(30, 48, "", chooser=AnyPath(11), staging_bytes=PARTS * 2 * 48)
    tickets = [pages.move("offload", range(1 + 5 * k, 6 + 5 * k), range(5 * k, 5 * k + 5)) for k in range(5)]
    assert tickets[2].wait()
    assert all(ticket.done() for ticket in tickets[:3])
    pages.check()

"""Pinned host memory: chunks, touched before they are registered, and what a refused registration says."""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import mmap
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvpool.mover import pinned
from kvpool.mover.pinned import PinnedMemory, StderrProgress, chunk_edges

MIB = 1 << 20


class Books:
    """A registrar that keeps books: nothing twice, nothing that is not there, at most `limit` bytes."""

    def __init__(self, limit: int = 1 << 40) -> None:
        self.limit, self.ranges, self.untouched = limit, dict[int, int](), list[int]()

    def register(self, address: int, num_bytes: int) -> None:
        if sum(self.ranges.values()) + num_bytes > self.limit:
            raise RuntimeError("cudaErrorMemoryAllocation: out of memory")
        assert address % mmap.PAGESIZE == 0
        for start, size in self.ranges.items():
            last, first = start + size - 1, address + num_bytes - 1  # two ranges in one system page are refused
            assert first < start or address // mmap.PAGESIZE > last // mmap.PAGESIZE, "registered twice"
        pages = -(-num_bytes // mmap.PAGESIZE)
        resident = (ctypes.c_ubyte * pages)()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), resident) == 0
        self.untouched += [page for page in range(pages) if not resident[page] & 1]
        self.ranges[address] = num_bytes

    def unregister(self, address: int) -> None:
        del self.ranges[address]


@pytest.mark.parametrize("page_bytes", [1, 16, 24, 4096, 4097, 65_536, 3 * MIB])
def test_chunks_are_multiples_of_both_pages(page_bytes: int) -> None:
    for num_pages in (1, 7, 1000):
        for chunk_bytes in (1, 100_000, 8 * MIB, 1 << 40):
            edges = chunk_edges(num_pages * page_bytes, page_bytes, chunk_bytes)
            assert edges[0] == 0
            assert edges[-1] == num_pages * page_bytes
            assert edges == sorted(set(edges))
            assert all(edge % page_bytes == 0 and edge % mmap.PAGESIZE == 0 for edge in edges[1:-1])
            largest = max(end - start for start, end in itertools.pairwise(edges))
            assert largest <= max(chunk_bytes, math.lcm(page_bytes, mmap.PAGESIZE))


@pytest.mark.parametrize("page_bytes", [4096, 5000, 65_536])
def test_memory_is_zeroed_touched_and_registered_in_chunks(page_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "PIECE_BYTES", 1 * MIB)
    books = Books()
    ready: list[tuple[int, int]] = []
    size = 700 * page_bytes
    with PinnedMemory(
        size, page_bytes, books, chunk_bytes=MIB, threads=3, progress=lambda *now: ready.append(now)
    ) as memory:
        assert memory.pinned
        assert memory.problem is None
        assert books.untouched == []
        assert sum(books.ranges.values()) == memory.array.size == size
        assert sorted(books.ranges) == [memory.address + start for start, _ in memory.chunks()]
        assert not memory.array.any()
        memory.array[:] = 7
        assert ready == [(end, size) for _, end in memory.chunks()]
    assert books.ranges == {}
    memory.close()
    assert memory.array[-1] == 7  # an array outlives its registration


def test_pieces_are_touched_in_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of three pieces waits for the others: one thread alone would never end."""
    monkeypatch.setattr(pinned, "PIECE_BYTES", 2 * mmap.PAGESIZE)
    together = threading.Barrier(3, timeout=30)
    pages: list[int] = []

    class Array:
        def __setitem__(self, part: slice, value: int) -> None:
            together.wait()
            pages.extend(range(part.start, part.stop, part.step))

    with ThreadPoolExecutor(3) as pool:
        pinned._touch(Array(), mmap.PAGESIZE, 7 * mmap.PAGESIZE, pool)  # type: ignore[arg-type]
    assert sorted(pages) == [n * mmap.PAGESIZE for n in range(1, 7)]


def test_a_refused_registration_says_what_was_asked_the_limit_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "locked_limit", lambda: 8 * MIB)
    books = Books(limit=5 * MIB)
    with pytest.raises(MemoryError) as error:
        PinnedMemory(16 * MIB, 4096, books, chunk_bytes=2 * MIB)
    text = str(error.value)
    assert text.startswith(f"pinned memory: {2 * MIB} bytes could not be registered (cudaErrorMemoryAllocation")
    assert f"after {4 * MIB} of {16 * MIB} bytes in all" in text
    assert f"(ulimit -l, RLIMIT_MEMLOCK) is {8 * MIB} bytes" in text
    assert "ulimit -l unlimited" in text
    assert "lower host_bytes" in text
    assert books.ranges == {}, "what was registered before must be given back"


def test_fallback_keeps_the_memory_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "locked_limit", lambda: None)
    books = Books(limit=5 * MIB)
    memory = PinnedMemory(16 * MIB, 4096, books, chunk_bytes=2 * MIB, fallback=True)
    assert not memory.pinned
    assert memory.problem is not None
    assert "is unlimited" in memory.problem
    assert books.ranges == {}
    memory.array[:] = 1
    assert memory.array.all()


def test_an_interrupt_gives_all_registrations_back() -> None:
    books = Books()

    def interrupt(done: int, total: int) -> None:
        if done >= 4 * MIB:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PinnedMemory(16 * MIB, 4096, books, chunk_bytes=2 * MIB, progress=interrupt)
    assert books.ranges == {}


def test_memory_that_is_dropped_is_not_left_registered() -> None:
    books = Books()
    memory = PinnedMemory(4 * MIB, 4096, books, chunk_bytes=MIB)
    assert len(books.ranges) == 4
    array = memory.array
    del memory
    gc.collect()
    assert books.ranges == {}
    array[:] = 1  # and stays mapped while an array looks at it


@pytest.mark.parametrize(
    ("num_bytes", "page_bytes", "chunk_bytes", "message"),
    [(0, 1, 1, "positive"), (4096, 0, 1, "positive"), (4096, 4096, 0, "positive"), (4097, 4096, 1, "no multiple")],
)
def test_sizes_are_checked(num_bytes: int, page_bytes: int, chunk_bytes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PinnedMemory(num_bytes, page_bytes, Books(), chunk_bytes=chunk_bytes)


def test_more_memory_than_there_are_addresses() -> None:
    with pytest.raises(MemoryError, match="lower host_bytes"):
        PinnedMemory(1 << 60, 4096, Books())


def test_numa_node(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(pinned, "_bind", lambda *arguments: asked.append(arguments))
    memory = PinnedMemory(MIB, 4096, Books(), numa_node=1)
    assert asked == [(memory.address, MIB, 1)]
    PinnedMemory(MIB, 4096, Books())
    assert len(asked) == 1


def test_a_numa_node_that_is_not_there_is_an_error() -> None:
    with pytest.raises(OSError, match=r"numa_node: .*1000"):
        PinnedMemory(MIB, 4096, Books(), numa_node=1000)
    with pytest.raises(OSError, match="numa_node: -1"):
        PinnedMemory(MIB, 4096, Books(), numa_node=-1)


def test_progress_is_shown_when_it_takes_over_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    quick, slow = (StderrProgress(clock=lambda: now[0]) for _ in range(2))
    quick(512 * MIB, 1024 * MIB)
    now[0] = 0.9
    quick(1024 * MIB, 1024 * MIB)
    assert capsys.readouterr().err == ""
    now[0] = 1.1
    slow(512 * MIB, 1024 * MIB)
    slow(1024 * MIB, 1024 * MIB)
    assert capsys.readouterr().err == "\rpinned memory: 0.5 of 1.0 GiB\rpinned memory: 1.0 of 1.0 GiB\n"


LOCKING = """
import ctypes, os, resource
from kvpool.mover.pinned import PinnedMemory

class Locks:
    libc = ctypes.CDLL(None, use_errno=True)
    def register(self, address, num_bytes):
        if self.libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes)):
            raise OSError(ctypes.get_errno(), "mlock: " + os.strerror(ctypes.get_errno()))
    def unregister(self, address):
        pass

resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
if os.geteuid() == 0:
    os.setuid(65534)  # root may lock what it likes
try:
    PinnedMemory(4 << 20, 4096, Locks(), chunk_bytes=512 << 10)
except MemoryError as error:
    print(error)
"""


def test_the_systems_own_limit_is_the_one_that_is_named() -> None:
    """With mlock as registrar: the message is about a limit that really refused."""
    done = subprocess.run([sys.executable, "-c", LOCKING], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    if not done.stdout:
        pytest.skip("this system does not enforce RLIMIT_MEMLOCK")
    assert "mlock: Cannot allocate memory" in done.stdout
    assert f"is {1 << 20} bytes" in done.stdout

"""Host memory that a GPU can reach: mapped, touched by several threads, and registered (page-locked) in chunks.

A chunk is a multiple of the page that the pool moves, so that no page straddles two registrations, and of the operating
system's page, so that two registrations never share one:

    memory   |0 1 2 3 4 5 6 7|8 9 ...         pages of the pool
    chunks   [       0       )[       1       )[   the rest   )

Who registers is behind `Registrar`: the CUDA runtime, or a stand-in. The memory is an anonymous mapping of its own;
arrays over it keep it mapped. Its registrations end by `close`, or with the object: nothing may be on its way then.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import mmap
import os
import platform
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from kvpool.arguments import ByteArray
from kvpool.machine import locked_limit, usable_cores

CHUNK_BYTES = 1 << 30  # about what one registration covers
PIECE_BYTES = 64 << 20  # that one thread touches at a time
MAX_THREADS = 16
_MBIND = {"x86_64": 237, "aarch64": 235}  # number of the system call
_MPOL_BIND = 2
Progress = Callable[[int, int], None]


class Registrar(Protocol):
    """Page-locks memory so that a device can reach it at the same address; `CudaRuntime` is one."""

    def register(self, address: int, num_bytes: int) -> None:
        """Any exception means that the memory is as before."""

    def unregister(self, address: int) -> None:
        """Of the address that was registered."""


def chunk_edges(num_bytes: int, page_bytes: int, chunk_bytes: int, system_page: int = mmap.PAGESIZE) -> list[int]:
    """Where chunks begin, and the end: [0, ..., num_bytes]. Inner edges are multiples of both pages.

    A chunk is the largest such multiple up to `chunk_bytes`, at least one.
    """
    unit = math.lcm(page_bytes, system_page)
    step = max(chunk_bytes // unit, 1) * unit
    return [*range(0, num_bytes, step), num_bytes]


class StderrProgress:
    """One line on stderr that is rewritten, from `delay_s` after construction on; nothing where all is over sooner."""

    def __init__(self, delay_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._delay, self._start = clock, delay_s, clock()
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` bytes are ready."""
        if self._clock() - self._start < self._delay:
            return
        if done < total or self._shown:
            end = "\n" if done >= total else ""
            print(
                f"\rpinned memory: {done / 2**30:.1f} of {total / 2**30:.1f} GiB", end=end, file=sys.stderr, flush=True
            )
            self._shown = True


class PinnedMemory:
    """`num_bytes` of zeroed host memory, registered in chunks. A context manager that closes.

    page_bytes: of the pool. threads: that touch it (default: the cores of this process, at most MAX_THREADS).
    numa_node: all of it is on that node (None: the system's choice); OSError if that cannot be had. fallback: if a
    registration fails, keep the memory unregistered, with `pinned` False and the reason in `problem`; else MemoryError
    says what was asked, the limit and the remedy. progress: called with (bytes ready, num_bytes) after each chunk.
    """

    def __init__(
        self,
        num_bytes: int,
        page_bytes: int,
        registrar: Registrar,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        threads: int | None = None,
        numa_node: int | None = None,
        fallback: bool = False,
        progress: Progress | None = None,
    ) -> None:
        if num_bytes < 1 or page_bytes < 1 or chunk_bytes < 1:
            raise ValueError(f"num_bytes {num_bytes}, page_bytes {page_bytes}, chunk_bytes {chunk_bytes}: not positive")
        if num_bytes % page_bytes:
            raise ValueError(f"num_bytes {num_bytes} is no multiple of page_bytes {page_bytes}")
        self._registrar = registrar
        self._registered: list[int] = []
        self._end = weakref.finalize(self, _unregister, registrar, self._registered)
        self._mapping = _map(num_bytes)
        self.array: ByteArray = np.frombuffer(self._mapping, np.uint8)
        self.address: int = self.array.ctypes.data
        self.edges = chunk_edges(num_bytes, page_bytes, chunk_bytes)
        self.problem: str | None = None
        if numa_node is not None:
            _bind(self.address, num_bytes, numa_node)
        count = threads or min(usable_cores(), MAX_THREADS)
        with ThreadPoolExecutor(count, "kvpool-prefault") as pool:
            try:
                for start, end in self.chunks():
                    _touch(self.array, start, end, pool)
                    if self.problem is None:
                        self._register(start, end, fallback)
                    if progress is not None:
                        progress(end, num_bytes)
            except BaseException:
                self.close()
                raise

    @property
    def pinned(self) -> bool:
        """Whether all of it is registered."""
        return len(self._registered) == len(self.edges) - 1

    def chunks(self) -> Iterator[tuple[int, int]]:
        """[start, end) of each, in bytes."""
        return itertools.pairwise(self.edges)

    def _register(self, start: int, end: int, fallback: bool) -> None:
        try:
            self._registrar.register(self.address + start, end - start)
        except Exception as error:
            problem = _refusal(start, end, self.edges[-1], error)
            self.close()
            if not fallback:
                raise MemoryError(problem) from error
            self.problem = problem
        else:
            self._registered.append(self.address + start)

    def close(self) -> None:
        """Take the registrations back; nothing may be on its way any more. Twice is a no-op."""
        _unregister(self._registrar, self._registered)

    def __enter__(self) -> PinnedMemory:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


def _unregister(registrar: Registrar, addresses: list[int]) -> None:
    while addresses:
        # A GPU at its end takes nothing back; the registrations end with the process.
        with contextlib.suppress(RuntimeError):
            registrar.unregister(addresses.pop())


def _map(num_bytes: int) -> mmap.mmap:
    try:
        mapping = mmap.mmap(-1, num_bytes)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"host memory: {num_bytes} bytes cannot be mapped ({error}); lower host_bytes") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def _touch(array: ByteArray, start: int, end: int, pool: ThreadPoolExecutor) -> None:
    """Writes one byte of every system page, in several threads; NumPy lets the lock of the interpreter go."""

    def touch(first: int) -> None:
        array[first : min(first + PIECE_BYTES, end) : mmap.PAGESIZE] = 0

    list(pool.map(touch, range(start, end, PIECE_BYTES)))


def _bind(address: int, num_bytes: int, node: int) -> None:
    """The mapping's pages come from `node` alone."""
    number = _MBIND.get(platform.machine()) if sys.platform == "linux" else None
    if number is None:
        raise OSError(f"numa_node: {node} cannot be asked for on {sys.platform}, {platform.machine()}")
    if not 0 <= node < 1024:
        raise OSError(f"numa_node: {node} is not in 0..1023")
    mask = (ctypes.c_ulong * 17)()
    mask[node // 64] = 1 << node % 64
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = [ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.c_int(_MPOL_BIND)]
    if libc.syscall(ctypes.c_long(number), *arguments, mask, ctypes.c_ulong(1025), ctypes.c_uint(0)) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"numa_node: memory cannot be bound to node {node}: {os.strerror(error)}")


def _refusal(start: int, end: int, total: int, error: Exception) -> str:
    limit = locked_limit()
    shown = "unlimited" if limit is None else f"{limit} bytes"
    return (
        f"pinned memory: {end - start} bytes could not be registered ({error}), after {start} of {total} bytes in all; "
        f"the limit of locked memory (ulimit -l, RLIMIT_MEMLOCK) is {shown}. Raise it (ulimit -l unlimited; for a "
        "container --ulimit memlock=-1), or lower host_bytes"
    )

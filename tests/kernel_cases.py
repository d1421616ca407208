"""Launches that every kernel must get right, compared byte for byte with its NumPy twin.

`python tests/kernel_cases.py MODE LIBRARY...` runs them in processes of their own, as the sanitizers and the planted
bugs need it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cpu_kernels import KERNELS_OF, SIGNATURES, CpuKernels
from kvpool.mover.twins import TWINS

Bytes = npt.NDArray[np.uint8]
MAP_NORESERVE = 0x4000  # Linux; the module mmap has no name for it
GUARD = 64  # bytes on each side of an array, whose content must stay
GIB = 1 << 30


@dataclass(frozen=True)
class Case:
    """One launch. offset: bytes from a multiple of 16 to the base addresses. order: of the threads, see the shim."""

    kernel: str
    page_bytes: int
    num_pages: int
    grid: int
    threads: int
    order: int = 0
    offset: int = 0
    first_slot: int = 0  # slots lie in [first_slot, first_slot + 2 * num_pages)
    sparse: bool = False  # memory from the operating system, of which only touched pages exist
    one_pool: bool = False  # source and destination are the same memory

    def __str__(self) -> str:
        extras = "".join(
            f", {name} {value}"
            for name, value in (("offset", self.offset), ("first slot", self.first_slot), ("one pool", self.one_pool))
            if value
        )
        return (
            f"{self.kernel}: {self.num_pages} pages of {self.page_bytes} bytes, grid {self.grid} x {self.threads}, "
            f"order {self.order}{extras}"
        )


def _malloc(size: int) -> Bytes:
    """`size` bytes, exactly, from the allocator that a sanitizer watches. They live as long as the process."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    address = libc.malloc(max(size, 1))
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _release(array: Bytes) -> None:
    libc = ctypes.CDLL(None)
    libc.free.argtypes = [ctypes.c_void_p]
    libc.free(array.ctypes.data)


def _sparse(size: int) -> Bytes:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), np.uint8)


def _copied(array: Bytes) -> Bytes:
    """A copy that is aligned to 16 bytes, as NumPy's own are not on every Python."""
    whole = np.empty(array.size + 16, np.uint8)
    copy = whole[-whole.ctypes.data % 16 :][: array.size]
    copy[:] = array
    return copy


class Memory:
    """Bytes from a base address on, with guards around it where no sanitizer stands guard."""

    def __init__(self, case: Case, num_pages: int, random: np.random.Generator, guard: int) -> None:
        size = num_pages * case.page_bytes
        self.sparse = case.sparse
        self._whole = _sparse(size) if case.sparse else _malloc(guard + case.offset + size + guard)
        if not case.sparse:
            self._whole[:] = random.integers(0, 256, self._whole.size, np.uint8)
        self._before = None if case.sparse else self._whole.copy()
        self._skip = 0 if case.sparse else guard + case.offset
        self.data = self._whole[self._skip : self._skip + size]

    def fill(self, slots: npt.NDArray[np.int32], page_bytes: int, random: np.random.Generator) -> None:
        """Of sparse memory only the pages that are looked at exist."""
        if self.sparse:
            pages = self.data.reshape(-1, page_bytes)
            pages[slots] = random.integers(0, 256, (len(slots), page_bytes), np.uint8)

    def same_as(self, expected: Bytes | None) -> bool:
        """All bytes are as before the launch, but `data` as `expected` (None: as before too)."""
        assert self._before is not None
        if expected is not None:
            self._before[self._skip : self._skip + expected.size] = expected
        return bool(np.array_equal(self._whole, self._before))

    def close(self) -> None:
        if not self.sparse:
            _release(self._whole)


def _slots(case: Case, random: np.random.Generator) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Sources and destinations, all different: (n, n)."""
    both = case.first_slot + random.permutation(2 * case.num_pages).astype(np.int64)
    return both[: case.num_pages].astype(np.int32), both[case.num_pages :].astype(np.int32)


def run(kernels: CpuKernels, case: Case, guard: int = GUARD, seed: int = 0) -> None:
    """Raises AssertionError if a byte differs from what the twin does, inside or around the memories."""
    random = np.random.default_rng([seed, case.num_pages, case.page_bytes])
    src_slots, dst_slots = _slots(case, random)
    lists = len(SIGNATURES[case.kernel]) - 4
    pool_pages = case.first_slot + 2 * case.num_pages
    gathers, scatters = case.kernel.startswith("gather"), case.kernel.startswith("scatter")
    src = Memory(case, case.num_pages if scatters else pool_pages, random, guard)
    dst = src if case.one_pool else Memory(case, case.num_pages if gathers else pool_pages, random, guard)
    run_of = np.arange(case.num_pages, dtype=np.int32)
    src.fill(run_of if scatters else src_slots, case.page_bytes, random)
    slots = [src_slots, dst_slots] if lists == 2 else [dst_slots if scatters else src_slots]
    sizes = np.int64(case.page_bytes), np.int32(case.num_pages)

    given = [_malloc(4 * len(part)).view(np.int32) for part in slots]
    for copy, part in zip(given, slots, strict=True):
        copy[:] = part
    if case.sparse:
        _run_sparse(kernels, case, src.data, dst.data, given, run_of if gathers else dst_slots)
    else:
        expected = _copied(src.data if case.one_pool else dst.data)
        TWINS[case.kernel](_copied(src.data), expected, *slots, *map(int, sizes))
        kernels.launch(case.kernel, case.grid, case.threads, (src.data, dst.data, *given, *sizes), case.order)
        assert dst.same_as(expected), _difference(case, dst.data, expected)
        assert case.one_pool or src.same_as(None), f"{case}: the source changed"
    for copy, part in zip(given, slots, strict=True):
        assert np.array_equal(copy, part), f"{case}: a list of slots changed"
        _release(copy)
    src.close()
    if dst is not src:
        dst.close()


def _run_sparse(
    kernels: CpuKernels, case: Case, src: Bytes, dst: Bytes, given: list[npt.NDArray[np.int32]], dst_slots: Bytes
) -> None:
    """The twin writes the destination first; what it wrote is taken away, and the kernel must write it again."""
    sizes = np.int64(case.page_bytes), np.int32(case.num_pages)
    TWINS[case.kernel](src, dst, *given, *map(int, sizes))
    pages = dst.reshape(-1, case.page_bytes)
    expected = pages[dst_slots]
    assert expected.any(axis=1).all()
    pages[dst_slots] = 0
    kernels.launch(case.kernel, case.grid, case.threads, (src, dst, *given, *sizes), case.order)
    assert np.array_equal(pages[dst_slots], expected), f"{case}: pages differ from the twin's"


def _difference(case: Case, found: Bytes, expected: Bytes) -> str:
    wrong = np.flatnonzero(found != expected)
    if not wrong.size:
        return f"{case}: bytes around the destination changed"
    page, byte = divmod(int(wrong[0]), case.page_bytes)
    return f"{case}: {wrong.size} bytes differ from the twin's, the first is byte {byte} of page {page}"


def small(kernel: str, mode: str) -> Iterator[Case]:
    """Sizes, lists, grids, blocks and orders around every edge that the walk has."""
    vector = kernel.endswith("_u128")
    sizes = (16, 48, 1008, 4112) if vector else (1, 3, 17, 255, 1000)
    for page_bytes in sizes:
        yield Case(kernel, page_bytes, 0, 3, 32)  # an empty list
        yield Case(kernel, page_bytes, 1, 1, 1)  # one page, serial
        yield Case(kernel, page_bytes, 1, 4, 32)  # one page, more blocks than rows
        yield Case(kernel, page_bytes, 5, 1, 1)
        yield Case(kernel, page_bytes, 7, 2, 33, order=1)
        yield Case(kernel, page_bytes, 13, 5, 64, order=5)
        if kernel.startswith("copy"):
            yield Case(kernel, page_bytes, 9, 3, 32, one_pool=True)
    # More pages than a window holds: in one block, and where stretches end inside windows.
    page_bytes = 48 if vector else 5
    for grid, threads, order in ((1, 32, 0), (1, 64, 1), (2, 33, 7), (3, 8, 1)):
        yield Case(kernel, page_bytes, 700, grid, threads, order)
    if not vector:
        for offset in (1, 8, 15):
            yield Case(kernel, 32, 6, 2, 32, offset=offset)  # whole vectors that are not aligned
            yield Case(kernel, 33, 6, 2, 32, offset=offset)
    if mode != "tsan":  # which has a thread per block, and knows of few threads
        yield Case(kernel, 4096 if vector else 999, 40, 4, 256, order=3)
        yield Case(kernel, page_bytes, 300, 200, 32)


def beyond_2_gib(kernel: str) -> Iterator[Case]:
    """Byte offsets past 2^31 and 2^32, for vectors past 2^31 units of 16 bytes as well."""
    page_bytes = 4112 if kernel.endswith("_u128") else 4099
    for gib in (2, 4, *((32,) if kernel.endswith("_u128") else ())):
        yield Case(kernel, page_bytes, 3, 2, 32, first_slot=gib * GIB // page_bytes + 1, sparse=True)


def drawn(kernel: str, seed: int, mode: str, count: int = 20) -> Iterator[Case]:
    """Random launches, by seed."""
    random = np.random.default_rng([seed, len(kernel)])
    for _ in range(count):
        vector = kernel.endswith("_u128")
        units = int(random.choice([1, 2, 31, 64, 100, 257]))
        yield Case(
            kernel,
            16 * units if vector else units,
            int(random.choice([0, 1, 2, 30, 256, 257, 513])) if units < 100 else int(random.integers(0, 20)),
            grid=int(random.integers(1, 9)),
            threads=int(random.choice([1, 7, 32, 48, 64] if mode == "tsan" else [1, 7, 32, 48, 128, 256])),
            order=int(random.integers(0, 9)),
            offset=0 if vector else int(random.integers(0, 16)),
        )


def cases(kernel: str, mode: str, seed: int = 0) -> list[Case]:
    found = [*small(kernel, mode), *drawn(kernel, seed, mode, 8 if mode == "tsan" else 20)]
    return found if mode == "tsan" else found + list(beyond_2_gib(kernel))


def run_all(library: Path, mode: str, family: str | None) -> None:
    """Every case of every kernel, or of those of one file; says which before it runs, and in the end that all hold."""
    kernels = CpuKernels(library)
    guard = GUARD if mode == "plain" else 0
    count = 0
    for kernel in SIGNATURES if family is None else KERNELS_OF[family]:
        for case in cases(kernel, mode):
            print(f"case {case}", flush=True)
            run(kernels, case, guard)
            count += 1
    print(f"all {count} cases hold", flush=True)


def main(mode: str, *given: str) -> None:
    """Each of `given` is LIBRARY or LIBRARY:FAMILY, and gets a process of its own, forked; what it says, and how it
    ends, goes to LIBRARY.out and LIBRARY.code."""
    for each in given:
        name, _, family = each.partition(":")
        library = Path(name)
        child = os.fork()
        if child == 0:
            with library.with_suffix(".out").open("w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            code = 1
            try:
                run_all(library, mode, family or None)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        library.with_suffix(".code").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main(*sys.argv[1:])

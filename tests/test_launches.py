"""Which kernel runs with which grid."""

from __future__ import annotations

import re

import numpy as np
import pytest

import cpu_kernels
from kvpool import _core
from kvpool.mover.launches import FAMILY, KERNELS, ROWS, THREADS, VECTOR, Launch, plan_launch
from kvpool.mover.twins import TWINS


@pytest.mark.parametrize(
    ("operation", "addresses", "page_bytes", "num_pages", "expected"),
    [
        ("copy_pages", (0, 16), 4096, 1, Launch("copy_pages", "copy_pages_u128", 1, 256)),
        ("copy_pages", (0, 16), 2 << 20, 1000, Launch("copy_pages", "copy_pages_u128", 12, 256)),
        ("copy_pages", (0, 8), 4096, 1, Launch("copy_pages", "copy_pages_u8", 4, 256)),
        ("copy_pages", (0, 0), 4097, 1, Launch("copy_pages", "copy_pages_u8", 5, 256)),
        ("copy_ring", (0, 0), 16384, 2, Launch("copy_ring", "copy_ring_u128", 2, 256)),
        ("copy_ring", (0, 0), 24, 1, Launch("copy_pages", "copy_pages_u8", 1, 256)),
        ("gather_pages", (64, 0), 16400, 1, Launch("gather_pages", "gather_pages_u128", 2, 256)),
        ("scatter_pages", (64, 1), 16, 1, Launch("gather_pages", "scatter_pages_u8", 1, 256)),
        ("copy_pages", (0, 0), 16, 0, None),
    ],
)
def test_choice(
    operation: str, addresses: tuple[int, int], page_bytes: int, num_pages: int, expected: Launch | None
) -> None:
    assert plan_launch(operation, addresses, page_bytes, num_pages, max_blocks=12) == expected


@pytest.mark.parametrize(
    ("operation", "page_bytes", "num_pages", "max_blocks"),
    [
        ("move", 16, 1, 1),
        ("copy_pages", 0, 1, 1),
        ("copy_pages", 16, -1, 1),
        ("copy_pages", 16, 2**31, 1),
        ("copy_pages", 16, 1, 0),
    ],
)
def test_numbers_out_of_range_are_refused(operation: str, page_bytes: int, num_pages: int, max_blocks: int) -> None:
    with pytest.raises(ValueError):
        plan_launch(operation, (0, 0), page_bytes, num_pages, max_blocks)


def test_constants_are_those_of_the_kernels() -> None:
    walk = (cpu_kernels.KERNELS / "walk.cu").read_text()
    assert re.search(r"THREADS = (\d+)", walk)[1] == str(THREADS)
    assert re.search(r"IN_FLIGHT = (\d+)", walk)[1] == str(ROWS)
    assert re.search(r"alignas\((\d+)\) vec16", (cpu_kernels.KERNELS / "ptx.cu").read_text())[1] == str(VECTOR)


def test_every_planned_kernel_is_in_its_family() -> None:
    planned = {
        (launch.family, launch.kernel)
        for operation in FAMILY
        for address in (0, 1)
        if (launch := plan_launch(operation, (address, 0), 16, 1, 1))
    }
    for family, kernel in planned:
        assert kernel in cpu_kernels.signatures(_core.kernel_source(family))
    assert {kernel for _, kernel in planned} == set(cpu_kernels.SIGNATURES)
    for family, kernels in KERNELS.items():
        assert sorted(kernels) == sorted(cpu_kernels.KERNELS_OF[family])


def test_planned_launches_do_what_the_twin_does() -> None:
    kernels = cpu_kernels.plain_kernels()
    random = np.random.default_rng(7)
    for page_bytes in (16, 4096, 4097, 24, 65_536):
        slots = random.permutation(20).astype(np.int32)
        src, dst, expected = random.integers(0, 256, (3, 20 * page_bytes), np.uint8)
        launch = plan_launch("copy_ring", (src.ctypes.data, dst.ctypes.data), page_bytes, 9, max_blocks=3)
        assert launch is not None
        arguments = slots[:9], slots[9:18], np.int64(page_bytes), np.int32(9)
        expected[:] = dst
        TWINS["copy_pages_u8"](src, expected, *arguments)
        kernels.launch(launch.kernel, launch.grid, launch.threads, (src, dst, *arguments))
        assert np.array_equal(dst, expected)

"""Which kernel copies given pages, and with how many blocks. Plain arithmetic: nothing here needs a GPU."""

from __future__ import annotations

from dataclasses import dataclass

VECTOR = 16  # bytes of one load of the kernels named _u128
THREADS = 256  # of a block, the most that kernels/walk.cu takes
ROWS = 4  # rows of units that a block should have at least: kernels/walk.cu keeps as many loads in flight
FAMILY = {
    "copy_pages": "copy_pages",
    "copy_ring": "copy_ring",
    "gather_pages": "gather_pages",
    "scatter_pages": "gather_pages",
}
KERNELS = {  # of each family
    "copy_pages": ("copy_pages_u128", "copy_pages_u8"),
    "copy_ring": ("copy_ring_u128",),
    "gather_pages": ("gather_pages_u128", "gather_pages_u8", "scatter_pages_u128", "scatter_pages_u8"),
}


@dataclass(frozen=True, slots=True)
class Launch:
    """kernel: entry in the source of `family`. grid: blocks. threads: of a block."""

    family: str
    kernel: str
    grid: int
    threads: int


def plan_launch(
    operation: str, addresses: tuple[int, int], page_bytes: int, num_pages: int, max_blocks: int
) -> Launch | None:
    """How to run `operation` ("copy_pages", "copy_ring", "gather_pages", "scatter_pages") on `num_pages` pages.

    addresses: bases of source and destination. 16 bytes at a time where both and `page_bytes` (bytes) allow it, else
    byte by byte; the ring has no such form, so `copy_pages` stands in. At most `max_blocks` blocks, fewer where there
    is little to do; None: nothing to do. ValueError: numbers out of range.
    """
    if operation not in FAMILY:
        raise ValueError(f"operation: {operation!r} is none of {sorted(FAMILY)}")
    if page_bytes < 1 or max_blocks < 1 or not 0 <= num_pages < 2**31:
        raise ValueError(
            f"page_bytes {page_bytes} and max_blocks {max_blocks} must be positive, num_pages {num_pages} in 0..2**31-1"
        )
    if num_pages == 0:
        return None
    aligned = page_bytes % VECTOR == 0 and all(address % VECTOR == 0 for address in addresses)
    if operation == "copy_ring" and not aligned:
        operation = "copy_pages"
    units = num_pages * page_bytes // (VECTOR if aligned else 1)
    blocks = -(-units // (THREADS * ROWS))
    kernel = f"{operation}_{'u128' if aligned else 'u8'}"
    return Launch(FAMILY[operation], kernel, min(blocks, max_blocks), THREADS)

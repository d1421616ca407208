"""What each kernel of kernels/ does, in NumPy, with the kernel's own signature: the definition that tests compare with.

`src`, `dst`, `pool`, `staging`: memory from the pointer on, one-dimensional uint8; a page is `page_bytes` of it at
`slot * page_bytes`. Slot lists: int32, of which the first `num_pages` count. What a kernel takes for granted (its row
in kernels/README.md) is checked here: ValueError.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Slots = npt.NDArray[np.int32]
VECTOR = 16  # bytes that the kernels named _u128 load at once


def _pages(memory: Bytes, page_bytes: int) -> Bytes:
    """The memory as whole pages, a view: (n, page_bytes)."""
    return memory[: memory.size // page_bytes * page_bytes].reshape(-1, page_bytes)


def _copy(src: Bytes, dst: Bytes, src_slots: Slots, dst_slots: Slots, page_bytes: int) -> None:
    if page_bytes < 1:
        raise ValueError(f"page_bytes: {page_bytes} is not positive")
    sources, targets = _pages(src, page_bytes), _pages(dst, page_bytes)
    for name, slots, pages in (("source", src_slots, sources), ("destination", dst_slots, targets)):
        if slots.size and not 0 <= slots.min() <= slots.max() < len(pages):
            raise ValueError(f"{name} slots {slots.min()}..{slots.max()} are not all in 0..{len(pages) - 1}")
    if len(np.unique(dst_slots)) < len(dst_slots):
        raise ValueError("a destination slot occurs twice")
    if np.shares_memory(src, dst, max_work=-1) and np.intersect1d(src_slots, dst_slots).size:
        raise ValueError("a slot is source and destination")
    targets[dst_slots] = sources[src_slots]


def _aligned(page_bytes: int, *memories: Bytes) -> None:
    if page_bytes % VECTOR or any(memory.ctypes.data % VECTOR for memory in memories):
        raise ValueError(f"page_bytes {page_bytes} and both addresses must be multiples of {VECTOR}")


def copy_pages_u8(src: Bytes, dst: Bytes, src_slots: Slots, dst_slots: Slots, page_bytes: int, num_pages: int) -> None:
    """Page `src_slots[i]` of `src` to page `dst_slots[i]` of `dst`, for i < num_pages."""
    _copy(src, dst, src_slots[:num_pages], dst_slots[:num_pages], page_bytes)


def copy_pages_u128(
    src: Bytes, dst: Bytes, src_slots: Slots, dst_slots: Slots, page_bytes: int, num_pages: int
) -> None:
    """`copy_pages_u8` of what is aligned to 16 bytes."""
    _aligned(page_bytes, src, dst)
    copy_pages_u8(src, dst, src_slots, dst_slots, page_bytes, num_pages)


def copy_ring_u128(src: Bytes, dst: Bytes, src_slots: Slots, dst_slots: Slots, page_bytes: int, num_pages: int) -> None:
    """`copy_pages_u128`; how the bytes travel is the kernel's matter."""
    copy_pages_u128(src, dst, src_slots, dst_slots, page_bytes, num_pages)


def gather_pages_u8(pool: Bytes, staging: Bytes, slots: Slots, page_bytes: int, num_pages: int) -> None:
    """Page `slots[i]` of `pool` to page i of `staging`, for i < num_pages."""
    _copy(pool, staging, slots[:num_pages], np.arange(num_pages, dtype=np.int32), page_bytes)


def gather_pages_u128(pool: Bytes, staging: Bytes, slots: Slots, page_bytes: int, num_pages: int) -> None:
    """`gather_pages_u8` of what is aligned to 16 bytes."""
    _aligned(page_bytes, pool, staging)
    gather_pages_u8(pool, staging, slots, page_bytes, num_pages)


def scatter_pages_u8(staging: Bytes, pool: Bytes, slots: Slots, page_bytes: int, num_pages: int) -> None:
    """Page i of `staging` to page `slots[i]` of `pool`, for i < num_pages."""
    _copy(staging, pool, np.arange(num_pages, dtype=np.int32), slots[:num_pages], page_bytes)


def scatter_pages_u128(staging: Bytes, pool: Bytes, slots: Slots, page_bytes: int, num_pages: int) -> None:
    """`scatter_pages_u8` of what is aligned to 16 bytes."""
    _aligned(page_bytes, staging, pool)
    scatter_pages_u8(staging, pool, slots, page_bytes, num_pages)


TWINS: dict[str, Callable[..., None]] = {
    twin.__name__: twin
    for twin in (
        copy_pages_u8,
        copy_pages_u128,
        copy_ring_u128,
        gather_pages_u8,
        gather_pages_u128,
        scatter_pages_u8,
        scatter_pages_u128,
    )
}

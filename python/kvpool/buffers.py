"""The engine's own memory as a pool's pages: (num_slots + 1, page_bytes) bytes, without a copy.

CPU memory comes as an array of NumPy or through DLPack; a GPU's through `__cuda_array_interface__` (CuPy, PyTorch,
Numba) or DLPack. Errors name the pool, what was given and the remedy; nothing is read or written here.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvpool.arguments import ByteArray
from kvpool.errors import ConfigError

CUDA_DEVICE = 2  # DLPack's number of GPU memory
ALIGNMENT = 16  # bytes: what the kernels load and store at a time


@dataclass(frozen=True, slots=True)
class GpuBytes:
    """num_bytes of contiguous, writable memory from `address` on, as its owner describes them."""

    address: int
    num_bytes: int


def given_buffers(buffers: Mapping[str, Any] | None, pools: Collection[str]) -> dict[str, Any]:
    """As a dict; ConfigError for a pool that there is not, or that is given nothing."""
    if buffers is None:
        return {}
    if not isinstance(buffers, Mapping):
        raise ConfigError(f"buffers: a {type(buffers).__name__} is not a mapping; give {{pool: array}}")
    given = dict(buffers)
    unknown = sorted(set(given) - set(pools), key=str)
    if unknown:
        raise ConfigError(f"buffers: unknown pool {unknown[0]!r}; there are {sorted(pools)}")
    if nothing := [name for name, buffer in given.items() if buffer is None]:
        raise ConfigError(f"buffers[{nothing[0]!r}]: None is no memory; leave the pool out, and the manager allocates")
    return given


def check_apart(places: Mapping[str, tuple[int, int]]) -> None:
    """ConfigError if two pools, {name: (address, bytes)}, share memory."""
    ordered = sorted(places.items(), key=lambda each: each[1])
    for (one, (address, num_bytes)), (other, (start, _)) in itertools.pairwise(ordered):
        if start < address + num_bytes:
            raise ConfigError(
                f"buffers[{other!r}]: begins at {start:#x}, inside the memory of pool {one!r} ({num_bytes} bytes from "
                f"{address:#x}); give each pool memory of its own"
            )


def check_size(pool: str, num_bytes: int, shape: tuple[int, int]) -> None:
    """ConfigError unless there are just so many bytes as `shape`, (num_slots + 1, page_bytes), needs."""
    if num_bytes != shape[0] * shape[1]:
        raise ConfigError(
            f"buffers[{pool!r}]: {num_bytes} bytes, but {shape[0]} pages (num_slots + 1) of "
            f"{shape[1]} bytes need {shape[0] * shape[1]}"
        )


def as_pages(buffer: Any, pool: str, shape: tuple[int, int]) -> ByteArray:
    """CPU memory as pages."""
    try:
        array = buffer if isinstance(buffer, np.ndarray) else np.from_dlpack(buffer)
    except (AttributeError, TypeError, RuntimeError, BufferError) as error:
        raise ConfigError(f"buffers[{pool!r}]: not an array in CPU memory: {error}") from None
    if not array.flags.c_contiguous or not array.flags.writeable:
        raise ConfigError(f"buffers[{pool!r}]: must be writable and C-contiguous")
    check_size(pool, array.nbytes, shape)
    pages: ByteArray = array.reshape(-1).view(np.uint8).reshape(shape)
    return pages


def gpu_bytes(buffer: Any, pool: str, shape: tuple[int, int]) -> GpuBytes:
    """What the `__cuda_array_interface__` of an array says of its memory, if that can be a pool's pages."""
    try:
        interface = buffer.__cuda_array_interface__
        address, read_only = interface["data"]
        extents, item = tuple(interface["shape"]), np.dtype(interface["typestr"]).itemsize
        strides, mask = interface.get("strides"), interface.get("mask")
    except Exception as error:  # whatever a library raises for a dtype of its own, a gradient, a layout
        raise ConfigError(
            f"buffers[{pool!r}]: its __cuda_array_interface__ cannot be read ({type(error).__name__}: {error}); give "
            "it as bytes (in PyTorch: tensor.detach().view(torch.uint8))"
        ) from None
    why = "it has a mask" if mask is not None else "it is read-only" if read_only else None
    if why is None and not _is_contiguous(extents, strides, item):
        why = f"its shape is {extents}, its strides are {strides} bytes"
    if why is not None:
        raise ConfigError(f"buffers[{pool!r}]: must be writable and C-contiguous; {why}")
    check_size(pool, item * int(np.prod(extents, dtype=np.int64)), shape)
    if address % ALIGNMENT:
        raise ConfigError(
            f"buffers[{pool!r}]: address {address:#x} is no multiple of {ALIGNMENT}; give memory that begins at one, "
            "as all that allocators of GPU memory hand out does"
        )
    return GpuBytes(int(address), shape[0] * shape[1])


def _is_contiguous(extents: tuple[int, ...], strides: tuple[int, ...] | None, item: int) -> bool:
    """In the order of C; a dimension of one element may have any stride."""
    if strides is None:
        return True
    due = item
    for extent, stride in zip(reversed(extents), reversed(strides), strict=True):
        if extent != 1 and stride != due:
            return False
        due *= extent
    return True


def is_on_gpu(buffer: Any, pool: str) -> bool:
    """Whether it has a `__cuda_array_interface__`; False: it is GPU memory behind DLPack. ConfigError: neither."""
    try:
        if hasattr(buffer, "__cuda_array_interface__"):
            return True
    except Exception:  # it has one, which raises; `gpu_bytes` says what
        return True
    if not hasattr(buffer, "__dlpack_device__"):
        raise ConfigError(
            f"buffers[{pool!r}]: a {type(buffer).__name__} is no array of GPU memory; it has neither "
            "__cuda_array_interface__ nor DLPack"
        )
    kind, number = (int(each) for each in buffer.__dlpack_device__())
    if kind != CUDA_DEVICE:
        raise ConfigError(
            f"buffers[{pool!r}]: the {type(buffer).__name__} is not in GPU memory (DLPack device {kind}, {number}); "
            "give an array of CuPy or a tensor on the GPU, or leave buffers out and the manager allocates"
        )
    return False

"""Every call that kvpool makes to CUDA, through CuPy: streams, events, copies, launches, registrations.

Imports CuPy when it is constructed, and takes one GPU. Addresses are integers; memory that is given to an asynchronous
call must live until the call is over, which is the caller's business. A CUDA error is a RuntimeError of CuPy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvpool import _core
from kvpool.mover.batch_copy import BatchCopy, Words
from kvpool.mover.launches import KERNELS, Launch

OTHER_ADDRESSES = "registered host memory has other addresses on this GPU (CanUseHostPointerForRegisteredMem is 0)"
OPTIONS = ("--std=c++17",)
_DEFAULT = 4  # cudaMemcpyDefault: the direction follows from the addresses
_SAME_ADDRESSES = 91  # cudaDevAttrCanUseHostPointerForRegisteredMem
_NULL_STREAM = 0
_MEMORY_OF_DEVICE = 2  # cudaMemoryTypeDevice
_PORTABLE_AND_MAPPED = 1 | 2  # cudaHostRegister: for every context, and in the device's addresses


class CudaRuntime:
    """One GPU. Calls may come from any thread."""

    def __init__(self, ordinal: int = 0) -> None:
        import cupy

        self._cupy: Any = cupy
        self._device = cupy.cuda.Device(ordinal)
        self._functions: dict[str, Any] = {}
        self._batch: BatchCopy | None = None
        self._batch_problem: str | None = None
        self._device.use()

    @property
    def compute_capability(self) -> int:
        """90 is 9.0."""
        return int(self._device.compute_capability)

    @property
    def same_addresses(self) -> bool:
        """Whether registered host memory has its own addresses on the GPU too; else only copies can be given them."""
        return bool(self._cupy.cuda.runtime.deviceGetAttribute(_SAME_ADDRESSES, self._device.id))

    def stream(self) -> Any:
        """A new stream that does not wait for the default one."""
        with self._device:
            return self._cupy.cuda.Stream(non_blocking=True)

    def external_stream(self, address: int) -> Any:
        """Somebody else's stream, by its address."""
        return self._cupy.cuda.ExternalStream(address)

    def event(self, timing: bool = False) -> Any:
        """A new event, not recorded yet."""
        with self._device:
            return self._cupy.cuda.Event(disable_timing=not timing)

    def record(self, event: Any, stream: Any) -> None:
        """The event stands for all that the stream was given so far."""
        event.record(stream)

    def wait(self, stream: Any, event: Any) -> None:
        """What the stream is given from now on waits for the event's latest record; without one for nothing."""
        stream.wait_event(event)

    def is_done(self, event: Any) -> bool:
        """Whether the event's latest record is reached; True if there was none."""
        return bool(event.done)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Between two timing events that are reached."""
        return float(self._cupy.cuda.get_elapsed_time(start, end))

    def copy_async(self, target: int, source: int, num_bytes: int, stream: Any) -> None:
        """By the copy engine, from and to device memory or registered host memory."""
        self._cupy.cuda.runtime.memcpyAsync(target, source, num_bytes, _DEFAULT, stream.ptr)

    def batch_problem(self) -> str | None:
        """Why `copy_batch` cannot be used, None: it can. The first call looks for it, and tries it on a few bytes."""
        if not self.same_addresses:  # such GPUs were seen to fault
            return OTHER_ADDRESSES
        if self._batch is None and self._batch_problem is None:
            try:
                self._batch = BatchCopy()
                self._batch_problem = self._try_batch()
            except RuntimeError as error:
                self._batch_problem = str(error)
        return self._batch_problem

    def _try_batch(self) -> str | None:
        memory, stream = self.allocate(64), self.stream()
        self.upload(np.arange(64, dtype=np.uint8), memory.ptr)
        to, of = (memory.ptr + np.array(at, np.uint64) for at in ((0, 16), (32, 48)))
        self.copy_batch(to, of, np.full(2, 16, np.uint64), stream)
        stream.synchronize()
        wrong = not np.array_equal(self.download(memory.ptr, 32), np.arange(32, 64, dtype=np.uint8))
        return "cuMemcpyBatchAsync: a trial copy left wrong bytes" if wrong else None

    def copy_batch(self, targets: Words, sources: Words, sizes: Words, stream: Any) -> None:
        """As `copy_async` for each of at most `batch_copy.MOST`, in any order, by one call of the driver.

        Only where `batch_problem` is None.
        """
        assert self._batch is not None
        with self._device:
            self._device.use()  # the driver wants the context to be current, which `with` leaves to CUDA's runtime
            self._batch(targets, sources, sizes, stream.ptr)

    def compile(self, family: str) -> None:
        """Makes the kernels of a family ready; the first launch does it else."""
        with self._device:
            module = self._cupy.RawModule(code=_core.kernel_source(family), options=OPTIONS)
            for kernel in KERNELS[family]:
                self._functions[kernel] = module.get_function(kernel)

    def launch(self, launch: Launch, arguments: Sequence[Any], stream: Any) -> None:
        """A kernel of kernels/: addresses as int, numbers as NumPy scalars of the kernel's own types."""
        if launch.kernel not in self._functions:
            self.compile(launch.family)
        with self._device, stream:
            self._functions[launch.kernel]((launch.grid,), (launch.threads,), tuple(arguments))

    def allocate(self, num_bytes: int) -> Any:
        """Device memory; `.ptr` is its address. It is free when the object is gone."""
        with self._device:
            return self._cupy.cuda.alloc(num_bytes)

    def zeros(self, shape: tuple[int, int]) -> tuple[Any, int]:
        """Zeroed device memory as CuPy's array of uint8, and its address; returns when it is zero."""
        with self._device:
            array = self._cupy.zeros(shape, dtype=np.uint8)
        self.synchronize()
        return array, int(array.data.ptr)

    def from_dlpack(self, buffer: Any) -> Any:
        """Somebody else's device memory as CuPy's array, without a copy. It has a `__cuda_array_interface__`."""
        with self._device:
            return self._cupy.from_dlpack(buffer)

    def wrap(self, address: int, shape: tuple[int, int], owner: Any) -> Any:
        """Somebody else's device memory as CuPy's array of uint8, which keeps `owner` and frees nothing."""
        memory = self._cupy.cuda
        with self._device:
            block = memory.UnownedMemory(address, shape[0] * shape[1], owner, self._device.id)
            return self._cupy.ndarray(shape, np.uint8, memory.MemoryPointer(block, 0))

    def gpu_of(self, address: int) -> int | None:
        """The GPU whose memory, from cudaMalloc or the like, is at this address; None: it is other memory."""
        found = self._cupy.cuda.runtime.pointerGetAttributes(address)
        return int(found.device) if found.type == _MEMORY_OF_DEVICE else None

    @property
    def ordinal(self) -> int:
        """N of "cuda:N"."""
        return int(self._device.id)

    def clear(self, address: int, num_bytes: int) -> None:
        """Zeros in device memory, behind all that the GPU was given; returns when they are there."""
        with self._device:
            self.synchronize()
            self._cupy.cuda.runtime.memset(address, 0, num_bytes)
        self.synchronize()

    def upload(self, array: np.ndarray[Any, Any], target: int) -> None:
        """Any host array to device memory; returns when it is there."""
        data = np.ascontiguousarray(array)
        with self._device:  # the call may return when pageable memory is read: the rest of the way is the null stream's
            self._cupy.cuda.runtime.memcpy(target, data.ctypes.data, data.nbytes, _DEFAULT)
            self._cupy.cuda.runtime.streamSynchronize(_NULL_STREAM)

    def download(self, source: int, num_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Device memory to a new host array; returns when it is there."""
        data = np.empty(num_bytes, np.uint8)
        self._cupy.cuda.runtime.memcpy(data.ctypes.data, source, num_bytes, _DEFAULT)
        return data

    def register(self, address: int, num_bytes: int) -> None:
        """Page-lock host memory and map it into the GPU's addresses."""
        with self._device:
            self._cupy.cuda.runtime.hostRegister(address, num_bytes, _PORTABLE_AND_MAPPED)

    def unregister(self, address: int) -> None:
        """Of the address that was registered."""
        with self._device:
            self._cupy.cuda.runtime.hostUnregister(address)

    def synchronize(self) -> None:
        """Wait for everything that the GPU was given."""
        self._device.synchronize()

    def matrix_multiply(self, n: int) -> Any:
        """A function that multiplies two n x n matrices of float16 on a given stream: what a model's kernels do."""
        cupy = self._cupy
        with self._device:
            left, right, out = (cupy.ones((n, n), dtype=np.float16) for _ in range(3))

        def multiply(stream: Any) -> None:
            with self._device, stream:
                cupy.matmul(left, right, out=out)

        return multiply

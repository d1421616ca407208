"""A stand-in for the part of CuPy that kvpool uses, with CUDA's semantics and the real kernels, on the CPU.

Streams are queues. What a stream was given runs when somebody waits, one piece at a time, in an order that the seed
draws among the streams whose next piece may run: any order that CUDA allows can come up, and a missing wait shows.

- A wait binds to the event's latest record at the moment of the call; an event without a record holds nobody up.
- Arguments of launches and copies are read when they are given; memory is read and written when they run.
- A synchronous copy waits for no stream: all of kvpool's are non-blocking. From host memory that is not registered it
  returns when that is read; the bytes arrive no sooner than somebody waits for the null stream.
- Copies reach device memory that is allocated and host memory that is registered, each within one of them; memory that
  is freed, or no longer registered, before they run is a fault. A fault is sticky: every later call fails.
"""

from __future__ import annotations

import ctypes
import random
import threading
import types
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cpu_kernels import CpuKernels, signatures

ALIGNMENT = 512  # of device memory


class CUDARuntimeError(RuntimeError):
    """As cupy.cuda.runtime.CUDARuntimeError."""


@dataclass(eq=False)
class Record:
    """One recording of an event."""

    done: bool = False
    at_ms: float = 0.0


@dataclass(eq=False)
class Work:
    """A piece of a stream's queue: may run once `after` is done."""

    run: Callable[[], None]
    after: Record | None = None
    cost_ms: float = 0.0


@dataclass
class World:
    """Streams, memory and faults of one fake GPU."""

    kernels: CpuKernels
    seed: int = 0
    devices: int = 1
    capability: str = "90"
    pinned_limit: int = 1 << 50
    fault_at: int | None = None  # that piece of work fails, counted from 0
    lazy: bool = False  # work runs for those who wait only, not for those who ask
    memory: int = 1 << 50  # bytes of device memory
    same_addresses: bool = True  # registered host memory is where it is on the GPU too
    waiting: bool = True  # False: whoever waits for the GPU fails
    slow: bool = False  # work seldom runs for those who ask
    ran: int = 0
    launches: list[str] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)  # copies of each batched copy
    kept: list[Any] = field(default_factory=list)  # what must live as long as this
    now_ms: float = 0.0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.lock = threading.RLock()
        self.queues: list[deque[Work]] = []
        self.streams: dict[int, Stream] = {}
        self.ranges: dict[int, int] = {}  # address -> bytes: device memory and registered host memory
        self.registered: dict[int, int] = {}
        self.owners: dict[int, int] = {}  # address of device memory -> GPU
        self.graveyard: list[Any] = []  # freed device memory: touching it must not crash the process
        self.fault: str | None = None
        self.arriving: list[tuple[int, bytes]] = []  # of synchronous copies
        self.current = threading.local()

    def check(self) -> None:
        if self.fault is not None:
            raise CUDARuntimeError(self.fault)

    def covers(self, address: int, num_bytes: int) -> bool:
        return any(start <= address and address + num_bytes <= start + size for start, size in self.ranges.items())

    def reaches(self, address: int) -> bool:
        """Whether a kernel, or a batched copy, may be given an address."""
        host = any(start <= address < start + size for start, size in self.registered.items())
        return self.covers(address, 1) and (self.same_addresses or not host)

    def memory_at(self, address: int) -> tuple[int, int]:
        """(cudaMemoryType, GPU) of an address: 0 unknown, 1 registered host memory, 2 device memory."""
        for start, size in self.ranges.items():
            if start <= address < start + size:
                return (1, 0) if start in self.registered else (2, self.owners[start])
        return 0, -2

    @property
    def gpu(self) -> int:
        """The calling thread's current device."""
        stack: list[int] = self.current.__dict__.setdefault("devices", [0])
        return stack[-1]

    def ready(self) -> list[deque[Work]]:
        return [queue for queue in self.queues if queue and (queue[0].after is None or queue[0].after.done)]

    def arrive(self) -> None:
        """The null stream is at its end."""
        for address, content in self.arriving:
            ctypes.memmove(address, content, len(content))
        self.arriving.clear()

    def step(self) -> bool:
        """Runs one piece of some stream; False: none may run."""
        ready = self.ready()
        if not ready:
            return False
        work = self.random.choice(ready).popleft()
        self.ran += 1
        self.now_ms += work.cost_ms
        if self.fault_at == self.ran - 1:
            self.fault = "cudaErrorIllegalAddress: an illegal memory access was encountered"
            self.check()
        try:
            work.run()
        except CUDARuntimeError as error:
            self.fault = str(error)
            raise
        return True

    def steps_per_question(self) -> int:
        """How much time passes when somebody asks whether an event is reached."""
        if self.lazy:
            return 0
        return self.random.random() < 0.1 if self.slow else self.random.randrange(3)

    def run_until(self, condition: Callable[[], bool]) -> None:
        assert self.waiting, "the host waits for the GPU"
        with self.lock:
            self.check()
            while not condition():
                assert self.step(), "streams wait for each other: nothing can run"

    def give(self, stream: Stream, work: Work) -> None:
        with self.lock:
            self.check()
            stream.queue.append(work)


class Stream:
    def __init__(self, world: World, null: bool = False, non_blocking: bool = False, ptds: bool = False) -> None:
        assert non_blocking, "kvpool's streams must not wait for the default one"
        self.world, self.queue = world, deque[Work]()
        with world.lock:
            world.check()
            world.queues.append(self.queue)
            self.ptr = len(world.queues)
            world.streams[self.ptr] = self

    def __enter__(self) -> Stream:
        stack = self.world.current.__dict__.setdefault("stack", [])
        stack.append(self)
        return self

    def __exit__(self, *args: object) -> None:
        self.world.current.stack.pop()

    def wait_event(self, event: Event) -> None:
        if event.latest is not None:
            self.world.give(self, Work(lambda: None, after=event.latest))

    def record(self, event: Event) -> Event:
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.world.run_until(lambda: not self.queue)

    @property
    def done(self) -> bool:
        self.world.check()
        return not self.queue


class Event:
    def __init__(self, world: World, block: bool = False, disable_timing: bool = False) -> None:
        world.check()
        self.world, self.timed, self.latest = world, not disable_timing, None

    latest: Record | None

    def record(self, stream: Stream) -> None:
        record = Record()

        def reach() -> None:
            record.done, record.at_ms = True, self.world.now_ms

        self.world.give(stream, Work(reach))
        self.latest = record

    def synchronize(self) -> None:
        record = self.latest
        self.world.run_until(lambda: record is None or record.done)

    @property
    def done(self) -> bool:
        """Asking lets time pass: some work runs first, unless the world is lazy."""
        with self.world.lock:
            self.world.check()
            for _ in range(self.world.steps_per_question()):
                self.world.step()
            return self.latest is None or self.latest.done


class Device:
    def __init__(self, world: World, ordinal: int = 0) -> None:
        self.world, self.id = world, ordinal

    def use(self) -> None:
        if not 0 <= self.id < self.world.devices:
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

    def __enter__(self) -> Device:
        self.use()
        self.world.current.__dict__.setdefault("devices", [0]).append(self.id)
        return self

    def __exit__(self, *args: object) -> None:
        self.world.current.devices.pop()

    @property
    def compute_capability(self) -> str:
        return self.world.capability

    def synchronize(self) -> None:
        self.world.arrive()
        self.world.run_until(lambda: not any(self.world.queues))


class Allocation:
    """Device memory, filled with rubbish when it comes and when it goes."""

    def __init__(self, world: World, num_bytes: int) -> None:
        self._world, self.ptr, self._whole = world, 0, np.empty(0, np.uint8)
        self._whole = np.full(num_bytes + ALIGNMENT, 0xCD, np.uint8)
        self.ptr = -(-self._whole.ctypes.data // ALIGNMENT) * ALIGNMENT
        with world.lock:
            world.check()
            device = sum(size for start, size in world.ranges.items() if start not in world.registered)
            if device + num_bytes > world.memory:
                raise MemoryError(f"out of memory allocating {num_bytes} bytes")  # CuPy's OutOfMemoryError is one
            world.ranges[self.ptr], world.owners[self.ptr] = num_bytes, world.gpu

    def __del__(self) -> None:
        with self._world.lock:
            self._world.ranges.pop(self.ptr, None)
            self._world.graveyard.append(self._whole)
            self._whole[:] = 0xDD


class DeviceArray(np.ndarray):  # type: ignore[type-arg]
    """Device memory that the host can look at, which a real one's cannot."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(ptr=self.ctypes.data)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.ctypes.data, False),
            "strides": None if self.flags.c_contiguous else self.strides,
            "version": 3,
        }


def _array(address: int, shape: tuple[int, ...], owner: Any) -> DeviceArray:
    """Bytes of device memory; `owner` lives as long as a view of them."""
    part = (ctypes.c_uint8 * int(np.prod(shape))).from_address(address)
    part.owner = owner
    return np.ctypeslib.as_array(part).reshape(shape).view(DeviceArray)


def _zeros(world: World) -> Callable[..., DeviceArray]:
    def zeros(shape: tuple[int, int], dtype: Any) -> DeviceArray:
        assert dtype == np.uint8
        memory = Allocation(world, int(np.prod(shape)))
        array = _array(memory.ptr, shape, memory)
        array[:] = 0
        return array

    return zeros


@dataclass(frozen=True)
class UnownedMemory:
    """Somebody else's device memory: `owner` is kept, nothing is freed."""

    ptr: int
    size: int
    owner: Any
    device_id: int


@dataclass(frozen=True)
class MemoryPointer:
    mem: UnownedMemory
    offset: int


def _ndarray(shape: tuple[int, int], dtype: Any, memptr: MemoryPointer) -> DeviceArray:
    assert dtype == np.uint8
    assert memptr.offset + int(np.prod(shape)) <= memptr.mem.size
    return _array(memptr.mem.ptr + memptr.offset, shape, memptr.mem)


class _OnHost:
    """What the host sees of an exporter whose device memory it can look at."""

    def __init__(self, exporter: Any) -> None:
        self._exporter = exporter

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **options: Any) -> Any:
        return self._exporter.__dlpack__(stream=1)


def _from_dlpack(exporter: Any) -> DeviceArray:
    kind, _ = exporter.__dlpack_device__()
    if kind != 2:
        raise TypeError(f"Unsupported array type: {kind}")
    return np.from_dlpack(_OnHost(exporter)).view(DeviceArray)


class Runtime:
    memcpyDefault = 4
    CUDARuntimeError = CUDARuntimeError

    def __init__(self, world: World) -> None:
        self._world = world

    def getDeviceCount(self) -> int:
        return self._world.devices

    def memcpyAsync(self, dst: int, src: int, size: int, kind: int, stream: int) -> None:
        world = self._world
        assert kind == self.memcpyDefault
        if not (world.covers(dst, size) and world.covers(src, size)):
            raise CUDARuntimeError("cudaErrorInvalidValue: a copy is not within one allocation or registration")
        queue = world.queues[stream - 1]

        def copy() -> None:
            if not (world.covers(dst, size) and world.covers(src, size)):
                raise CUDARuntimeError("cudaErrorIllegalAddress: memory of a copy was given back before it ran")
            ctypes.memmove(dst, src, size)

        with world.lock:
            world.check()
            queue.append(Work(copy, cost_ms=1e-3 + size / 50e6))

    def memcpy(self, dst: int, src: int, size: int, kind: int) -> None:
        self._world.check()
        assert self._world.waiting, "the host waits for the GPU"
        assert kind == self.memcpyDefault
        assert self._world.covers(dst, size) or self._world.covers(src, size)
        self._world.arrive()
        if self._world.covers(src, size):
            ctypes.memmove(dst, src, size)
        else:
            self._world.arriving.append((dst, ctypes.string_at(src, size)))

    def streamSynchronize(self, stream: int) -> None:
        """Of the null stream, on which nothing but synchronous copies runs."""
        self._world.check()
        assert stream == 0
        self._world.arrive()

    def deviceGetAttribute(self, attribute: int, device: int) -> int:
        assert attribute == 91, "CanUseHostPointerForRegisteredMem"
        return int(self._world.same_addresses)

    def memset(self, ptr: int, value: int, size: int) -> None:
        self._world.check()
        if not self._world.covers(ptr, size):
            raise CUDARuntimeError("cudaErrorInvalidValue: invalid argument")
        ctypes.memset(ptr, value, size)

    def pointerGetAttributes(self, ptr: int) -> Any:
        kind, gpu = self._world.memory_at(ptr)
        return types.SimpleNamespace(type=kind, device=gpu)

    def hostRegister(self, ptr: int, size: int, flags: int) -> None:
        world = self._world
        world.check()
        assert flags == 3, "portable and mapped"
        if any(ptr < start + length and start < ptr + size for start, length in world.ranges.items()):
            raise CUDARuntimeError("cudaErrorHostMemoryAlreadyRegistered: part or all is already registered")
        if sum(world.registered.values()) + size > world.pinned_limit:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        world.registered[ptr] = world.ranges[ptr] = size

    def hostUnregister(self, ptr: int) -> None:
        self._world.check()
        if ptr not in self._world.registered:
            raise CUDARuntimeError("cudaErrorHostMemoryNotRegistered: pointer is not registered")
        del self._world.registered[ptr], self._world.ranges[ptr]


class RawModule:
    def __init__(self, world: World, code: str, options: tuple[str, ...] = ()) -> None:
        world.check()
        assert all(option.startswith("-") for option in options)
        self._world, self._signatures = world, signatures(code)

    def get_function(self, name: str) -> Callable[..., None]:
        types_of = self._signatures[name]

        def launch(grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any]) -> None:
            world = self._world
            assert len(grid) == len(block) == 1
            assert len(args) == len(types_of)
            # CuPy passes a Python integer as eight bytes, a NumPy scalar as it is.
            given = [np.int64(each) if isinstance(each, int) else each for each in args]
            for kind, each in zip(types_of, given, strict=True):
                assert each.itemsize == {"int": 4}.get(kind, 8), f"{name}: {each!r} for {kind}"
            values = [int(each) if kind.endswith("*") else each for kind, each in zip(types_of, given, strict=True)]
            pointers = [value for kind, value in zip(types_of, values, strict=True) if kind.endswith("*")]
            if not all(world.reaches(pointer) for pointer in pointers):
                raise CUDARuntimeError(f"cudaErrorIllegalAddress: {name} got an address that the GPU does not know")
            order = world.random.randrange(9)

            def run() -> None:
                if not all(world.covers(pointer, 1) for pointer in pointers):
                    raise CUDARuntimeError(f"cudaErrorIllegalAddress: memory of {name} was given back before it ran")
                world.kernels.launch(name, max(1, grid[0]), max(1, block[0]), values, order)

            world.launches.append(name)
            world.give(world.current.stack[-1], Work(run, cost_ms=0.01))

        return launch


def _matmul(world: World) -> Callable[..., None]:
    def matmul(left: Any, right: Any, out: Any) -> None:
        world.give(world.current.stack[-1], Work(lambda: np.matmul(left, right, out=out), cost_ms=1e-3))

    return matmul


def make(world: World) -> types.ModuleType:
    """The module to stand in sys.modules["cupy"]."""

    def elapsed(start: Event, end: Event) -> float:
        assert start.timed
        assert end.timed
        assert start.latest is not None
        assert end.latest is not None
        if not (start.latest.done and end.latest.done):
            raise CUDARuntimeError("cudaErrorNotReady: device not ready")
        return end.latest.at_ms - start.latest.at_ms

    def bound(kind: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: kind(world, *args, **kwargs)

    cupy = types.ModuleType("cupy")
    cupy.__dict__.update(
        __version__="fake",
        RawModule=bound(RawModule),
        ones=np.ones,
        zeros=_zeros(world),
        ndarray=_ndarray,
        from_dlpack=_from_dlpack,
        matmul=_matmul(world),
        cuda=types.SimpleNamespace(
            Device=bound(Device),
            Stream=bound(Stream),
            Event=bound(Event),
            ExternalStream=lambda ptr: world.streams[ptr],
            alloc=bound(Allocation),
            UnownedMemory=UnownedMemory,
            MemoryPointer=MemoryPointer,
            get_elapsed_time=elapsed,
            runtime=Runtime(world),
        ),
    )
    return cupy

"""What this machine offers: NVIDIA driver and GPUs, CuPy, NVRTC, cores, NUMA nodes, memory that may be locked.

Read from the driver and the operating system directly; nothing here imports CuPy, takes a GPU or changes anything.
`kvpool doctor` prints it, and `check_cuda` is how `device="cuda"` says what is missing.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvpool.errors import ConfigError

DRIVER_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
CUDA_MAJOR = 12  # of the CuPy that kvpool[cuda] installs; drivers of this major release and later run it
CUPY = ("cupy-cuda12x", "cupy-cuda13x", "cupy")  # distributions that bring the module
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_NODES = Path("/sys/devices/system/node")


@dataclass(frozen=True, slots=True)
class Gpu:
    """ordinal: N of "cuda:N". compute: compute capability, "9.0"."""

    ordinal: int
    name: str
    memory_bytes: int
    compute: str


@dataclass(frozen=True, slots=True)
class Cuda:
    """driver, nvrtc, cupy, bindings (cuda.bindings): releases, None where there is none. problems: why CUDA cannot be
    used, empty if it can."""

    driver: str | None
    gpus: list[Gpu]
    cupy: str | None
    nvrtc: str | None
    bindings: str | None
    problems: list[str]


@dataclass(frozen=True, slots=True)
class NumaNode:
    """One node: memory in bytes."""

    node: int
    cores: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Host:
    """cores: that this process may use. locked_bytes: limit of locked memory (`ulimit -l`), None: unlimited."""

    cores: int
    memory_bytes: int
    locked_bytes: int | None
    numa: list[NumaNode]


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is."""

    cuda: Cuda
    host: Host

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def release(number: int) -> str:
    """CUDA's release out of its number: 12090 is 12.9."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver() -> tuple[str | None, list[Gpu], str | None]:
    """The driver's release, its GPUs, and what is wrong (None: nothing)."""
    try:
        library = ctypes.CDLL(DRIVER_LIBRARY)
    except OSError as error:
        return None, [], f"the NVIDIA driver is missing: {DRIVER_LIBRARY} cannot be loaded ({error})"
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None, [], f"the NVIDIA driver does not answer: {DRIVER_LIBRARY} does not tell its version"
    version = release(number.value)
    if number.value < CUDA_MAJOR * 1000:
        return version, [], f"the NVIDIA driver is for CUDA {version}; it must be for {CUDA_MAJOR}.0 or later"
    result = library.cuInit(0)
    if result == _NO_DEVICE:
        return version, [], f"the NVIDIA driver (CUDA {version}) finds no GPU"
    if result != 0:
        return version, [], f"the NVIDIA driver (CUDA {version}) cannot start: cuInit returns {result}"
    return version, _gpus(library), None


def _gpus(library: ctypes.CDLL) -> list[Gpu]:
    count = ctypes.c_int()
    if library.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    gpus = []
    for ordinal in range(count.value):
        device, name, total = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        major, minor = ctypes.c_int(), ctypes.c_int()
        if (
            library.cuDeviceGet(ctypes.byref(device), ordinal) == 0
            and library.cuDeviceGetName(name, len(name), device) == 0
            and library.cuDeviceTotalMem_v2(ctypes.byref(total), device) == 0
            and library.cuDeviceGetAttribute(ctypes.byref(major), 75, device) == 0  # COMPUTE_CAPABILITY_MAJOR
            and library.cuDeviceGetAttribute(ctypes.byref(minor), 76, device) == 0  # COMPUTE_CAPABILITY_MINOR
        ):
            gpus.append(Gpu(ordinal, name.value.decode(), total.value, f"{major.value}.{minor.value}"))
    return gpus


def _cupy() -> str | None:
    """The installed release of CuPy, without importing it."""
    if importlib.util.find_spec("cupy") is None:
        return None
    for distribution in CUPY:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _bindings() -> str | None:
    """The installed release of cuda.bindings, by which the driver's batched copy is called."""
    try:
        return importlib.metadata.version("cuda-bindings")
    except importlib.metadata.PackageNotFoundError:
        return None


def nvrtc_library() -> ctypes.CDLL | None:
    """CUDA's run-time compiler: of the package nvidia-cuda-nvrtc-cu12, else of the system; None: there is none."""
    spec = importlib.util.find_spec("nvidia.cuda_nvrtc") if importlib.util.find_spec("nvidia") else None
    places = [Path(place, "lib") for place in (spec.submodule_search_locations or ())] if spec else []
    found = [str(path) for place in places for path in sorted(place.glob("libnvrtc.so.*[0-9]"))]
    for name in [*found, f"libnvrtc.so.{CUDA_MAJOR}"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def nvrtc_release(library: ctypes.CDLL | None) -> str | None:
    """Its release, "12.9"; None if it does not tell."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    if library is None or library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) != 0:
        return None
    return f"{major.value}.{minor.value}"


def look_for_cuda() -> Cuda:
    """Driver, GPUs, CuPy, NVRTC."""
    driver, gpus, problem = _driver()
    cupy, nvrtc = _cupy(), nvrtc_release(nvrtc_library())
    problems = [problem] if problem else []
    if cupy is None:
        problems.append("CuPy is not installed: pip install kvpool[cuda]")
    if nvrtc is None:
        problems.append("NVRTC, which compiles the kernels, is not found: pip install kvpool[cuda]")
    return Cuda(driver, gpus, cupy, nvrtc, _bindings(), problems)


def find_gpu(ordinal: int) -> tuple[Gpu, str] | None:
    """GPU N of "cuda:N" and the driver's release; None: there is no such GPU."""
    driver, gpus, _ = _driver()
    return (gpus[ordinal], driver) if driver is not None and ordinal < len(gpus) else None


def parse_device(device: str) -> int | None:
    """N of "cuda:N" (0 of "cuda"), None of "cpu"; ConfigError for anything else."""
    if device == "cpu":
        return None
    match = re.fullmatch(r"cuda(?::(\d{1,4}))?", device) if isinstance(device, str) else None
    if match is None:
        raise ConfigError(f"device: {device!r} is none of 'cpu', 'cuda', 'cuda:N', None")
    return int(match[1] or 0)


def check_cuda(device: str) -> None:
    """ConfigError, naming all that is missing, unless this machine can use the GPU of `device` ("cuda", "cuda:1")."""
    ordinal = parse_device(device)
    if ordinal is None:
        return
    cuda = look_for_cuda()
    problems = list(cuda.problems)
    if not problems and ordinal >= len(cuda.gpus):
        problems.append(f"there is no GPU {ordinal}; the NVIDIA driver offers {len(cuda.gpus)}")
    if problems:
        raise ConfigError(
            f"device: {device!r} cannot be used: {'; '.join(problems)}. The CPU backend works here: device='cpu'"
        )


def _numa() -> list[NumaNode]:
    nodes = []
    for folder in sorted(_NODES.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        try:
            cores = _count_list((folder / "cpulist").read_text())
            total = re.search(r"MemTotal:\s+(\d+) kB", (folder / "meminfo").read_text())
        except OSError:
            continue
        nodes.append(NumaNode(int(folder.name[4:]), cores, int(total[1]) * 1024 if total else 0))
    return nodes


def _count_list(text: str) -> int:
    """How many numbers a list as "0-3,8" has."""
    ranges = [part.split("-") for part in text.strip().split(",") if part]
    return sum(int(each[-1]) - int(each[0]) + 1 for each in ranges)


def locked_limit() -> int | None:
    """Bytes that this process may lock in memory (`ulimit -l`); None: unlimited, or the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def look_at_host() -> Host:
    """Cores, memory and nodes of this process's machine."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        memory = 0
    return Host(usable_cores(), memory, locked_limit(), _numa())


def look() -> Machine:
    """All of it."""
    return Machine(look_for_cuda(), look_at_host())

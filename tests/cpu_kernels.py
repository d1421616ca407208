"""Builds kernels/*.cu for the CPU through tests/shim, and launches them.

Modes: "plain"; "asan" with ASan and UBSan; "tsan" with ThreadSanitizer and a thread per block. Sanitized libraries load
only in a process of `run_python(mode, ...)`.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels"
SHIM = ROOT / "tests" / "shim"
SHARED = ("ptx", "walk")  # stand in front of every family
FAMILIES = sorted(path.stem for path in KERNELS.glob("*.cu") if path.stem not in SHARED)
FLAGS = {
    "plain": [],
    "asan": ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-g", "-fsanitize=thread"],
}
_ENTRY = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\(\w+\)\s+)?(\w+)\((.*?)\)", re.S)


def signatures(source: str) -> dict[str, list[str]]:
    """{kernel: types of its arguments} of one file."""
    found = {}
    for name, arguments in _ENTRY.findall(source):
        types = [re.sub(r"\s*\w+$", "", argument.strip()) for argument in arguments.split(",")]
        found[name] = types
    return found


def read_sources() -> dict[str, str]:
    """The files that the shim compiles: {name: text}, without ptx.cu, whose place tests/shim/ptx.hpp takes."""
    return {name: (KERNELS / f"{name}.cu").read_text() for name in ("walk", *FAMILIES)}


SIGNATURES: dict[str, list[str]] = {}
KERNELS_OF: dict[str, list[str]] = {}  # by file
for _name, _text in read_sources().items():
    SIGNATURES |= signatures(_text)
    KERNELS_OF[_name] = list(signatures(_text))


def missing(mode: str = "plain") -> str | None:
    """Why `mode` cannot run on this machine; None: it can."""
    if sys.platform != "linux":
        return f"the shim that runs kernels on the CPU needs Linux, and this is {sys.platform}"
    needed = ["g++", "setarch"] if mode == "tsan" else ["g++"]
    for tool in needed:
        if shutil.which(tool) is None:
            return f"{tool} is not installed: the kernels cannot be run on the CPU (mode {mode})"
    return None


def build(
    sources: dict[str, str], mode: str, folder: Path, name: str = "kernels", kernels: Sequence[str] = tuple(SIGNATURES)
) -> Path:
    """Compiles `sources`, as of `read_sources`, to a library. Raises AssertionError with the compiler's words."""
    parts = ['#include "cuda_on_cpu.hpp"\n#include "ptx.hpp"\n']
    parts += [f'#line 1 "{file}.cu"\n{text}' for file, text in sources.items()]
    parts += [f"SHIM_KERNEL({kernel})\n" for kernel in kernels]
    unit, library = folder / f"{name}-{mode}.cpp", folder / f"{name}-{mode}.so"
    unit.write_text("".join(parts))
    warnings = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", *warnings, *FLAGS[mode]]
    command += ["-I", str(SHIM), str(unit), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    if name == "kernels":
        assert "warning" not in done.stderr, done.stderr
    return library


def run_python(mode: str, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Python on `argv` in a process that can load libraries of `mode`: the sanitizer's own library comes first."""
    settings = {"OPENBLAS_NUM_THREADS": "1"}
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):  # a free-threaded Python has one allocator only
        settings["PYTHONMALLOC"] = "malloc"
    if mode != "plain":
        ask = ["g++", f"-print-file-name=lib{mode}.so"]
        settings["LD_PRELOAD"] = subprocess.run(
            ask, capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()
        settings["ASAN_OPTIONS"] = "detect_leaks=0"
        settings["TSAN_OPTIONS"] = "halt_on_error=1:exitcode=66"
    # gcc 12's ThreadSanitizer dies where addresses are random.
    prefix = ["setarch", "-R"] if mode == "tsan" else []
    command = [*prefix, "env", *(f"{name}={value}" for name, value in settings.items()), sys.executable, *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


class CpuKernels:
    """One built library. `launch` has cuLaunchKernel's meaning: arguments are read when it is called."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def launch(self, kernel: str, grid: int, threads: int, arguments: Sequence[Any], order: int = 0) -> None:
        """Arguments: arrays and addresses (int) for pointers, NumPy scalars of the exact type for numbers."""
        types = SIGNATURES[kernel]
        assert len(arguments) == len(types), f"{kernel} takes {len(types)} arguments"
        cells = [_cell(kind, value) for kind, value in zip(types, arguments, strict=True)]
        pointers = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))
        entry = getattr(self._library, f"launch_{kernel}")
        entry.argtypes = [ctypes.c_uint, ctypes.c_uint, ctypes.c_ulong, ctypes.c_void_p]
        result = entry(grid, threads, order, ctypes.addressof(pointers))
        assert result == 0, f"{kernel}: launch of {grid} blocks of {threads} threads: error {result}"


def _cell(kind: str, value: Any) -> Any:
    if kind.endswith("*"):
        return ctypes.c_void_p(value.ctypes.data if isinstance(value, np.ndarray) else value)
    scalar, cell = {"long long": (np.int64, ctypes.c_longlong), "int": (np.int32, ctypes.c_int)}[kind]
    assert isinstance(value, scalar), f"{value!r} is not the {scalar.__name__} that the kernel's {kind} wants"
    return cell(int(value))


@cache
def plain_kernels() -> CpuKernels:
    """The kernels as they are, built once for all tests of this process; skips the test where that cannot be."""
    if reason := missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory() as folder:
        return CpuKernels(build(read_sources(), "plain", Path(folder)))

"""NVRTC through ctypes: compiles to a cubin, needs no driver.

`python tests/nvrtc.py` rewrites kernels/resources.json: registers and shared memory of each kernel.
"""

from __future__ import annotations

import ctypes
import json
import re
from dataclasses import dataclass
from pathlib import Path

from kvpool import _core
from kvpool.machine import nvrtc_library, nvrtc_release
from kvpool.mover.cuda_runtime import OPTIONS

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
RESOURCES = Path(__file__).parents[1] / "kernels" / "resources.json"
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Compiled:
    result: int  # 0: NVRTC_SUCCESS
    log: str
    cubin: bytes
    ptx: str


def compile_cubin(nvrtc: ctypes.CDLL, source: str, arch: str, given: tuple[str, ...] = OPTIONS) -> Compiled:
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    options = [option.encode() for option in (f"--gpu-architecture={arch}", "--ptxas-options=-v", *given)]
    result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    assert nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)) == 0
    log = ctypes.create_string_buffer(size.value)
    assert nvrtc.nvrtcGetProgramLog(program, log) == 0
    made = {"CUBIN": b"", "PTX": b""}
    for kind in made if result == 0 else ():
        assert getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)) == 0
        buffer = ctypes.create_string_buffer(size.value)
        assert getattr(nvrtc, f"nvrtcGet{kind}")(program, buffer) == 0
        made[kind] = buffer.raw
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return Compiled(result, log.value.decode(), made["CUBIN"], made["PTX"].rstrip(b"\0").decode())


def resources(log: str) -> dict[str, dict[str, int]]:
    """{kernel: registers, shared (bytes), stack and spill (bytes)} of one compilation's log."""
    found: dict[str, dict[str, int]] = {}
    for part in re.split(r"(?=ptxas info\s+: Compiling entry)", log):
        entry, spills, used = _ENTRY.search(part), _SPILLS.search(part), _USED.search(part)
        if entry and spills and used:
            stack, stores, loads = map(int, spills.groups())
            shared = _SHARED.search(part)
            found[entry[1]] = {
                "registers": int(used[1]),
                "shared": int(shared[1]) if shared else 0,
                "stack": stack,
                "spill": stores + loads,
            }
    return found


def record() -> None:
    nvrtc = nvrtc_library()
    if nvrtc is None:
        raise SystemExit("there is no NVRTC: pip install nvidia-cuda-nvrtc-cu12")
    table: dict[str, dict[str, dict[str, int]]] = {}
    for name in _core.kernel_names():
        for arch in ARCHITECTURES:
            for kernel, used in resources(compile_cubin(nvrtc, _core.kernel_source(name), arch).log).items():
                table.setdefault(kernel, {})[arch] = {key: used[key] for key in ("registers", "shared")}
    rows = ",\n".join(f"    {json.dumps(kernel)}: {json.dumps(table[kernel])}" for kernel in sorted(table))
    RESOURCES.write_text(f'{{\n  "nvrtc": "{nvrtc_release(nvrtc)}",\n  "kernels": {{\n{rows}\n  }}\n}}\n')


if __name__ == "__main__":
    record()

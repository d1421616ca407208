"""Every kernel compiles to a cubin for the supported architectures, without a warning, without a driver."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import pytest

from kvpool import _core


def _nvrtc() -> ctypes.CDLL:
    spec = importlib.util.find_spec("nvidia.cuda_nvrtc") if importlib.util.find_spec("nvidia") else None
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package nvidia-cuda-nvrtc-cu12 is not installed")
    (library,) = Path(spec.submodule_search_locations[0], "lib").glob("libnvrtc.so.*[0-9]")
    return ctypes.CDLL(str(library))


def _compile(source: str, arch: str) -> tuple[int, str, bytes]:
    """-> (NVRTC's result, log, cubin)"""
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17"]
    result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    cubin = b""
    if result == 0:
        assert nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0
        buffer = ctypes.create_string_buffer(size.value)
        assert nvrtc.nvrtcGetCUBIN(program, buffer) == 0
        cubin = buffer.raw
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return result, log.value.decode(), cubin


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", _core.kernel_names())
def test_compiles_to_a_cubin_without_warnings(name: str, arch: str) -> None:
    result, log, cubin = _compile(_core.kernel_source(name), arch)
    assert result == 0, log
    assert "warning" not in log, log
    assert cubin.startswith(b"\x7fELF")


def test_a_misspelt_opcode_is_refused() -> None:
    source = 'extern "C" __global__ void k() { asm volatile("ld.globl.u32 %r1, [%rd1];"); }'
    result, log, _ = _compile(source, "sm_90")
    assert result != 0, log


def test_unknown_kernel_names_the_known() -> None:
    with pytest.raises(KeyError, match="copy_pages"):
        _core.kernel_source("nothing")


def test_sources_are_the_files() -> None:
    folder = Path(__file__).parents[1] / "kernels"
    assert sorted(_core.kernel_names()) == sorted(path.stem for path in folder.glob("*.cu"))
    for path in folder.glob("*.cu"):
        assert _core.kernel_source(path.stem) == path.read_text()

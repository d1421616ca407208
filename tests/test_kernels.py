"""Kernels for the GPU: every family compiles to a cubin for the supported architectures, without a driver."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest

import nvrtc
from cpu_kernels import FAMILIES, KERNELS, SHARED, SIGNATURES, signatures
from kvpool import _core
from kvpool.machine import nvrtc_library, nvrtc_release
from kvpool.mover.twins import TWINS

EVERY = pytest.mark.parametrize(("name", "arch"), [(n, a) for n in _core.kernel_names() for a in nvrtc.ARCHITECTURES])


@cache
def compiled(name: str, arch: str) -> nvrtc.Compiled:
    library = nvrtc_library()
    if library is None:
        pytest.skip("no NVRTC (package nvidia-cuda-nvrtc-cu12): no kernel can be compiled")
    return nvrtc.compile_cubin(library, _core.kernel_source(name), arch)


@EVERY
def test_compiles_to_a_cubin_without_warnings(name: str, arch: str) -> None:
    done = compiled(name, arch)
    assert done.result == 0, done.log
    assert "warning" not in done.log, done.log
    assert done.cubin.startswith(b"\x7fELF")


@EVERY
def test_no_kernel_spills_a_register(name: str, arch: str) -> None:
    log = compiled(name, arch).log
    used = nvrtc.resources(log)
    assert sorted(used) == sorted(signatures((KERNELS / f"{name}.cu").read_text())), log
    assert not any(each["spill"] or each["stack"] for each in used.values()), log


@EVERY
def test_registers_and_shared_memory_are_as_recorded(name: str, arch: str) -> None:
    """Another release of NVRTC may use fewer registers, or a few more."""
    recorded = json.loads(nvrtc.RESOURCES.read_text())
    used = nvrtc.resources(compiled(name, arch).log)
    same = nvrtc_release(nvrtc_library()) == recorded["nvrtc"]
    again = f"kernels/resources.json was recorded with NVRTC {recorded['nvrtc']}; `python tests/nvrtc.py` records anew"
    for kernel, each in used.items():
        before = recorded["kernels"][kernel][arch]
        assert each["shared"] == before["shared"], f"{kernel}: {again}"
        if same:
            assert each["registers"] == before["registers"], f"{kernel}: {again}"
        else:
            assert each["registers"] <= before["registers"] + 8, f"{kernel}: {again}"


def test_a_block_of_every_kernel_fits_beside_others() -> None:
    """sm_80 has 64 Ki registers and 164 KiB of shared memory: two blocks of 256 threads must fit at least."""
    for kernel, archs in json.loads(nvrtc.RESOURCES.read_text())["kernels"].items():
        for arch, used in archs.items():
            assert 2 * 256 * used["registers"] <= 65_536, (kernel, arch)
            assert used["shared"] <= 48 * 1024, (kernel, arch)


def test_recorded_are_exactly_the_kernels_of_the_files() -> None:
    assert sorted(json.loads(nvrtc.RESOURCES.read_text())["kernels"]) == sorted(SIGNATURES)


@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_inline_ptx_arrives_as_meant(arch: str) -> None:
    """ptx.cu is the one file that the CPU does not execute."""
    registers, ring = compiled("copy_pages", arch).ptx, compiled("copy_ring", arch).ptx
    assert registers.count("ld.global.L1::no_allocate.v4.u32") == registers.count("st.global.cg.v4.u32") == 4
    stages = int(re.search(r"STAGES = (\d+)", _core.kernel_source("copy_ring"))[1])
    assert set(re.findall(r"cp\.async\.wait_group (\d+)", ring)) == {str(stages - 1)}
    assert set(re.findall(r"cp\.async\.c\w[^;]*", ring)) >= {"cp.async.commit_group"}
    assert re.search(r"cp\.async\.cg\.shared\.global \[\w+\], \[%rd\d+\], 16;", ring)


def test_inline_ptx_is_in_one_file() -> None:
    for path in KERNELS.glob("*.cu"):
        text = path.read_text()
        assert ("asm" in text) == (path.stem == "ptx"), path
        assert "#include" not in text, f"{path}: kernels are header-free"


def test_a_misspelt_opcode_is_refused() -> None:
    library = nvrtc_library()
    if library is None:
        pytest.skip("no NVRTC (package nvidia-cuda-nvrtc-cu12): no kernel can be compiled")
    source = 'extern "C" __global__ void k() { asm volatile("ld.globl.u32 %r1, [%rd1];"); }'
    done = nvrtc.compile_cubin(library, source, "sm_90")
    assert done.result != 0, done.log


def test_unknown_kernel_names_the_known() -> None:
    with pytest.raises(KeyError, match="copy_pages"):
        _core.kernel_source("nothing")


def test_sources_are_the_files() -> None:
    assert sorted(_core.kernel_names()) == FAMILIES
    for name in FAMILIES:
        parts = [f'#line 1 "{part}.cu"\n{(KERNELS / f"{part}.cu").read_text()}' for part in (*SHARED, name)]
        assert _core.kernel_source(name) == "".join(parts)


def test_every_kernel_has_a_twin_and_a_row_of_the_readme() -> None:
    assert sorted(TWINS) == sorted(SIGNATURES)
    rows = re.findall(r"^\| `(\w+)` \|", Path(KERNELS, "README.md").read_text(), re.M)
    assert sorted(rows) == sorted(SIGNATURES)

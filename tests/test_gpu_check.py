"""bench/gpu_check: exits 2 without a GPU; all of it runs under the stand-in for CuPy, whose figures mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import driver
import fake_bindings
import fake_cupy
import kernel_cases
from cpu_kernels import SIGNATURES, plain_kernels
from cuda_movers import plant_a_wrong_ring
from fake_cupy import World
from gpu_kernels import GpuKernels, manager_round_trip, mover_round_trip
from kvpool import machine
from kvpool.mover.calibrate import PLAIN, Result, Sizes
from kvpool.mover.calibration import Speed, file_of, load
from kvpool.mover.cuda_runtime import CudaRuntime
from kvpool.mover.paths import PATHS

CHECK = Path(__file__).parents[1] / "bench" / "gpu_check"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    """A machine that has it all, as far as gpu_check can see."""
    world = World(plain_kernels())
    for name, module in {"cupy": fake_cupy.make(world), **fake_bindings.make(world)}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "_cupy", lambda: "fake")
    monkeypatch.setattr(machine, "nvrtc_release", lambda library: "12.9")
    monkeypatch.setattr(machine, "DRIVER_LIBRARY", driver.build(tmp_path))
    return world


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module bench/gpu_check/__main__.py."""
    monkeypatch.syspath_prepend(str(CHECK))
    import importlib.util

    spec = importlib.util.spec_from_file_location("gpu_check", CHECK / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("measure", None)


SIZES = Sizes(fragments=(512, 4096), counts=(2, 9), most_bytes=9 * 4096, blocks=(2, 3), holds=2)
ROWS = {"offload": 9, "onboard": 9, "copy": 7}  # of each page size and count: all paths, and the plain copy


@pytest.mark.skipif(not machine.look_for_cuda().problems, reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_exits_2() -> None:
    done = subprocess.run([sys.executable, str(CHECK)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_check: there is no GPU to measure. device: 'cuda' cannot be used: ")
    assert done.stdout == ""


def test_every_path_is_verified_and_timed(
    check: Any, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    assert check.check("cuda", report, False, SIZES, 8) == 0
    found = json.loads(report.read_text())
    assert len(found["rows"]) == sum(ROWS.values()) * 4
    assert len(found["beside"]) == sum(ROWS.values())
    assert all(row["gb_per_s"] > 0 and row["of_plain"] > 0 for row in found["rows"])
    assert all(row["alone_ms"] > 0 for row in found["beside"])
    assert (found["wrong"], found["cut"], found["not_offered"], found["beside_missing"]) == (None, False, {}, None)
    assert {row["path"] for row in found["rows"]} == {*PATHS, "plain copy"}
    assert len(found["chosen"]) == 3 * 4
    assert set(world.launches) == {"copy_pages_u128", "copy_ring_u128", "gather_pages_u128", "scatter_pages_u128"}
    assert world.batches
    out = capsys.readouterr().out
    assert "Test GPU A, driver CUDA 12.8" in out
    assert "tests on CUDA: left out" in out
    assert world.registered == {}
    stored = load("Test GPU A", "12.8")
    assert stored is not None
    assert f"calibration: stored in {file_of('Test GPU A', '12.8')}" in out
    assert len(stored.rows) == (sum(ROWS.values()) - 3) * 4


def test_a_wrong_byte_ends_it_with_1(
    check: Any, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant_a_wrong_ring(monkeypatch)
    assert check.check("cuda", tmp_path / "report.json", False, SIZES, 8) == 1
    assert capsys.readouterr().err.endswith("wrong byte: offload, pages of 512 bytes: ring, 2 blocks\n")
    assert json.loads((tmp_path / "report.json").read_text())["wrong"] == "offload, pages of 512 bytes: ring, 2 blocks"
    assert load("Test GPU A", "12.8") is None  # what is wrong is not gone by


def test_it_stops_when_time_is_up(check: Any, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    check.SECONDS = -1
    assert check.check("cuda", None, False, SIZES, 8) == 0
    assert "rows are missing" in capsys.readouterr().out


def test_a_failed_test_ends_it_with_1(check: Any, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "run_tests", lambda seconds: (False, "1 failed"))
    check.SECONDS = -1
    assert check.check("cuda", None, True, SIZES, 8) == 1


def test_without_cublas_there_are_no_multiplies(
    check: Any, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(self: CudaRuntime, n: int) -> None:
        raise ImportError("libcublas.so.12: cannot open shared object file")

    monkeypatch.setattr(CudaRuntime, "matrix_multiply", missing)
    report = tmp_path / "report.json"
    assert check.check("cuda", report, False, SIZES, 8) == 0
    assert "libcublas" in json.loads(report.read_text())["beside_missing"]
    assert "matrix multiply: CuPy multiplies no matrices here" in capsys.readouterr().out


def test_targets_name_the_best_path(check: Any) -> None:
    result = Result(
        rows=[
            Speed("offload", 2 << 20, 4, PLAIN, None, 10.0),
            Speed("offload", 2 << 20, 4, "ring", 8, 9.6),
            Speed("offload", 2 << 20, 4, "registers", 8, 9.0),
            Speed("onboard", 16 << 10, 4, PLAIN, None, 10.0),
            Speed("onboard", 16 << 10, 4, "ring", 16, 7.0),
            Speed("onboard", 64 << 10, 4, PLAIN, None, 10.0),
            Speed("onboard", 64 << 10, 4, "engine", None, 7.0),
        ]
    )
    columns = [list(column.cells) for column in check.targets(result).columns]
    assert columns[2] == ["ring, 8 blocks", "ring, 16 blocks"]
    assert columns[4] == ["95% met", "80% MISSED"]


@pytest.mark.parametrize("kernel", SIGNATURES)
def test_cases_of_the_gpu_tests_hold_under_the_stand_in(kernel: str, world: World) -> None:
    kernels = GpuKernels(CudaRuntime())
    for case in kernel_cases.drawn(kernel, 3, "plain", count=6):
        kernel_cases.run(kernels, case)


def test_gpu_tests_notice_bytes_around_the_memory(world: World) -> None:
    memory, slots = np.zeros(64, np.uint8), np.array([4], np.int32)  # a slot past the end
    with pytest.raises(AssertionError, match="wrote behind"):
        GpuKernels(CudaRuntime()).launch(
            "scatter_pages_u8", 1, 32, (np.ones(16, np.uint8), memory, slots, np.int64(16), np.int32(1))
        )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("page_bytes", [24, 4096])
def test_the_movers_gpu_test_holds_under_the_stand_in(world: World, page_bytes: int, path: str) -> None:
    mover_round_trip(CudaRuntime(), page_bytes, path)
    assert world.registered == {}


def test_the_managers_gpu_test_holds_under_the_stand_in(world: World) -> None:
    manager_round_trip(CudaRuntime())
    assert world.registered == {}

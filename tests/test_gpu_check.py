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
import fake_cupy
import kernel_cases
from cpu_kernels import SIGNATURES, plain_kernels
from fake_cupy import World
from gpu_kernels import GpuKernels, mover_round_trip
from kvpool import machine
from kvpool.mover.cuda_runtime import CudaRuntime

CHECK = Path(__file__).parents[1] / "bench" / "gpu_check"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    """A machine that has it all, as far as gpu_check can see."""
    world = World(plain_kernels())
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy.make(world))
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
    for name in ("measure", "paths"):
        sys.modules.pop(name, None)


def sizes(check: Any) -> Any:
    return check.Sizes(fragments=(512, 4096), counts=(2, 9), most_bytes=9 * 4096, blocks=(2, 3), matrix=8)


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
    assert check.check("cuda", report, False, sizes(check)) == 0
    found = json.loads(report.read_text())
    paths_of = {"offload": 8, "onboard": 8, "copy": 6}  # with the plain copy
    assert len(found["rows"]) == sum(paths_of.values()) * 4
    assert len(found["beside"]) == sum(paths_of.values())
    assert all(row["gb_per_s"] > 0 and row["of_plain"] > 0 for row in found["rows"])
    assert all(row["alone_ms"] > 0 for row in found["beside"])
    assert found["wrong"] is None
    assert set(found["calibration"]) == {"offload", "onboard", "copy"}
    assert found["cut"] is False
    assert set(world.launches) == {"copy_pages_u128", "copy_ring_u128", "gather_pages_u128", "scatter_pages_u128"}
    out = capsys.readouterr().out
    assert "Test GPU A, driver CUDA 12.8" in out
    assert "tests on CUDA: left out" in out
    assert world.registered == {}


def test_a_wrong_byte_ends_it_with_1(
    check: Any, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = CudaRuntime.launch

    def shifted(self: CudaRuntime, plan: Any, arguments: Any, stream: Any) -> None:
        source, *rest = arguments
        launch(self, plan, (source + 16 if plan.kernel == "copy_ring_u128" else source, *rest), stream)

    monkeypatch.setattr(CudaRuntime, "launch", shifted)
    assert check.check("cuda", tmp_path / "report.json", False, sizes(check)) == 1
    assert capsys.readouterr().err.endswith("wrong byte: offload, 2 pages of 512 bytes: ring\n")
    assert json.loads((tmp_path / "report.json").read_text())["wrong"] == "offload, 2 pages of 512 bytes: ring"


def test_it_stops_when_time_is_up(check: Any, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    check.SECONDS = -1
    assert check.check("cuda", None, False, sizes(check)) == 0
    assert "rows are missing" in capsys.readouterr().out


def test_a_failed_test_ends_it_with_1(check: Any, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "run_tests", lambda seconds: (False, "1 failed"))
    check.SECONDS = -1
    assert check.check("cuda", None, True, sizes(check)) == 1


def test_targets_name_the_best_path(check: Any) -> None:
    row = sys.modules["measure"].Row
    result = check.Result(
        rows=[
            row("offload", 2 << 20, 4, "plain copy", None, 10, 1.0),
            row("offload", 2 << 20, 4, "ring", 8, 9.6, 0.96),
            row("offload", 2 << 20, 4, "registers", 8, 9.0, 0.90),
            row("onboard", 16 << 10, 4, "ring", 16, 7.0, 0.70),
            row("onboard", 64 << 10, 4, "ring", 16, 7.0, 0.70),
        ]
    )
    table = check.targets(result)
    columns = [list(column.cells) for column in table.columns]
    assert columns[2] == ["ring, 8 blocks", "ring, 16 blocks"]
    assert columns[4] == ["95% met", "80% MISSED"]


def test_calibration_takes_the_engine_from_where_it_stays_faster(check: Any) -> None:
    row = sys.modules["measure"].Row
    engine, blocks = "copy engine, page by page", {8: 7.0, 16: 9.6, 32: 10.0}
    rows = [row("offload", 4096, 64, engine, None, 99.0, 1.0)]  # not the largest count
    for fragment, speed in ((4096, 1.0), (8192, 12.0), (16_384, 9.0), (32_768, 11.0), (65_536, 12.0)):
        rows.append(row("offload", fragment, 128, engine, None, speed, 1.0))
        rows += [row("offload", fragment, 128, "registers", cap, at, 1.0) for cap, at in blocks.items()]
    rows += [row("copy", 4096, 128, engine, None, 1.0, 1.0), row("copy", 4096, 128, "ring", 8, 2.0, 1.0)]
    assert check.calibrate(rows) == {
        "offload": {"engine_bytes": 32_768, "max_blocks": 16},
        "copy": {"engine_bytes": None, "max_blocks": None},
    }


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


@pytest.mark.parametrize("engine_bytes", [1, 1 << 40])
@pytest.mark.parametrize("page_bytes", [24, 4096])
def test_the_movers_gpu_test_holds_under_the_stand_in(world: World, page_bytes: int, engine_bytes: int) -> None:
    mover_round_trip(CudaRuntime(), page_bytes, engine_bytes)
    assert world.registered == {}

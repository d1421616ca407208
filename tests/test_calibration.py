"""Calibrations: what is chosen by them, their files, and `kvpool doctor --calibrate` under the stand-ins."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import driver
import fake_bindings
import fake_cupy
from cpu_kernels import plain_kernels
from cuda_movers import plant_a_wrong_ring
from fake_cupy import World
from kvpool import CacheConfig, KVCacheManager, PoolConfig, machine
from kvpool.cli import main
from kvpool.mover import calibrate
from kvpool.mover.calibration import Calibration, CalibrationError, Speed, file_of, folder, load
from kvpool.mover.cuda import CudaMover
from kvpool.mover.paths import ALWAYS, PATHS, Choice, Shape, Thresholds

EVERY = frozenset(PATHS)


def rows(direction: str, page_bytes: int, count: int, **speeds: Any) -> list[Speed]:
    """registers8=3.0: the register kernel with 8 blocks went at 3 GB/s."""
    found = []
    for name, speed in speeds.items():
        path = name.rstrip("0123456789")
        found.append(Speed(direction, page_bytes, count, path, int(name[len(path) :] or 0) or None, speed))
    return found


MEASURED = Calibration(
    "Test GPU A",
    "12.8",
    "2026-01-01T00:00:00Z",
    (
        *rows("offload", 4096, 8, engine=1.0, batch=2.0, registers8=4.0, registers16=3.0, ring8=3.5, staged8=1.0),
        *rows("offload", 4096, 1024, engine=1.0, batch=6.0, registers8=5.0, registers16=7.0, ring8=3.0, staged8=20.0),
        *rows("offload", 1 << 20, 8, engine=20.0, batch=19.0, registers8=9.0, ring8=9.0, staged8=18.0),
        *rows("offload", 1 << 20, 256, engine=20.0, batch=24.0, registers8=9.0, ring8=9.0, staged8=18.0),
        *rows("onboard", 4096, 8, engine=1.0, registers8=2.0, ring16=5.0, staged8=4.0),
    ),
)


@pytest.mark.parametrize(
    ("shape", "offered", "expected"),
    [
        (Shape("offload", 4096, 8, 8, 8), EVERY, Choice("registers", 8)),
        (Shape("offload", 4096, 8, 8, 8), ALWAYS, Choice("engine")),
        (Shape("offload", 4096, 1000, 1000, 1000), EVERY, Choice("registers", 16)),  # a run on the host has one page
        (Shape("offload", 4096, 1000, 1000, 2), EVERY, Choice("staged", 8)),  # 500 pages
        (Shape("offload", 4096, 1000, 1000, 2), EVERY - {"staged"}, Choice("registers", 16)),
        (Shape("offload", 4096, 1000, 2, 2), EVERY, Choice("engine")),  # two fragments of 2 MiB
        (Shape("offload", 4096, 1000, 3, 1000), EVERY, Choice("engine")),  # fragments of 1.3 MiB
        (Shape("offload", 2 << 20, 100, 100, 50), EVERY, Choice("batch")),
        (Shape("offload", 2 << 20, 100, 100, 50), EVERY - {"batch"}, Choice("engine")),
        (Shape("onboard", 4096, 8, 8, 1), EVERY, Choice("ring", 16)),
        (Shape("onboard", 4096, 8, 8, 1), EVERY - {"ring"}, Choice("staged", 8)),
        (Shape("copy", 4096, 8, 8, 0), EVERY, Thresholds().choose(Shape("copy", 4096, 8, 8, 0), EVERY)),
    ],
)
def test_the_nearest_row_decides(shape: Shape, offered: frozenset[str], expected: Choice) -> None:
    for _ in range(2):  # the second time from what it remembers
        assert MEASURED.choose(shape, offered) == expected


def test_paths_that_may_be_chosen() -> None:
    assert MEASURED.paths == EVERY
    slow = tuple(replace(row, gb_per_s=0.5) if row.path == "staged" else row for row in MEASURED.rows)
    assert replace(MEASURED, rows=slow).paths == EVERY - {"staged"}  # its memory is not taken for nothing
    assert len(MEASURED.best()) == 5


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_it_comes_back_from_its_file(cache: Path) -> None:
    assert load("Test GPU A", "12.8") is None
    path = MEASURED.save()
    assert path == cache / "kvpool" / "calibration" / "Test-GPU-A-cuda12.8.json" == file_of("Test GPU A", "12.8")
    assert load("Test GPU A", "12.8") == MEASURED
    assert load("Test GPU A", "12.9") is None
    later = replace(MEASURED, measured="later")
    assert later.save() == path
    assert load("Test GPU A", "12.8") == later
    assert list(path.parent.iterdir()) == [path]


def test_where_the_files_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/place"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert folder() == tmp_path / ".cache" / "kvpool" / "calibration"
    assert file_of("../../NVIDIA H100 (80GB)/x", "12.8").name == "..-..-NVIDIA-H100-80GB-x-cuda12.8.json"


def broken(**changes: Any) -> bytes:
    good = {"format": 1, "device": "Test GPU A", "driver": "12.8", "measured": "then"}
    row = {"direction": "copy", "page_bytes": 1, "count": 1, "path": "ring", "blocks": 1, "gb_per_s": 1.0}
    return json.dumps(good | {"rows": [row | changes]}).encode()


DAMAGED = [
    (b"", "Expecting value"),
    (b"\xff\xfe{", "codec"),
    (b"[1]", "format 1"),
    (b'{"format": 2}', "format 1"),
    (b'{"format": 1, "device": 3}', "device"),
    (b'{"format": 1, "device": "a", "driver": "b", "measured": "c", "rows": []}', "rows"),
    (b'{"format": 1, "device": "a", "driver": "b", "measured": "c", "rows": {"0": 1}}', "rows"),
    (b"[" * 100_000, ""),
    (b" " * (5 << 20), "more than"),
    (broken(more=1), r"rows\[0\]"),
    *[(broken(direction=value), "direction") for value in ("up", None, [], {})],
    *[(broken(path=value), "path") for value in ("plain copy", 1, [])],
    *[(broken(page_bytes=value), "page_bytes") for value in (0, -1, 1.0, True, "1", 2**40)],
    *[(broken(count=value), "count") for value in (0, None)],
    *[(broken(blocks=value), "blocks") for value in (None, 0, "8")],
    (broken(path="engine", blocks=8), "blocks"),
    *[(broken(gb_per_s=value), "gb_per_s") for value in (0, -1.0, float("nan"), float("inf"), "1", True, 10**400)],
]


@pytest.mark.parametrize(("content", "reason"), DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_says_which_it_is_and_what_is_wrong(cache: Path, content: bytes, reason: str) -> None:
    path = file_of("Test GPU A", "12.8")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=f"^calibration: .*Test-GPU-A-cuda12.8.json is damaged: .*{reason}"):
        load("Test GPU A", "12.8")


def test_a_foreign_file_is_refused(cache: Path) -> None:
    MEASURED.save().rename(file_of("Test GPU B", "12.9"))
    with pytest.raises(CalibrationError, match=r"of 'Test GPU A' with driver 12.8, this is 'Test GPU B' with 12.9"):
        load("Test GPU B", "12.9")


def test_a_file_that_cannot_be_read(cache: Path) -> None:
    file_of("Test GPU A", "12.8").mkdir(parents=True)
    with pytest.raises(CalibrationError, match="cannot be read"):
        load("Test GPU A", "12.8")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> World:
    """A machine that has it all, as far as kvpool can see: two GPUs."""
    if reason := driver.missing():
        pytest.skip(reason)
    world = World(plain_kernels(), devices=2)
    for name, module in {"cupy": fake_cupy.make(world), **fake_bindings.make(world)}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(machine, "_cupy", lambda: "fake")
    monkeypatch.setattr(machine, "nvrtc_release", lambda library: "12.9")
    monkeypatch.setattr(machine, "DRIVER_LIBRARY", driver.build(tmp_path))
    monkeypatch.setenv("COLUMNS", "250")
    small = calibrate.Sizes(fragments=(512, 4096), counts=(2, 9), most_bytes=9 * 4096, blocks=(2,), holds=2)
    monkeypatch.setattr(calibrate, "Sizes", lambda: small)
    return world


def made() -> KVCacheManager:
    config = CacheConfig(4, [PoolConfig("kv", 64)], device_bytes=64 * 9, host_bytes=64 * 8)
    return KVCacheManager(config, device="cuda:1")


def test_doctor_measures_prints_and_stores_and_managers_go_by_it(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--calibrate", "--device", "cuda:1"]) == 0
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    speeds = {tuple(line[:5]) for line in lines if len(line) == 7}
    for direction in ("offload", "onboard", "copy"):
        for size in ("512 bytes", "4 KiB"):
            for count in ("2", "9"):
                for path, blocks in (
                    ("plain copy", ""),
                    ("engine", ""),
                    ("batch", ""),
                    ("registers", "2"),
                    ("ring", "2"),
                ):
                    assert (direction, size, count, path, blocks) in speeds
                assert ((direction, size, count, "staged", "2") in speeds) == (direction != "copy")
    assert f"stored in {file_of('Test GPU B', '12.8')}" in out
    assert world.registered == {}
    stored = load("Test GPU B", "12.8")
    assert stored is not None
    assert {row.path for row in stored.rows} == EVERY
    with made() as manager:
        assert manager._moves is not None
        mover = manager._moves.mover
        assert isinstance(mover, CudaMover)
        assert mover._carrier.chooser == stored
    assert main(["doctor", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["uses"]["calibration"]
    assert first == {"gpu": "Test GPU A", "file": str(file_of("Test GPU A", "12.8")), "measured": None, "problem": None}
    assert second["measured"] == stored.measured


def test_doctor_says_what_is_used_without_one(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert (
        "none. Until kvpool doctor --calibrate has run: copy engine from 256.0 KiB on, else a kernel of 16 blocks"
        in out
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager = made()
    assert manager._moves is not None
    assert manager._moves.mover._carrier.chooser == Thresholds()  # type: ignore[attr-defined]
    manager.close()


def test_a_damaged_calibration_is_a_warning_and_the_default_is_used(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file_of("Test GPU B", "12.8")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.warns(RuntimeWarning, match=r"cuda12.8.json is damaged.*default is used.*doctor --calibrate"):
        manager = made()
    assert manager._moves is not None
    assert manager._moves.mover._carrier.chooser == Thresholds()  # type: ignore[attr-defined]
    manager.close()
    assert main(["doctor"]) == 0
    assert "is damaged: Expecting" in capsys.readouterr().out
    assert main(["doctor", "--calibrate", "--device", "cuda:1"]) == 0  # it is written anew
    assert load("Test GPU B", "12.8") is not None


def test_a_wrong_byte_is_not_stored(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant_a_wrong_ring(monkeypatch)
    assert main(["doctor", "--calibrate"]) == 1
    assert "nothing is stored: wrong byte: offload, pages of 512 bytes: ring" in capsys.readouterr().err
    assert load("Test GPU A", "12.8") is None


def test_a_gpu_that_fails_is_an_error_not_a_crash(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.fault_at = 100
    assert main(["doctor", "--calibrate"]) == 1
    assert "Test GPU A: " in capsys.readouterr().err
    assert load("Test GPU A", "12.8") is None


def test_what_cannot_be_calibrated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "DRIVER_LIBRARY", "libcuda-that-does-not-exist.so.1")
    assert main(["doctor", "--calibrate"]) == 2
    assert "no GPU to calibrate. device: 'cuda' cannot be used: the NVIDIA driver is missing" in capsys.readouterr().err
    assert main(["doctor", "--calibrate", "--device", "gpu"]) == 2
    assert main(["doctor", "--calibrate", "--json"]) == 2


def test_nowhere_to_store_is_an_error(world: World, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "kvpool").write_text("a file where a folder should be")
    assert main(["doctor", "--calibrate"]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_time_that_is_up_cuts_it_short(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpool.doctor.SECONDS", -1)
    assert main(["doctor", "--calibrate"]) == 1
    assert load("Test GPU A", "12.8") is None

"""`kvpool doctor`: what it prints on a machine with a GPU, and on one without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import driver
from kvpool import __version__, _core, machine
from kvpool.cli import main
from kvpool.doctor import size
from kvpool.machine import Host, NumaNode
from kvpool.mover.pinned import CHUNK_BYTES


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine with two nodes of two cores, and nothing of CUDA."""
    host = Host(4, 64 << 30, 8 << 20, [NumaNode(0, 2, 32 << 30), NumaNode(1, 2, 32 << 30)])
    monkeypatch.setattr(machine, "look_at_host", lambda: host)
    monkeypatch.setattr(machine, "DRIVER_LIBRARY", "libcuda-that-does-not-exist.so.1")
    monkeypatch.setattr(machine, "_cupy", lambda: None)
    monkeypatch.setattr(machine, "nvrtc_release", lambda library: None)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return monkeypatch


def test_without_a_gpu(bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["NVIDIA driver", "none"] in rows
    assert ["CuPy", "none"] in rows
    assert ["NVRTC", "none"] in rows
    assert ["locked memory (ulimit -l)", "8.0 MiB"] in rows
    assert ["cores", "4"] in rows
    assert ["NUMA node 1", "2 cores, 32.0 GiB"] in rows
    assert ["device", "cpu (pages in host memory)"] in rows
    assert any("libcuda-that-does-not-exist" in "".join(row) for row in rows)
    assert any("pip install kvpool[cuda]" in "".join(row) for row in rows)


def test_json_is_all_of_stdout(bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == __version__
    assert found["offers"]["cuda"]["driver"] is None
    assert found["offers"]["host"]["locked_bytes"] == 8 << 20
    assert found["offers"]["host"]["numa"][1] == {"node": 1, "cores": 2, "memory_bytes": 32 << 30}
    assert found["uses"]["device"] == "cpu"
    assert found["uses"]["why_not_cuda"] == found["offers"]["cuda"]["problems"]
    assert len(found["uses"]["why_not_cuda"]) == 3
    assert found["uses"]["kernels"] == _core.kernel_names()
    assert found["uses"]["pinned_chunk_bytes"] == CHUNK_BYTES
    assert found["uses"]["prefault_threads"] == 4
    assert found["uses"]["calibration"] == []
    assert found["uses"]["without_calibration"] == {"copy_engine_from_bytes": 256 << 10, "blocks_of_a_kernel": 16}


def test_with_gpus(bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if reason := driver.missing():
        pytest.skip(reason)
    bare.setattr(machine, "DRIVER_LIBRARY", driver.build(tmp_path))
    bare.setattr(machine, "_cupy", lambda: "14.2.0")
    bare.setattr(machine, "nvrtc_release", lambda library: "12.9")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "CUDA 12.8" in out
    assert "Test GPU B, 128.0 GiB, compute capability 9.1" in out
    assert "never tried on a GPU" in out
    assert main(["doctor", "--json"]) == 0
    uses = json.loads(capsys.readouterr().out)["uses"]
    assert (uses["device"], uses["why_not_cuda"]) == ("cuda", [])


def test_on_this_machine() -> None:
    """In a process of its own, as a user runs it."""
    done = subprocess.run(
        [sys.executable, "-m", "kvpool", "doctor", "--json"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["offers"] == machine.look().to_dict()


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(None, "unlimited"), (0, "0 bytes"), (65_536, "64.0 KiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes(num_bytes: int | None, text: str) -> None:
    assert size(num_bytes) == text

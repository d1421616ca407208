"""What a machine offers, and what `device="cuda"` says about one that cannot do it."""

from __future__ import annotations

import importlib.util
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import driver
from kvpool import CacheConfig, ConfigError, KVCacheManager, PoolConfig, machine

CONFIG = CacheConfig(tokens_per_block=4, pools=[PoolConfig("kv", page_bytes=64)], device_bytes=64 * 8)
MISSING = "libcuda-that-does-not-exist.so.1"


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """CuPy and NVRTC are there, whatever this machine has; no driver is."""
    monkeypatch.setattr(machine, "_cupy", lambda: "14.2.0")
    monkeypatch.setattr(machine, "nvrtc_release", lambda library: "12.9")
    monkeypatch.setattr(machine, "DRIVER_LIBRARY", MISSING)
    return monkeypatch


def use_driver(monkeypatch: pytest.MonkeyPatch, folder: Path, **answers: int) -> None:
    if reason := driver.missing():
        pytest.skip(reason)
    monkeypatch.setattr(machine, "DRIVER_LIBRARY", driver.build(folder, **answers))


def works_on_the_cpu() -> None:
    with KVCacheManager(CONFIG, device="cpu") as manager:
        cache = manager.create(1, np.arange(8, dtype=np.int32))
        assert cache.resume()
        assert cache.resize(8)
        manager.check()


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_without_a_driver_the_error_names_it_and_the_cpu_works_on(complete: pytest.MonkeyPatch, device: str) -> None:
    with pytest.raises(ConfigError, match=f"^device: '{device}' .*NVIDIA driver is missing: {MISSING}") as error:
        KVCacheManager(CONFIG, device=device)
    assert str(error.value).endswith("The CPU backend works here: device='cpu'")
    assert "CuPy" not in str(error.value)
    works_on_the_cpu()


def test_all_that_is_missing_is_named(complete: pytest.MonkeyPatch) -> None:
    complete.setattr(machine, "_cupy", lambda: None)
    complete.setattr(machine, "nvrtc_release", lambda library: None)
    with pytest.raises(ConfigError, match=r"driver is missing.*CuPy is not.*kvpool\[cuda\].*NVRTC"):
        KVCacheManager(CONFIG, device="cuda")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"version": 0}, "does not tell its version"),
        ({"version": 11080}, "is for CUDA 11.8; it must be for 12.0"),
        ({"init": 100}, "CUDA 12.8.* finds no GPU"),
        ({"init": 999}, "cuInit returns 999"),
        ({"gpus": 1}, "there is no GPU 1; the NVIDIA driver offers 1"),
    ],
)
def test_a_driver_that_is_no_use(
    complete: pytest.MonkeyPatch, tmp_path: Path, answers: dict[str, int], message: str
) -> None:
    use_driver(complete, tmp_path, **answers)
    with pytest.raises(ConfigError, match=message):
        machine.check_cuda("cuda:1")
    works_on_the_cpu()


def test_a_complete_machine(complete: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_driver(complete, tmp_path)
    machine.check_cuda("cuda")
    machine.check_cuda("cuda:1")
    found = machine.look_for_cuda()
    assert found.problems == []
    assert found.driver == "12.8"
    assert found.gpus == [machine.Gpu(0, "Test GPU A", 1 << 36, "9.0"), machine.Gpu(1, "Test GPU B", 2 << 36, "9.1")]
    assert json.loads(json.dumps(machine.look().to_dict()))["cuda"]["gpus"][1]["name"] == "Test GPU B"


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "cuda:99999", "", 0])
def test_no_device(device: object) -> None:
    with pytest.raises(ConfigError, match=r"^device: .* is none of 'cpu', 'cuda', 'cuda:N', None"):
        KVCacheManager(CONFIG, device=device)  # type: ignore[arg-type]


def test_parse_device() -> None:
    assert [machine.parse_device(device) for device in ("cpu", "cuda", "cuda:0", "cuda:12")] == [None, 0, 0, 12]


def test_host_is_what_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host = machine.look_at_host()
    assert host.cores >= 1
    assert host.memory_bytes > 0
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    assert host.locked_bytes == (None if soft == resource.RLIM_INFINITY else soft)
    for node, cores, kib in ((0, "0-3,8", 1000), (10, "4", 2000)):
        folder = tmp_path / f"node{node}"
        folder.mkdir()
        (folder / "cpulist").write_text(f"{cores}\n")
        (folder / "meminfo").write_text(f"Node {node} MemTotal:       {kib} kB\nNode {node} MemFree: 5 kB\n")
    monkeypatch.setattr(machine, "_NODES", tmp_path)
    assert machine.look_at_host().numa == [machine.NumaNode(0, 5, 1_024_000), machine.NumaNode(10, 1, 2_048_000)]


def test_looking_imports_no_cupy() -> None:
    code = "import sys, kvpool.machine as m; m.look(); assert 'cupy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy (kvpool[cuda]) is not installed")
def test_cupy_is_found_without_importing_it() -> None:
    import cupy

    assert machine._cupy() == cupy.__version__

"""The manager on device="cuda", under the stand-in for CuPy with the real kernels, passes the CPU backend's suite."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cpu_kernels
from kvpool import CacheConfig, ConfigError, KVCacheManager, PoolConfig, machine

TESTS = Path(__file__).parent
SUITES = ["test_manager.py", "test_batches.py"]
# A machine that has a GPU, as this suite sees it, does not refuse "cuda".
NOT_HERE = ["tests/test_manager.py::test_what_is_not_available_is_refused[device-options1]"]


@pytest.mark.parametrize("suite", SUITES)
def test_suite_of_the_cpu_backend_passes(suite: str) -> None:
    if reason := cpu_kernels.missing():
        pytest.skip(reason)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "on_cuda", "-p", "no:cacheprovider", str(TESTS / suite)]
    command += [f"--deselect={each}" for each in NOT_HERE]
    done = subprocess.run(
        command,
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    made = re.search(r"managers on cuda: (\d+)", done.stdout)
    assert made
    assert int(made[1]) > 3, "the suite ran on the CPU"


def test_pages_are_the_devices_and_buffers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import fake_cupy

    world = fake_cupy.World(cpu_kernels.plain_kernels())
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy.make(world))
    monkeypatch.setattr(machine, "check_cuda", lambda device: None)
    config = CacheConfig(4, [PoolConfig("kv", 64)], device_bytes=64 * 9, host_bytes=64 * 8)
    with KVCacheManager(config, device="cuda") as manager:
        assert isinstance(manager.pages("kv"), fake_cupy.DeviceArray)
        assert manager.pages("kv").shape == (9, 64)
        assert manager.pages("kv", "host").shape == (8, 64)
        assert len(world.registered) == 2  # the host's pages, and the mover's descriptors
        for number in range(3):  # more than the device holds: pages go down by the real kernels
            cache = manager.create(number, np.arange(100 * number, 100 * number + 16, dtype=np.int32))
            assert cache.resume()
            assert cache.resize(16)
            slots = manager.block_tables([cache], "kv")[0]
            manager.pages("kv")[slots] = number + 1
            cache.commit(range(100 * number, 100 * number + 16))
            cache.close()
        assert manager.stats().offloaded == 4
        again = manager.create("again", np.arange(17, dtype=np.int32))
        assert again.num_reused_tokens == 16
        assert again.resume()
        assert again.resize(17)
        slots = manager.block_tables([again], "kv")[0]
        assert (np.asarray(manager.pages("kv"))[slots[:4]] == 1).all()
        again.close()
        manager.check()
    assert world.registered == {}
    assert "copy_pages_u128" in world.launches
    with pytest.raises(ConfigError, match="buffers"):
        KVCacheManager(config, device="cuda", buffers={"kv": np.zeros((9, 64), np.uint8)})

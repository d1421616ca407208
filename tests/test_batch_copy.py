"""The driver's batched copy: the real cuda.bindings on a stand-in for the driver, and machines that lack it."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import driver
import fake_bindings
import fake_cupy
from cpu_kernels import plain_kernels
from cuda_movers import fake_gpu, stand_ins
from kvpool import machine
from kvpool.mover.batch_copy import MOST, BatchCopy
from kvpool.mover.cuda_runtime import CudaRuntime

HAS_BINDINGS = importlib.util.find_spec("cuda.bindings") is not None if importlib.util.find_spec("cuda") else False

# In a process of its own, in which the driver's library is the stand-in.
CALL = """
import ctypes, json
import numpy as np
from kvpool.mover.batch_copy import MOST, BatchCopy

try:
    copy = BatchCopy()
except RuntimeError as error:
    print(json.dumps({"problem": str(error)}))
    raise SystemExit
n = MOST
source, target = np.random.default_rng(0).integers(0, 256, (n, 32), np.uint8), np.zeros((n, 32), np.uint8)
order = np.random.default_rng(1).permutation(n).astype(np.uint64)
rows = np.arange(n, dtype=np.uint64) * np.uint64(32)
sizes = np.full(n, 32, np.uint64)
copy(target.ctypes.data + rows, source.ctypes.data + order * np.uint64(32), sizes, 0x7F00_0000_1234)

class Seen(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("calls", "count", "number", "first", "stream")]
    _fields_ += [("order", ctypes.c_int), ("flags", ctypes.c_uint)]

seen = Seen.in_dll(ctypes.CDLL("libcuda.so.1"), "batch_seen")
found = {name: getattr(seen, name) for name, _ in Seen._fields_}
found["right"] = bool(np.array_equal(target, source[order]))
sizes[7] = 0
try:
    copy(target.ctypes.data + rows, source.ctypes.data + rows, sizes, 1)
except RuntimeError as error:
    found["refused"] = str(error)
print(json.dumps(found))
"""


def call(folder: Path | None, version: int = 12080) -> dict[str, object]:
    """What CALL prints. folder: where the stand-in for the driver is built; None: there is none."""
    environment = {"PATH": "/usr/bin:/bin"}
    if folder is not None:
        shutil.copy(driver.build(folder, version=version), folder / "libcuda.so.1")
        environment["LD_LIBRARY_PATH"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-c", CALL], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not HAS_BINDINGS, reason="cuda.bindings (kvpool[cuda]) is not installed")
@pytest.mark.skipif(bool(driver.missing()), reason=str(driver.missing()))
@pytest.mark.parametrize("version", [12080, 13000])
def test_cuda_bindings_and_the_driver_agree_on_the_call(tmp_path: Path, version: int) -> None:
    """Every argument arrives as cuda.h declares it; a driver of CUDA 13 gives the same function."""
    found = call(tmp_path, version)
    assert found["right"] is True
    assert found["refused"] == f"cuMemcpyBatchAsync: error 1, copy number 7 of {MOST}"
    numbers = {"calls": 1, "count": MOST, "number": 1, "first": 0, "stream": 0x7F00_0000_1234, "order": 1, "flags": 0}
    assert {name: found[name] for name in numbers} == numbers


@pytest.mark.skipif(not HAS_BINDINGS, reason="cuda.bindings (kvpool[cuda]) is not installed")
@pytest.mark.skipif(bool(driver.missing()), reason=str(driver.missing()))
def test_a_driver_of_before_cuda_12_8_lacks_it(tmp_path: Path) -> None:
    assert "before CUDA 12.8" in str(call(tmp_path, 12040)["problem"])


@pytest.mark.skipif(not HAS_BINDINGS, reason="cuda.bindings (kvpool[cuda]) is not installed")
@pytest.mark.skipif(machine.look_for_cuda().driver is not None, reason="this machine has a driver")
def test_without_a_driver_it_says_so() -> None:
    assert "finds no driver" in str(call(None)["problem"])


def test_the_stand_in_has_the_structure_of_cuda_bindings() -> None:
    bindings = pytest.importorskip("cuda.bindings.driver", reason="cuda.bindings (kvpool[cuda]) is not installed")
    real, fake = bindings.CUmemcpyAttributes(), fake_bindings.MemcpyAttributes()
    for attributes, order in ((real, bindings.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM), (fake, 1)):
        attributes.srcAccessOrder, attributes.flags = order, 1
    size = ctypes.sizeof(fake_bindings.MemcpyAttributes)
    assert ctypes.string_at(int(real.getPtr()), size) == ctypes.string_at(fake.getPtr(), size)


@pytest.mark.parametrize(("version", "reason"), [(None, "not installed"), (12040, "before CUDA 12.8")])
def test_where_it_is_missing_the_runtime_says_why(version: int | None, reason: str) -> None:
    runtime, gpu = fake_gpu(version=version)
    assert reason in str(runtime.batch_problem())
    assert gpu.batches == []


def test_it_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that copies wrong, or refuses, is one without it; once, whoever asks again."""
    gpu = fake_cupy.World(plain_kernels())
    for problem, instead in (("wrong bytes", lambda *_: 0), ("error 801", lambda *_: 801)):
        with stand_ins(gpu):
            monkeypatch.setattr(fake_bindings, "_call", instead)
            runtime = CudaRuntime(0)
            assert problem in str(runtime.batch_problem())
            assert problem in str(runtime.batch_problem())
    assert gpu.fault is None


def test_what_the_driver_refuses_is_an_error_with_the_copys_number() -> None:
    runtime, _ = fake_gpu()
    memory, host, stream = runtime.allocate(64), np.zeros(16, np.uint8), runtime.stream()
    to, of = (
        np.array([memory.ptr, memory.ptr + 16], np.uint64),
        np.array([memory.ptr + 32, host.ctypes.data], np.uint64),
    )
    with pytest.raises(RuntimeError, match="error 1, copy number 1 of 2"):
        runtime.copy_batch(to, of, np.full(2, 16, np.uint64), stream)  # not registered
    with pytest.raises(RuntimeError, match="none in particular"):
        runtime.copy_batch(to[[0, 0]], of[[0, 0]], np.full(2, 16, np.uint64), stream)  # both write the same bytes
    with pytest.raises(ValueError, match="not in 1"):
        runtime.copy_batch(to[:0], of[:0], to[:0], stream)


def test_without_the_package_it_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(RuntimeError, match=r"pip install kvpool\[cuda\]"):
        BatchCopy()

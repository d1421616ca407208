"""A pytest plugin (`-p on_cuda`): managers that tests make for "cpu" are for "cuda", on the stand-in for CuPy.

Those that are given memory or a mover of their own stay as they are.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import fake_cupy
from cpu_kernels import plain_kernels
from kvpool import KVCacheManager, machine

made = {"cuda": 0}


def pytest_configure() -> None:
    world = fake_cupy.World(plain_kernels(), seed=1)
    sys.modules["cupy"] = fake_cupy.make(world)
    machine._cupy = lambda: "fake"
    machine._driver = lambda: ("12.8", [machine.Gpu(0, "stand-in", 1 << 30, "9.0")], None)
    machine.nvrtc_release = lambda library: "12.9"
    init = KVCacheManager.__init__

    @functools.wraps(init)
    def on_cuda(self: KVCacheManager, config: Any, device: Any = "cpu", **options: Any) -> None:
        if device == "cpu" and not options.get("buffers") and "mover" not in options:
            device = "cuda"
            made["cuda"] += 1
        init(self, config, device, **options)

    KVCacheManager.__init__ = on_cuda  # type: ignore[method-assign]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"managers on cuda: {made['cuda']}")

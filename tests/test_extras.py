"""What `import kvpool` brings along, and what a missing extra says."""

from __future__ import annotations

import subprocess
import sys

import pytest


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_import_brings_no_extra() -> None:
    extras = ("torch", "transformers", "cupy", "click", "rich", "plotly")
    done = _python(f"import sys, kvpool; print(sorted(set({extras!r}) & set(sys.modules)))")
    assert done.stdout == "[]\n", done.stderr


# What kvpool is made of besides numpy. A further module is milliseconds for every program that imports kvpool.
STANDARD = (
    "__future__, bisect, collections.abc, contextlib, copy, dataclasses, enum, functools, heapq, itertools, math, "
    "operator, os, threading, types, typing, weakref"
)


def test_import_brings_nothing_but_numpy_and_what_kvpool_is_made_of() -> None:
    """How long it takes: bench/import_time.py."""
    code = (
        f"import sys, numpy, {STANDARD}\n"
        "before = set(sys.modules)\n"
        "import kvpool\n"
        "print(sorted(name for name in set(sys.modules) - before if not name.startswith('kvpool')))\n"
        "parts = ('replay', 'integrations', 'machine', 'doctor', 'cli', 'mover.cuda', 'mover.pinned')\n"
        "print([part for part in parts if f'kvpool.{part}' in sys.modules])"
    )
    done = _python(code)
    assert done.stdout == "[]\n[]\n", done.stdout + done.stderr


def test_everything_public_imports_from_kvpool() -> None:
    """CUDA's mover too, which is loaded when it is asked for; no other name is made up."""
    done = _python(
        "from kvpool import *\n"
        "from kvpool import Context, CpuMover, CudaMover, MoveBatch, MoveError, SlotUse, Ticket\n"
        "import kvpool, kvpool.mover.cuda\n"
        "assert kvpool.CudaMover is kvpool.mover.cuda.CudaMover\n"
        "print(hasattr(kvpool, 'CudaMoves'))"
    )
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    ("module", "package"),
    [("torch", "torch"), ("transformers", "torch"), ("transformers", "transformers")],
)
def test_a_missing_extra_names_the_pip_line(module: str, package: str) -> None:
    """Whether the others are there or not: `package` is the only one that is missing."""
    present = sorted({"torch", "transformers"} - {package})
    done = _python(
        "import sys, types\n"
        f"for name in {present!r}:\n"
        f"    sys.modules[name] = types.ModuleType(name)\n"
        f"sys.modules[{package!r}] = None\n"
        f"import kvpool.integrations.{module}\n"
    )
    assert done.returncode == 1
    assert (
        f"kvpool.integrations.{module} needs {package}; install it with: pip install 'kvpool[{module}]'" in done.stderr
    )

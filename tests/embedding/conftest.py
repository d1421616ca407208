"""These tests need the extra transformers. Without it they are left out, unless KVPOOL_REQUIRE_EXTRAS is set."""

from __future__ import annotations

import os
from importlib import import_module

if os.environ.get("KVPOOL_REQUIRE_EXTRAS"):
    for package in ("torch", "transformers"):
        import_module(package)

try:
    import torch
except ModuleNotFoundError:
    collect_ignore_glob = ["test_*.py"]
else:
    torch.set_num_threads(1)

"""kvpool's side of `compare.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from worker import serve, steps

sys.path.insert(0, str(Path(__file__).parents[1]))
import memory_short
import w4


def w4_steps(number: int, warm: int, **case: Any) -> list[tuple[int, int]]:
    return steps(w4.World(w4.Case(**case)), number, warm)


def short(ratio: float) -> dict[str, Any]:
    outcome = memory_short.run(ratio, tiered=False, victim="newest", chunk=memory_short.T)
    return {name: getattr(outcome, name) for name in ("steps", "extra_percent", "mean_end")}


if __name__ == "__main__":
    serve({"w4": w4_steps, "short": short})

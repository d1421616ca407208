"""What the workers of `compare.py` share: answers on a stdout of their own, measured steps of a world."""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, Protocol

# A system may print to stdout: answers go to a copy of it, everything else to stderr.
_ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


class World(Protocol):
    """A state that lasts; `prepare` is not measured."""

    def prepare(self) -> None: ...

    def step(self) -> tuple[int, int]: ...


def steps(world: World, number: int, warm: int) -> list[tuple[int, int]]:
    """Thread time of schedule and update, ns; the first `warm` steps do not count."""
    gc.collect()
    gc.freeze()  # as servers do once they are set up
    times = []
    for _ in range(warm + number):
        world.prepare()
        times.append(world.step())
    gc.unfreeze()
    return times[warm:]


def serve(does: dict[str, Callable[..., Any]]) -> None:
    """A line of JSON in, a line out, until stdin ends."""
    for line in sys.stdin:
        given = json.loads(line)
        try:
            answer = does[given.pop("do")](**given)
        except NotImplementedError as error:
            answer = {"error": str(error), "unsupported": True}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": repr(error)}
        print(json.dumps(answer), file=_ANSWERS, flush=True)

"""What the workers of `compare.py` share: answers on a stdout of their own, measured steps of a world."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
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


def replay(
    path: str,
    slots: int,
    prepare: Callable[[list[int]], Any],
    claim: Callable[[Any], tuple[Any, int]],
    store: Callable[[Any, Any], bool],
    close: Callable[[Any], None],
) -> dict[str, float]:
    """W3: a Mooncake trace in file order, 64 requests active; without room the oldest ends early.

    `claim` returns what is held and how many blocks of it were cached; `prepare`, of a prompt's ids, is not measured.
    """
    clock = time.thread_time_ns
    active: deque[Any] = deque()
    spent = blocks = hits = 0
    for line in Path(path).read_text().splitlines():
        ids = json.loads(line)["hash_ids"][:slots]
        given = prepare(ids)
        start = clock()
        if len(active) == 64:
            close(active.popleft())
        held, reused = claim(given)
        while not store(held, given):
            close(active.popleft())
        spent += clock() - start
        active.append(held)
        blocks += len(ids)
        hits += reused
    for held in active:
        close(held)
    return {"hit_percent": round(100 * hits / blocks, 2), "ns": round(spent / blocks)}


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

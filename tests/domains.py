"""What the random tests draw from: shapes of a manager, the operations and their values, the events to be met."""

from __future__ import annotations

import itertools
import random
from typing import Any

from kvpool import Scope

SCOPES = (Scope(), Scope(lora_id=1), Scope(salt="1"), Scope(lora_id=1, salt=b"1"))
MIXES: tuple[tuple[tuple[int | None, int], ...], ...] = (
    ((None, 0),),
    ((3, 0), (8, 1)),
    ((None, 0), (3, 0)),
    ((5, 2), (None, 0)),
    ((None, 0), (None, 0)),
    ((None, 0), (4, 3), (1, 0)),
)  # (window, sink tokens) of each pool
MOST_OPEN = 5
MOST_STEPS = 4

Domain = range | tuple[Any, ...]  # one of these, the simplest first; some are there twice to come more often

_LEVELS = (0, 20, 35, 60, 100)
_PAIRS = (*((at,) for at in range(MOST_OPEN)), *itertools.product(range(MOST_OPEN), repeat=2))
_RUNS = (((0,) * a + (1,) * b + (2,) * c) for a, b, c in itertools.product(range(8), range(4), range(2)))
_THEN: dict[str, Domain] = {"then": tuple(sorted(_RUNS, key=lambda run: (len(run), run)))}
_LIKE: dict[str, Domain] = {"like": range(24)}
_TOKENS: dict[str, Domain] = {
    **_LIKE,  # a sequence that was seen before,
    "keep": (0,) * 8 + tuple(range(1, 13)),  # so many of its tokens,
    **_THEN,  # and these after them
}
_SCOPED: dict[str, Domain] = {"scope": (0,) * 9 + (1, 2, 3), "age": (0,) * 12 + (1, 2)}
_KEPT: dict[str, Domain] = {
    # (split, tokens up to the end, priority before the split, priority up to the end, priority of decoded blocks)
    "retention": (None,) * 600 + tuple(itertools.product((1, 2, 4, 6), (None, 4), _LEVELS, _LEVELS, (0, 35, 100))),
    # seconds for each of the three priorities
    "lasting": (None, *itertools.product((None, 1, 3), (None, 2, 9), (None, 4))),
}
_SERVED: dict[str, Domain] = {"spare": range(6), "stay": (False, True)}
_AT: dict[str, Domain] = {"at": range(MOST_OPEN)}

_ENTRIES = random.Random(1)


def _batch() -> tuple[tuple[int, int, tuple[int, ...], int], ...]:
    """Some requests: (like, keep, then, scope) each."""
    draw = _ENTRIES.choice
    count = draw((1, 2, 2, 3))
    return tuple(
        (draw(range(24)), draw(range(13)), draw(_THEN["then"][:200]), draw((0,) * 9 + (1, 2))) for _ in range(count)
    )


_BATCHES: dict[str, Domain] = {"batch": tuple(_batch() for _ in range(3000))}

SETUP: dict[str, Domain] = {
    "t": (1, 2, 4),
    "mix": range(len(MIXES)),
    "slots": range(1, 15),  # of the first pool,
    "second": range(1, 15),  # of the second one, if there is one
    "third": range(1, 15),
    "host": ((0, 0, 0),) * 200 + tuple(itertools.product(range(1, 9), repeat=3)),  # slots of the host, none or in all
    "least": (30, 30, 0, 35, 36, 60, 100),  # offload_min_priority
    "max_blocks": (0, 0, 0, *range(1, 10)),  # 0: more than the slots need
    "short": (False, True),
    "partial": (True, True, True, True, False),
}
# Name: (weight, domains of the values). A value is one draw, so that an operation is dropped by dropping few.
OPERATIONS: dict[str, tuple[int, dict[str, Domain]]] = {
    "create": (15, _TOKENS | _SCOPED | _KEPT),
    "serve": (6, _TOKENS | _SCOPED | _KEPT | _SERVED),
    "again": (6, _LIKE | {"cut": (0, 0, 1, 2, 3)} | _THEN | _SCOPED | _KEPT | _SERVED),
    "probe": (2, _TOKENS | _SCOPED),
    "resume": (18, _AT),
    "suspend": (3, _AT),
    "resize": (24, _AT | {"grow": (*range(10), -1, -2, -3, -4), "slide": (0, 0, 1, 3)}),
    "commit": (27, _AT | _TOKENS | {"count": (None, *range(1, 9))}),
    "close": (15, _AT),
    "step_begin": (6, {"ats": _PAIRS}),
    "step_end": (9, {"ats": _PAIRS}),
    "evict": (3, {"count": range(1, 4)}),
    "clear": (1, {}),
    "set_epoch": (1, {}),
    "add_batch": (4, _BATCHES | _KEPT),
    "claim": (6, _BATCHES | {"least": (None, 0, 1, 2, 5)} | _KEPT),
    "provide": (9, {"ats": _PAIRS, "grow": range(10)}),
    "generate": (6, {"ats": _PAIRS, "drafts": (0, 0, 2), "most": range(1, 9)}),
    "wait": (4, {"seconds": (1, 2, 4, 8)}),
    "misuse": (2, _AT),
}
# Another mood: short requests that keep their blocks for a while, one eviction at a time.
_LASTING: dict[str, Domain] = {
    "retention": tuple(itertools.product((2, 4, 20), (None,), (0, 20, 60, 100), (0, 35, 60, 100), (0, 35, 60, 100))),
    "lasting": (None, *itertools.product((1, 3, None), (2, 9, None), (4, 1))),
}
_SHORT: dict[str, Domain] = _LASTING | {"stay": (False,) * 9 + (True,), "spare": (0, 0, 1)}
_SELDOM = {name: (1, domains) for name, (_, domains) in OPERATIONS.items() if name not in ("clear", "set_epoch")}
LIVELY: dict[str, tuple[int, dict[str, Domain]]] = _SELDOM | {
    "serve": (25, OPERATIONS["serve"][1] | _SHORT),
    "again": (25, OPERATIONS["again"][1] | _SHORT),
    "create": (4, OPERATIONS["create"][1] | _LASTING),
    "claim": (4, OPERATIONS["claim"][1] | _LASTING),
    "evict": (16, {"count": (1,)}),
    "wait": (12, {"seconds": (1, 1, 2, 4)}),
    "close": (40, _AT),
}
# What a run must have met to have shown anything.
EVENTS = {
    "reused", "partial copy", "shortened", "refused", "evicted", "gap in the tree", "old block evicted", "stale page",
    "switched", "shared", "fenced", "closed in flight", "old epoch", "detached", "expired",
    "batch reused", "batch refused", "claim kept", "claim refused", "promise kept", "provide refused",
    "freed unprovided", "generated", "generation refused", "step verified", "verified",
    "tree probed",
}  # fmt: skip

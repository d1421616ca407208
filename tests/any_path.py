"""A chooser for tests: pages take any path."""

from __future__ import annotations

import random

from kvpool.mover.paths import PATHS, Choice, Shape


class AnyPath:
    """Any path that is offered, with any cap of blocks, as the seed says."""

    paths = frozenset(PATHS)

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, shape: Shape, offered: frozenset[str]) -> Choice:
        return Choice(self._random.choice(sorted(offered)), self._random.randint(1, 3))

"""Ways for pages to travel between two places of a GPU's memory and the host's, and who chooses one for a move.

    engine     a plain asynchronous copy per fragment, by the copy engine
    batch      one call of the driver for all fragments (cuMemcpyBatchAsync), by the copy engine
    registers  a kernel that copies 16 bytes at a time through registers
    ring       a kernel that copies through a ring in shared memory (cp.async, sm_80 and later)
    staged     gathered by a kernel in device memory and sent from there as few large copies; up the same way back

A fragment is a run of pages that are neighbours on both sides: the least number of copies that a move can be made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

PATHS = ("engine", "batch", "registers", "ring", "staged")
ALWAYS = frozenset({"engine"})  # every GPU, driver and page size can do this
INSTEAD = {"batch": "engine", "registers": "engine", "ring": "registers", "staged": "registers"}  # of what is missing
ENGINE_BYTES = 256 << 10  # a guess: what `Thresholds` does without a calibration
MAX_BLOCKS = 16  # a guess


@dataclass(frozen=True, slots=True)
class Shape:
    """What is to travel. fragments: runs of neighbours on both sides. host_runs: on the host's side alone, in any order
    (0: no side is the host's)."""

    direction: str
    page_bytes: int
    pages: int
    fragments: int
    host_runs: int

    @property
    def fragment_bytes(self) -> int:
        """Of the average fragment."""
        return self.pages * self.page_bytes // max(self.fragments, 1)


@dataclass(frozen=True, slots=True)
class Choice:
    """path: one of PATHS. blocks: cap of the grid, where a kernel takes part."""

    path: str
    blocks: int = MAX_BLOCKS


class Chooser(Protocol):
    """Chooses a path. Called under the mover's lock: it must be quick."""

    @property
    def paths(self) -> frozenset[str]:
        """All that `choose` may answer: the mover gets ready for these when it is made."""

    def choose(self, shape: Shape, offered: frozenset[str]) -> Choice:
        """One of the paths offered; ALWAYS are."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The default, without a calibration: fragments of `engine_bytes` on average by the copy engine, in one call of the
    driver where there are several and it has such a call; shorter ones by the register kernel."""

    engine_bytes: int = ENGINE_BYTES
    max_blocks: int = MAX_BLOCKS

    @property
    def paths(self) -> frozenset[str]:
        """The ring and the staging buffer are for those who have measured."""
        return frozenset({"engine", "batch", "registers"})

    def choose(self, shape: Shape, offered: frozenset[str]) -> Choice:
        """By the average fragment."""
        if shape.fragment_bytes < self.engine_bytes and "registers" in offered:
            return Choice("registers", self.max_blocks)
        return Choice("batch" if shape.fragments > 1 and "batch" in offered else "engine")


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always one path, or what stands in for it where it is not offered."""

    path: str
    blocks: int = MAX_BLOCKS

    @property
    def paths(self) -> frozenset[str]:
        """That one, and what stands in."""
        return ALWAYS | {self.path, INSTEAD.get(self.path, self.path)}

    def choose(self, shape: Shape, offered: frozenset[str]) -> Choice:
        """Whatever the shape."""
        path = self.path
        while path not in offered:
            path = INSTEAD[path]
        return Choice(path, self.blocks)

"""A small world of pages that random steps move about: what every slot holds is known from the order of submission.

Work takes effect as if it ran one after the other in the order in which it was submitted: that is what the events of
the slots promise. `World` keeps a log of its steps and, at each `settle`, replays it on a model that is told which
pages failed, then compares every page, and all that kernels have read, byte by byte.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import backend
from kvpool.mover import MoveBatch, SlotUse

PAGE_BYTES = 24
ENDS = {"offload": ("device", "host"), "onboard": ("host", "device"), "copy": ("device", "device")}
ORDERS = ["compute-last", "copies-eager", "copies-last", "random"]

Place = tuple[str, str, int]


def page(tag: int, page_bytes: int = PAGE_BYTES) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a page with this tag."""
    return np.frombuffer(tag.to_bytes(8, "little") * (page_bytes // 8), np.uint8)


@dataclass
class World:
    """Two pools; `step` does something at random, `settle` compares everything with the model."""

    seed: int
    slots: int = 24
    host: int = 16
    streams: int = 2
    page_bytes: int = PAGE_BYTES
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        pools = {pool: backend.page_arrays(self.slots, self.host, self.page_bytes) for pool in ("full", "window")}
        self.pages = {
            (pool, tier): pages
            for pool, tiers in pools.items()
            for tier, pages in zip(("device", "host"), tiers, strict=True)
        }
        self.mover = backend.mover(**{"check": True, **self.options})(pools)
        self.engine: list[Any] = [None, *(self.mover.stream() for _ in range(self.streams))]
        self.tag = 0
        self.model: dict[Place, int | None] = {}
        self.log: list[Callable[[], None]] = []
        self.tickets: list[Any] = []
        self.failed = 0
        self.full = 0
        self.checked = 0

    def _pick(self, pool: str, tier: str, most: int = 6) -> list[int]:
        low = 1 if tier == "device" else 0
        rows = range(low, len(self.pages[pool, tier]))
        count = self.random.randint(1, most)
        if self.random.random() < 0.5:  # neighbours
            start = self.random.randrange(low, len(rows) + low - count + 1)
            return list(range(start, start + count))
        return self.random.sample(rows, count)

    # -- steps --------------------------------------------------------------------------------

    def step(self) -> None:
        """One random operation."""
        kind = self.random.random()
        if kind < 0.55:
            self.move()
        elif kind < 0.9:
            self.compute()
        elif kind < 0.95:
            self.read_host()
        elif self.tickets:
            self.random.choice(self.tickets).wait()

    def move(self) -> None:
        """A batch in a random direction."""
        pool, direction = self.random.choice(["full", "window"]), self.random.choice(list(ENDS))
        near, far = ENDS[direction]
        if direction == "copy":
            slots = self.random.sample(range(1, self.slots), 2 * self.random.randint(1, 3))
            src, dst = slots[: len(slots) // 2], slots[len(slots) // 2 :]
        else:
            src, dst = self._pick(pool, near), self._pick(pool, far)
            src, dst = src[: len(dst)], dst[: len(src)]
        after = [self.random.choice(self.tickets)] if self.tickets and self.random.random() < 0.1 else []
        ticket = self.mover.submit(MoveBatch(pool, direction, src, dst), after)
        if ticket is None:
            self.full += 1
            return
        self.tickets = [*self.tickets[-20:], ticket]

        def replay() -> None:
            assert ticket.done()
            failed = {error.index: error for error in ticket.errors()}
            self.failed += len(failed)
            was = [self.model.get((pool, near, slot), 0) for slot in src]
            for index, (tag, slot) in enumerate(zip(was, dst, strict=True)):
                assert (tag is None) == (index in failed and failed[index].code == "source")
                self.model[pool, far, slot] = None if index in failed else tag
            for index, error in failed.items():
                assert (error.pool, error.direction, error.slot) == (pool, direction, src[index])

        self.log.append(replay)

    def compute(self) -> None:
        """A kernel that reads some pages and writes others, on the caller's thread or on a stream."""
        pool, stream = self.random.choice(["full", "window"]), self.random.choice(self.engine)
        slots = self._pick(pool, "device")
        reads, writes = slots[: len(slots) // 2], slots[len(slots) // 2 :]
        self.tag += 1
        tag, seen = self.tag, []
        pages = self.pages[pool, "device"]

        def kernel() -> None:
            seen.append(pages[reads].copy())
            pages[writes] = page(tag, self.page_bytes)

        uses = [SlotUse(pool, "device", reads), SlotUse(pool, "device", writes, True)]
        assert self.mover.step_begin(uses, stream)
        if stream is None:
            kernel()
        else:
            stream.launch(kernel)
        self.mover.step_end(uses, stream)

        def replay() -> None:
            self._compare(pool, "device", reads, seen[0])
            self.model.update({(pool, "device", slot): tag for slot in writes})

        self.log.append(replay)

    def read_host(self) -> None:
        """The caller reads host pages."""
        pool = self.random.choice(["full", "window"])
        slots = self._pick(pool, "host")
        assert self.mover.wait_on(None, pool, "host", slots)
        seen = self.pages[pool, "host"][slots].copy()
        self.mover.step_end([SlotUse(pool, "host", slots)])
        self.log.append(lambda: self._compare(pool, "host", slots, seen))

    # -- the end --------------------------------------------------------------------------------

    def _compare(self, pool: str, tier: str, slots: list[int], seen: np.ndarray[Any, Any]) -> None:
        for slot, content in zip(slots, seen, strict=True):
            tag = self.model.get((pool, tier, slot), 0)
            if tag is not None:
                self.checked += 1
                assert (content == page(tag, self.page_bytes)).all(), (
                    f"seed {self.seed}: {pool} {tier} {slot}: {content}, not {tag}"
                )

    def settle(self) -> None:
        """Wait for everything, then compare."""
        assert self.mover.synchronize(60)
        for stream in self.engine[1:]:
            assert stream is not None
            assert stream.synchronize(60)
        for replay in self.log:
            replay()
        self.log.clear()
        for (pool, tier), pages in self.pages.items():
            self._compare(pool, tier, list(range(len(pages))), pages)

    def run(self, steps: int, every: int = 200) -> None:
        """So many steps, settled every so often."""
        for number in range(1, steps + 1):
            self.step()
            if number % every == 0 or number == steps:
                self.settle()

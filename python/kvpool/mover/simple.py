"""Movers that do everything within `submit`, or nothing at all: to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvpool.arguments import ByteArray, Int32Array
from kvpool.mover.types import MoveBatch, MoveError, SlotUse


class Done:
    """A ticket of work that is over and went well."""

    def done(self) -> bool:
        """True."""
        return True

    def wait(self, timeout: float | None = None) -> bool:
        """True."""
        return True

    def result(self) -> MoveError | None:
        """None."""
        return None

    def errors(self) -> list[MoveError]:
        """None of them."""
        return []

    def give_up(self) -> bool:
        """False: it is over."""
        return False


class BooksMover:
    """Moves nothing: for a manager that keeps books only."""

    def submit(self, batch: MoveBatch, after: Sequence[Any] = ()) -> Done:
        """Over at once."""
        return Done()

    def wait_on(
        self, stream: Any, pool: str, tier: str, slots: Sequence[int] | Int32Array, timeout: float | None = None
    ) -> bool:
        """True: there is nothing to wait for."""
        return True

    def step_begin(self, uses: Sequence[SlotUse], stream: Any = None, timeout: float | None = None) -> bool:
        """True: there is nothing to wait for."""
        return True

    def step_end(self, uses: Sequence[SlotUse], stream: Any = None) -> None:
        """Nothing waits for it."""

    def synchronize(self, timeout: float | None = None) -> bool:
        """True: there is nothing to wait for."""
        return True

    def close(self) -> None:
        """Nothing to end."""


class AtOnceMover(BooksMover):
    """Copies within `submit`, by NumPy.

    pools: {name: (device pages, host pages or None)}, uint8 arrays (slots, page_bytes).
    """

    def __init__(self, pools: Mapping[str, tuple[ByteArray, ByteArray | None]]) -> None:
        self._pools = dict(pools)

    def submit(self, batch: MoveBatch, after: Sequence[Any] = ()) -> Done:
        """Copies at once. IndexError: a slot that there is not; ValueError: a tier that there is not."""
        device, host = self._pools[batch.pool]
        if host is None and batch.direction != "copy":
            raise ValueError(f"direction: {batch.direction!r} needs a host tier")
        if batch.direction == "offload" and host is not None:
            host[batch.dst] = device[batch.src]
        elif batch.direction == "onboard" and host is not None:
            device[batch.dst] = host[batch.src]
        else:
            device[batch.dst] = device[batch.src]
        return Done()

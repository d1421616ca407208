"""What becomes of one submission to `CudaMover`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvpool.mover.descriptors import Buffer
from kvpool.mover.slot_events import DIRECTIONS, GATHER
from kvpool.mover.types import MoveBatch, MoveError

if TYPE_CHECKING:
    from kvpool.mover.cuda import CudaMover


class CudaTicket:
    """A ticket of `CudaMover`."""

    def __init__(self, mover: CudaMover, batch: MoveBatch, place: int, failed: list[MoveError]) -> None:
        self._mover = mover
        self._batch = batch
        self._first = self._place = place  # in the direction's stream, of its first and last piece
        self._gathers = range(0)  # its places in the stream of gathers
        self._failed = failed
        self._over = False
        self._given_up = False
        self._buffers: list[Buffer] = []

    def _places(self) -> list[tuple[int, range]]:
        """Of all its work, by stream."""
        return [(DIRECTIONS.index(self._batch.direction), range(self._first, self._place + 1)), (GATHER, self._gathers)]

    def done(self) -> bool:
        """Whether it is over, well or not."""
        return self._mover._poll(self)

    def wait(self, timeout: float | None = None) -> bool:
        """Until it is over, at most `timeout` seconds. False: not in time."""
        if not self._over:
            self._mover._reach(DIRECTIONS.index(self._batch.direction), self._place, timeout)
        return self._over

    def result(self) -> MoveError | None:
        """Waits, then None if every page arrived, else the first that did not."""
        self.wait()
        return next(iter(self.errors()), None)

    def errors(self) -> list[MoveError]:
        """Every page that did not arrive, as far as is known now; the lowest index first."""
        return list(self._failed)

    def give_up(self) -> bool:
        """If it is not done: it counts as failed from now on, and its slots are fenced for good. Whether it was not."""
        return self._mover._give_up(self)

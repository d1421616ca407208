"""What movers take and give. Slots here, addresses never."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from kvpool.arguments import Int32Array

DIRECTIONS = ("offload", "onboard", "copy")


def slot_array(slots: Sequence[int] | Int32Array, name: str) -> Int32Array:
    """Slots as a C-contiguous int32 array of one dimension; ValueError names what is wrong."""
    array = np.asarray(slots)
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name}: shape {array.shape} of {array.dtype} is not a list of slots")
    if array.dtype != np.int32:
        if int(array.min()) < 0 or int(array.max()) >= 2**31:
            raise ValueError(f"{name}: a slot is not in 0..2**31-1")
        array = array.astype(np.int32)
    return np.ascontiguousarray(array)


@dataclass(frozen=True, slots=True, eq=False)
class MoveBatch:
    """Page `src[i]` to slot `dst[i]`, for all i. The order of the pages means nothing.

    pool: name. direction: "offload" (device to host), "onboard" (host to device), "copy" (inside the device).
    src, dst: int32, of one length; device slots 1..num_slots, host slots 0..host_slots-1. No slot is listed twice among
    the destinations, or is source and destination.
    """

    pool: str
    direction: str
    src: Sequence[int] | Int32Array
    dst: Sequence[int] | Int32Array

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction: {self.direction!r} is none of {', '.join(map(repr, DIRECTIONS))}")
        object.__setattr__(self, "src", slot_array(self.src, "src"))
        object.__setattr__(self, "dst", slot_array(self.dst, "dst"))
        if len(self.src) != len(self.dst):
            raise ValueError(f"src has {len(self.src)} slots, dst has {len(self.dst)}")


@dataclass(frozen=True, slots=True)
class MoveError:
    """A page that did not arrive. A value, never raised.

    code: "copy" (it failed), "source" (an earlier move into its source failed), "timeout" (given up), "closed" (the
    mover ended before). slot: the one that was to be read. index: its number in the batch.
    """

    code: str
    pool: str
    slot: int
    direction: str
    index: int


@dataclass(frozen=True, slots=True, eq=False)
class SlotUse:
    """Slots of a pool on a tier that the engine reads, or writes."""

    pool: str
    tier: str
    slots: Sequence[int] | Int32Array
    writes: bool = False


class Ticket(Protocol):
    """What becomes of one submission. Dropping it changes nothing."""

    def done(self) -> bool:
        """Whether it is over, well or not."""

    def wait(self, timeout: float | None = None) -> bool:
        """Until it is over, at most `timeout` seconds. False: not in time."""

    def result(self) -> MoveError | None:
        """Waits, then None if every page arrived, else the first that did not."""

    def errors(self) -> list[MoveError]:
        """Every page that did not arrive, as far as is known now."""

    def give_up(self) -> bool:
        """If it is not done: it counts as failed from now on ("timeout"), and its slots are fenced for good."""


@runtime_checkable
class Mover(Protocol):
    """Executes moves; decides nothing.

    A move's source waits for the slot's last write, its destination for the last write and all reads since, whoever
    made them. `stream` is the engine's: an object of the mover's, or None for the calling thread itself, whose waits
    return when they are over and whose work is over when it is recorded.
    """

    def submit(self, batch: MoveBatch, after: Sequence[Any] = ()) -> Ticket | None:
        """Enqueue, also behind the tickets `after`. None: the queue is full, nothing is taken. ValueError: bad slot."""

    def wait_on(
        self, stream: Any, pool: str, tier: str, slots: Sequence[int] | Int32Array, timeout: float | None = None
    ) -> bool:
        """The stream waits for everything that touches these slots. False: the caller waited in vain."""

    def step_begin(self, uses: Sequence[SlotUse], stream: Any = None, timeout: float | None = None) -> bool:
        """As `wait_on`, for all slots that a step will use."""

    def step_end(self, uses: Sequence[SlotUse], stream: Any = None) -> None:
        """The step that was launched uses these slots: later moves of them wait for it."""

    def synchronize(self, timeout: float | None = None) -> bool:
        """Wait for all moves. False: in vain."""

    def close(self) -> None:
        """Take no more; wait for what is enqueued. Twice is a no-op."""

"""Page moves: what every mover does (`Mover`), the one for CPU memory, and two simple ones to compare with."""

from kvpool.mover.cpu import CpuMover, CpuStream
from kvpool.mover.simple import AtOnceMover, BooksMover
from kvpool.mover.types import MoveBatch, MoveError, Mover, SlotUse, Ticket

__all__ = [
    "AtOnceMover",
    "BooksMover",
    "CpuMover",
    "CpuStream",
    "MoveBatch",
    "MoveError",
    "Mover",
    "SlotUse",
    "Ticket",
]

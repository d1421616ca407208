"""A matrix multiply alone, and beside every path."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvpool.mover.calibrate import PLAIN, ROUNDS, Bench
from kvpool.mover.cuda_runtime import CudaRuntime
from kvpool.mover.slot_events import DIRECTIONS

MULTIPLIES = 20
MOST_MOVES = 1000  # on their way beside the multiplies


@dataclass(frozen=True)
class Beside:
    """ms of MULTIPLIES matrix multiplies alone and while a path was copying."""

    direction: str
    path: str
    blocks: int | None
    alone_ms: float
    beside_ms: float
    slower: float


@dataclass
class Interference:
    """missing: why nothing could be multiplied. cut: time ran out."""

    rows: list[Beside] = field(default_factory=list)
    missing: str | None = None
    cut: bool = False


def interfere(
    runtime: CudaRuntime, bench: Bench, matrix: int, end: float, progress: Callable[[str], None]
) -> Interference:
    """Matrices of `matrix` rows; pages of the largest size, as many as a job has. end: of `time.monotonic`."""
    found = Interference()
    try:
        multiply = runtime.matrix_multiply(matrix)
        stream = runtime.stream()

        def many() -> None:
            for _ in range(MULTIPLIES):
                multiply(stream)

        many()
        stream.synchronize()
    except Exception as error:  # CuPy's wheel brings no cuBLAS
        found.missing = f"CuPy multiplies no matrices here: {error}"
        return found
    alone = statistics.median(bench.ms(stream, many) for _ in range(ROUNDS))
    size = max(bench.sizes.fragments)
    for direction in DIRECTIONS:
        progress(f"matrix multiply beside {direction}")
        for choice in [None, *bench.choices(direction, size)]:
            if time.monotonic() > end:
                found.cut = True
                return found
            job = bench.job(direction, size, bench.sizes.most_bytes // size, PLAIN if choice is None else choice.path)
            start = time.monotonic()
            bench.send(choice, job)
            bench.finish()
            once = 1e3 * (time.monotonic() - start)
            for _ in range(min(int(2 * alone / max(once, 1e-3)) + 1, MOST_MOVES)):  # copies for twice as long
                bench.send(choice, job)
            beside = bench.ms(stream, many)
            bench.finish()
            path, blocks = (PLAIN, None) if choice is None else (choice.path, choice.blocks or None)
            found.rows.append(Beside(direction, path, blocks, alone, beside, beside / alone))
    return found

"""What was measured on one GPU, and the choice of paths that follows: a file per GPU and driver.

`kvpool doctor --calibrate` and `make gpu-check` write it, `CudaMover` of a manager reads it. It lies in

    $XDG_CACHE_HOME/kvpool/calibration/<name of the GPU>-cuda<release of the driver>.json        (~/.cache by default)

and holds GB/s of every path by direction, page size and count, measured on pages without neighbours (fragment = page).
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from kvpool.errors import KVPoolError
from kvpool.mover.paths import PATHS, Choice, Shape, Thresholds
from kvpool.mover.slot_events import DIRECTIONS

FORMAT = 1
MOST_BYTES = 4 << 20  # of a file; one has some tens of KiB
KERNELS = ("registers", "ring", "staged")  # paths that have a cap of blocks


class CalibrationError(KVPoolError, ValueError):
    """A file that cannot be used; says which and why."""


@dataclass(frozen=True, slots=True)
class Speed:
    """`count` pages of `page_bytes`, scattered on both sides (staged: side by side on the host), went at `gb_per_s`.

    blocks: cap of the grid, None where no kernel takes part.
    """

    direction: str
    page_bytes: int
    count: int
    path: str
    blocks: int | None
    gb_per_s: float


Cell = dict[str, Speed]  # the fastest row of each path


@dataclass(frozen=True)
class Calibration:
    """A chooser: the fastest of the paths offered, by the nearest of what was measured.

    device: name of the GPU. driver: CUDA's release that the driver is for. measured: when, UTC. A move is looked up by
    its average fragment and their number; by way of staging memory by its page and the pages of a run on the host.
    """

    device: str
    driver: str
    measured: str
    rows: tuple[Speed, ...]

    @cached_property
    def _cells(self) -> dict[str, dict[int, dict[int, Cell]]]:
        """By direction, page size, count."""
        cells: dict[str, dict[int, dict[int, Cell]]] = {}
        for row in self.rows:
            cell = cells.setdefault(row.direction, {}).setdefault(row.page_bytes, {}).setdefault(row.count, {})
            if row.path not in cell or cell[row.path].gb_per_s < row.gb_per_s:
                cell[row.path] = row
        return cells

    @cached_property
    def _choices(self) -> dict[Any, Choice]:
        return {}

    @cached_property
    def paths(self) -> frozenset[str]:
        """All that were measured; "staged", which takes memory, only if it was the fastest somewhere."""
        found = {row.path for row in self.rows} - {"staged"}
        for sizes in self._cells.values():
            for counts in sizes.values():
                staged = [cell["staged"].gb_per_s for cell in counts.values() if "staged" in cell]
                others = [
                    max((row.gb_per_s for path, row in cell.items() if path != "staged"), default=0.0)
                    for cell in counts.values()
                ]
                if staged and max(staged) > min(others):
                    found.add("staged")
        return frozenset(found)

    def choose(self, shape: Shape, offered: frozenset[str]) -> Choice:
        """The fastest by the nearest cell; without any row that helps as `Thresholds`."""
        sizes = self._cells.get(shape.direction)
        if not sizes:
            return Thresholds().choose(shape, offered)
        size, page = (_nearest(sizes, of) for of in (shape.fragment_bytes, shape.page_bytes))
        count = _nearest(sizes[size], shape.fragments)
        staged = _nearest(sizes[page], shape.pages / shape.host_runs) if shape.host_runs else 0
        key = shape.direction, size, count, page, staged, offered
        choice = self._choices.get(key)
        if choice is None:
            cell = {path: row for path, row in sizes[size][count].items() if path in offered and path != "staged"}
            if "staged" in offered and staged and "staged" in sizes[page][staged]:
                cell["staged"] = sizes[page][staged]["staged"]
            best = max(cell.values(), key=lambda row: row.gb_per_s, default=None)
            if best is None:
                return Thresholds().choose(shape, offered)
            choice = Choice(best.path) if best.blocks is None else Choice(best.path, best.blocks)
            self._choices[key] = choice
        return choice

    def best(self) -> list[Speed]:
        """The fastest row of each direction, page size and count."""
        return [
            max(cell.values(), key=lambda row: row.gb_per_s)
            for sizes in self._cells.values()
            for counts in sizes.values()
            for cell in counts.values()
        ]

    def save(self) -> Path:
        """Into its file, whole or not at all. OSError: it cannot be written."""
        path = file_of(self.device, self.driver)
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"format": FORMAT, **asdict(self)}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(document, file, indent=1)
        os.replace(file.name, path)
        return path


def _nearest(keys: Iterable[int], to: float) -> int:
    """By ratio."""
    return min(keys, key=lambda key: abs(math.log(key / max(to, 1))))


def folder() -> Path:
    """Where the files are. A relative XDG_CACHE_HOME counts as none, as its specification says."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or ".")
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "kvpool" / "calibration"


def file_of(device: str, driver: str) -> Path:
    """The file of a GPU's name and a driver's release."""
    return folder() / f"{re.sub(r'[^A-Za-z0-9.]+', '-', device).strip('-')}-cuda{driver}.json"


def load(device: str, driver: str) -> Calibration | None:
    """What was measured there; None: nothing yet. CalibrationError: there is a file, and it cannot be used."""
    path = file_of(device, driver)
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CalibrationError(f"calibration: {path} cannot be read: {error}") from error
    try:
        found = _parse(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"calibration: {path} is damaged: {error}") from error
    if (found.device, found.driver) != (device, driver):
        raise CalibrationError(
            f"calibration: {path} is of {found.device!r} with driver {found.driver}, this is {device!r} with {driver}"
        )
    return found


def _parse(text: bytes) -> Calibration:
    """ValueError: what is wrong with it."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    document = json.loads(text)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    names = ("device", "driver", "measured")
    for name in names:
        if not isinstance(document.get(name), str):
            raise ValueError(f"{name} is no text")
    rows = document.get("rows")
    if not isinstance(rows, list) or not rows:
        raise ValueError("rows: there are none")
    device, driver, measured = (document[name] for name in names)
    return Calibration(device, driver, measured, tuple(_row(*each) for each in enumerate(rows)))


def _row(index: int, given: Any) -> Speed:
    names = [field.name for field in fields(Speed)]
    if not isinstance(given, dict) or sorted(given) != sorted(names):
        raise ValueError(f"rows[{index}] has not the fields {names}")
    row = Speed(**given)
    wrong = [
        name
        for name, right in (
            ("direction", row.direction in DIRECTIONS),
            ("path", row.path in PATHS),
            ("page_bytes", _is_count(row.page_bytes)),
            ("count", _is_count(row.count)),
            ("blocks", _is_count(row.blocks) if row.path in KERNELS else row.blocks is None),
            ("gb_per_s", type(row.gb_per_s) in (int, float) and 0 < row.gb_per_s < 1e9),
        )
        if not right
    ]
    if wrong:
        raise ValueError(f"rows[{index}].{wrong[0]}: {given[wrong[0]]!r} cannot be")
    return row


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def table(rows: Sequence[Speed]) -> list[tuple[str, ...]]:
    """(direction, page size, count, path, blocks, GB/s) as text."""
    return [
        (
            row.direction,
            f"{row.page_bytes >> 10} KiB" if row.page_bytes % 1024 == 0 else f"{row.page_bytes} bytes",
            str(row.count),
            row.path,
            "" if row.blocks is None else str(row.blocks),
            f"{row.gb_per_s:.2f}",
        )
        for row in rows
    ]

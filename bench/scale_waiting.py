"""W4 against the number of requests that wait: schedule + update, CPU µs, min and median of 270 steps each.

python bench/scale_waiting.py results/waiting.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import w4


def main(path: Path) -> None:
    w4.measure(w4.Case("A"))  # what the process does only once is not the first row's
    rows = []
    for waiting in (16, 100, 1_000, 4_000, 10_000):
        row: dict[str, object] = {"waiting": waiting}
        for kind in ("A", "B asked"):
            row[kind] = [round(us, 1) for us in w4.measure(w4.Case(kind, waiting)).together]
        rows.append(row)
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

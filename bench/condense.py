"""What the tables need of pytest-benchmark's JSON, which has every sample: {test: [min, median]} in µs per call.

python bench/condense.py FROM TO
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(source: Path, target: Path) -> None:
    found = {}
    for one in json.loads(source.read_text())["benchmarks"]:
        least, median = one["stats"]["min"], one["stats"]["median"]
        found[one["name"].removeprefix("test_")] = [round(1e6 * seconds, 2) for seconds in (least, median)]
    target.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

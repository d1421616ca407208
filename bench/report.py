"""Writes the tables of the results into bench/README.md and README.md, and draws the pictures.

    python bench/report.py            tables and pictures (needs matplotlib)
    python bench/report.py --tables   tables only
    python bench/report.py --check    exit 1 if a table is not what the results say

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Sources: results/*.json and rivals_py/results.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import tables
import targets

HERE = Path(__file__).parent
SOURCES = {
    "rust": HERE / "results" / "rust.json",
    "alone": HERE / "results" / "alone.json",
    "waiting": HERE / "results" / "waiting.json",
    "context": HERE / "results" / "context.json",
    "python": HERE / "rivals_py" / "results.json",
}
PAGES = [HERE / "README.md", HERE.parent / "README.md"]
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def results() -> tables.Results:
    return {name: json.loads(path.read_text()) for name, path in SOURCES.items()}


def with_tables(text: str, found: tables.Results) -> str:
    """The page with each of its tables as the results have it."""
    makers = {**tables.TABLES, "targets": targets.markdown}
    return MARKED.sub(lambda match: f"{match[1]}{makers[match[2]](found)}\n{match[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--tables", action="store_true", help="leave the pictures")
    given = parser.parse_args()
    found = results()
    stale = []
    for page in PAGES:
        text = page.read_text()
        new = with_tables(text, found)
        if new != text:
            stale.append(str(page.relative_to(HERE.parent)))
            if not given.check:
                page.write_text(new)
    if given.check:
        if stale:
            sys.exit(f"{', '.join(stale)}: not what the results say; run python bench/report.py")
        return
    if not given.tables:
        import pictures

        pictures.draw(found, HERE / "pictures")


if __name__ == "__main__":
    main()

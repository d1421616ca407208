"""Python blocks of a document. As a program: runs those of one page, with the kvpool that is installed."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def blocks(path: Path) -> list[str]:
    """The blocks fenced as python, in order."""
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.S)


def run(path: Path) -> None:
    """All blocks of a page in one namespace."""
    names: dict[str, object] = {"__name__": path.stem}
    for number, block in enumerate(blocks(path)):
        exec(compile(block, f"{path.name}, block {number}", "exec"), names)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
    print(f"all {len(blocks(Path(sys.argv[1])))} blocks of {sys.argv[1]} run")

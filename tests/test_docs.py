"""Every Python block of the documents runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = [
    (path.relative_to(ROOT).as_posix(), number, block)
    for path in [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.S))
]


@pytest.mark.parametrize(("path", "number", "block"), BLOCKS, ids=[f"{p}:{n}" for p, n, _ in BLOCKS])
def test_block_runs(path: str, number: int, block: str) -> None:
    exec(compile(block, f"{path}, block {number}", "exec"), {})


def test_readme_has_a_block() -> None:
    assert any(path == "README.md" for path, _, _ in BLOCKS)

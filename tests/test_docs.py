"""Every Python block of the documents runs: those of README and map each alone, a page of docs/ from its top."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from pages import blocks

ROOT = Path(__file__).parents[1]
EXTRAS = ("torch", "transformers")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch on models this small

ALONE = [
    (path.name, number, block)
    for path in (ROOT / "README.md", ROOT / "ARCHITECTURE.md")
    for number, block in enumerate(blocks(path))
]
PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if blocks(path)]


def _run(block: str, where: str, names: dict[str, object]) -> None:
    missing = [name for name in EXTRAS if f"import {name}" in block or f"from {name}" in block]
    missing = [name for name in missing if find_spec(name) is None]
    if missing and not os.environ.get("KVPOOL_REQUIRE_EXTRAS"):
        pytest.skip(f"needs {missing[0]}")
    exec(compile(block, where, "exec"), names)


@pytest.mark.parametrize(("path", "number", "block"), ALONE, ids=[f"{p}:{n}" for p, n, _ in ALONE])
def test_block_runs(path: str, number: int, block: str) -> None:
    _run(block, f"{path}, block {number}", {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_runs_from_its_top(page: Path) -> None:
    names: dict[str, object] = {"__name__": page.stem}
    for number, block in enumerate(blocks(page)):
        _run(block, f"docs/{page.name}, block {number}", names)


def test_readme_and_embedding_have_blocks() -> None:
    assert any(path == "README.md" for path, _, _ in ALONE)
    assert len(blocks(ROOT / "docs" / "embedding.md")) == 6
    assert len(blocks(ROOT / "docs" / "transformers.md")) == 3


def test_names_in_the_table_of_rules_exist() -> None:
    """docs/LIVENESS.md says where each rule stands in the code: module.name, or Class.name of some module."""
    source = ROOT / "python" / "kvpool" / "scheduler"
    modules = {path.stem: path.read_text() for path in source.glob("*.py")}
    table = (ROOT / "docs" / "LIVENESS.md").read_text().partition("| rule |")[2].partition("## Argument")[0]
    named = re.findall(r"`(\w+(?:\.\w+)+)`", table)
    assert len(named) >= 14
    for name in named:
        first, *others = name.split(".")
        places = (
            [modules[first]] if first in modules else [text for text in modules.values() if f"class {first}" in text]
        )
        assert any(all(re.search(rf"\b{part}\b", text) for part in others) for text in places), f"{name} is not there"

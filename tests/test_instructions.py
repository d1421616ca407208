"""The comparison of instruction counts with their record (bench/instructions/count.py); CI runs the counting itself."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "bench" / "instructions"
spec = importlib.util.spec_from_file_location("count", FOLDER / "count.py")
assert spec is not None
assert spec.loader is not None
count = importlib.util.module_from_spec(spec)
spec.loader.exec_module(count)

TOOLS = {"rustc": "1", "valgrind": "2"}
RECORD = {"toolchain": TOOLS, "instructions": {"create": 1000, "release": 100}}


@pytest.mark.parametrize(("now", "passes"), [(1050, True), (1051, False), (500, True)])
def test_growth_of_more_than_five_percent_fails(now: int, passes: bool) -> None:
    lines, passed = count.compare(RECORD, TOOLS, {"create": now, "release": 100})
    assert passed is passes
    assert any("GROWN" in line for line in lines) is not passes


def test_a_path_that_is_not_in_the_record_fails() -> None:
    assert not count.compare(RECORD, TOOLS, {"create": 1000, "probe": 1})[1]


def test_another_toolchain_is_not_compared_and_says_so() -> None:
    lines, passed = count.compare(RECORD, {**TOOLS, "rustc": "2"}, {"create": 9999})
    assert passed
    assert "not compared" in lines[0]


def test_record_has_each_path_that_is_counted() -> None:
    source = (FOLDER / "src" / "main.rs").read_text()
    functions = re.findall(r"#\[inline\(never\)\]\n    pub fn (\w+)", source)
    record = json.loads(count.RECORD.read_text())
    assert sorted(functions) == sorted(count.PATHS) == sorted(record["instructions"])
    assert int(re.findall(r"const CALLS: usize = (\d+)", source)[0]) == count.CALLS

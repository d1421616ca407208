"""Rules of the core's source that a reader relies on: where atomics are named, and why each ordering is enough."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

RUST = Path(__file__).parent.parent / "rust"
SOURCE = RUST / "kvpool-core" / "src"
FILES = sorted(SOURCE.rglob("*.rs"))
MOVER = sorted((RUST / "kvpool-mover" / "src").rglob("*.rs"))
BINDING = sorted((RUST / "kvpool-py" / "src").rglob("*.rs"))
TRIALS = sorted((RUST / "kvpool-trials").rglob("*.rs"))
ORDERING = re.compile(r"Ordering::(Relaxed|Acquire|Release|AcqRel|SeqCst)\b")


def _reasons(lines: list[str], at: int) -> str:
    """The comment at the end of a line, and the whole comment lines within the five above it."""
    above = [line.strip() for line in lines[max(0, at - 5) : at]]
    comments = [line for line in above if line.startswith("//") and not line.startswith("///")]
    trailing = [line.partition("//")[2] for line in lines[at : at + 2]]
    return " ".join([*comments, *trailing])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_every_ordering_has_a_reason_that_names_its_partner(file: Path) -> None:
    if file.name == "explored.rs":  # hands the caller's orderings on
        return
    lines = file.read_text().splitlines()
    for at, line in enumerate(lines):
        for ordering in ORDERING.findall(line.partition("//")[0]):
            reasons = _reasons(lines, at)
            assert re.search(rf"\b{ordering}\b", reasons), f"{file.name}:{at + 1}: {ordering} without a reason"
            if ordering != "Relaxed":
                assert "artner" in reasons or "model's own" in reasons or "planted" in reasons, f"{file.name}:{at + 1}"


def test_atomics_are_named_in_one_module() -> None:
    for file in FILES:
        code = "\n".join(line.partition("//")[0] for line in file.read_text().splitlines())
        if file.parent.name != "sync":
            assert "sync::atomic" not in code, f"{file}: atomics come from crate::sync"
            assert "UnsafeCell" not in code
            locks = re.search(r"\b(Mutex|RwLock|Condvar)\b", code)
            assert not locks or file.name == "models.rs", f"{file} names a lock"


def test_nobody_waits_for_a_lock() -> None:
    sync = (SOURCE / "sync" / "mod.rs").read_text()
    assert ".try_lock()" in sync
    assert ".lock()" not in sync
    assert not any("spin_loop" in file.read_text() or "yield_now" in file.read_text() for file in FILES)


def test_nothing_is_sorted_by_a_key_that_others_change() -> None:
    # The standard library's sort panics where keys change under it; a cached key is read once.
    for file in FILES:
        if file.name not in ("forecast.rs", "models.rs"):  # plain data of the caller's
            assert not re.search(r"\bsort(_unstable)?_by(_key)?\(", file.read_text()), f"{file}: sort_by_cached_key"


def _unsafe_lines(lines: list[str]) -> list[int]:
    code = [re.sub(r"unsafe_code|unsafe fn", "", line.partition("//")[0]) for line in lines]
    return [at for at, line in enumerate(code) if re.search(r"\bunsafe\b", line)]


def _has_fact(lines: list[str], at: int) -> bool:
    """Whether the comment right above the line, attributes between them, states a fact."""
    for line in reversed(lines[:at]):
        if "// SAFETY: " in line:
            return True
        if not re.match(r"\s*(//|#\[)", line):
            return False
    return False


def test_every_unsafe_block_has_a_safety_fact() -> None:
    manifest = (RUST.parent / "Cargo.toml").read_text()
    assert re.search(r'^undocumented_unsafe_blocks = "deny"$', manifest, re.MULTILINE)
    assert re.search(r'^unsafe_code = "deny"$', manifest, re.MULTILINE)
    found = 0
    for crate in sorted(path.parent for path in RUST.glob("*/Cargo.toml")):
        guarded = "[lints]\nworkspace = true" in (crate / "Cargo.toml").read_text()
        for file in (path for path in crate.rglob("*.rs") if "target" not in path.parts):
            lines = file.read_text().splitlines()
            for at in _unsafe_lines(lines):
                assert guarded, f"{file}: a crate with unsafe code takes the workspace's lints"
                assert _has_fact(lines, at), f"{file.name}:{at + 1}: unsafe without a fact"
                found += 1
    assert found >= 6
    assert not _has_fact(["// SAFETY: of another block", "let a = 1;", "unsafe { f() }"], 2)


def test_files_stay_short() -> None:
    for file in [*FILES, *MOVER, *BINDING, *TRIALS]:
        assert len(file.read_text().splitlines()) <= 500, f"{file} wants to be two"


def test_the_mover_keeps_unsafe_code_in_one_file_and_needs_no_atomics() -> None:
    assert MOVER
    for file in MOVER:
        code = "\n".join(line.partition("//")[0] for line in file.read_text().splitlines())
        assert file.name == "memory.rs" or "unsafe" not in code, f"{file}: unsafe code is in memory.rs"
        assert "Atomic" not in code, f"{file}: one mutex guards the books"
    memory = next(file for file in MOVER if file.name == "memory.rs").read_text()
    blocks = re.findall(r"^\s*unsafe (?:impl|\{)", memory, re.MULTILINE)
    assert len(blocks) == memory.count("// SAFETY:") == 3

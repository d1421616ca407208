"""Kernels executed on the CPU: byte for byte what their NumPy twins do, under sanitizers, with planted bugs noticed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import cpu_kernels
import kernel_cases
from cpu_kernels import FLAGS, SIGNATURES
from kernel_mutants import MUTANTS, Mutant
from kvpool.mover.twins import TWINS, copy_pages_u8, copy_pages_u128, gather_pages_u8, scatter_pages_u8

CASES = str(Path(__file__).with_name("kernel_cases.py"))
WORKERS = 2  # compilers and runs at once


@dataclass(frozen=True)
class Outcome:
    code: int  # of the process; negative: the signal that ended it
    words: str  # all that it said


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, Mutant | None], Outcome]]:
    """What all cases said of the kernels as they are (None), or of a planted bug; each asked for once, by the mode."""
    folder = tmp_path_factory.mktemp("kernels")
    pool = ThreadPoolExecutor(WORKERS)
    plain = cpu_kernels.read_sources()

    def name_of(mutant: Mutant | None) -> str:
        return "kernels" if mutant is None else f"mutant{MUTANTS.index(mutant)}"

    def build(mode: str, mutant: Mutant | None) -> str:
        sources = plain if mutant is None else mutant.plant(plain)
        library = cpu_kernels.build(sources, mode, folder, name_of(mutant))
        return str(library) if mutant is None or mutant.file == "walk" else f"{library}:{mutant.file}"

    @cache
    def run(mode: str, planted: bool) -> None:
        wanted = [mutant for mutant in MUTANTS if mutant.mode == mode] if planted else [None]
        libraries = list(pool.map(lambda mutant: build(mode, mutant), wanted))
        shares = [libraries[at::WORKERS] for at in range(min(WORKERS, len(libraries)))]
        for done in pool.map(lambda share: cpu_kernels.run_python(mode, [CASES, mode, *share]), shares):
            assert done.returncode == 0, done.stderr

    def outcome(mode: str, mutant: Mutant | None) -> Outcome:
        if reason := cpu_kernels.missing(mode):
            pytest.skip(reason)
        run(mode, mutant is not None)
        library = folder / f"{name_of(mutant)}-{mode}"
        return Outcome(int(library.with_suffix(".code").read_text()), library.with_suffix(".out").read_text())

    yield outcome
    pool.shutdown()


Ask = Callable[[str, Mutant | None], Outcome]


@pytest.mark.parametrize("mode", FLAGS)
def test_every_case_holds(mode: str, outcomes: Ask) -> None:
    found = outcomes(mode, None)
    count = sum(len(kernel_cases.cases(kernel, mode)) for kernel in SIGNATURES)
    assert found.code == 0, found.words[-3000:]
    assert f"all {count} cases hold\n" in found.words


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_planted_bug_is_noticed(mutant: Mutant, outcomes: Ask) -> None:
    found = outcomes(mutant.mode, mutant)
    assert "cases hold" not in found.words, "nothing noticed"
    assert found.words.startswith("case ") or "\ncase " in found.words, found.words
    noticed = re.search(r"AssertionError: \w+:|shim: |AddressSanitizer|ThreadSanitizer|runtime error", found.words)
    assert found.code < 0 or (found.code > 0 and noticed), found.words[-3000:]
    assert mutant.says in found.words


def test_ten_kinds_of_bugs_are_planted() -> None:
    kinds = {re.split(r",| of | but ", mutant.name)[0] for mutant in MUTANTS}
    assert {"tail guard", "off by one page", "swapped slots", "dropped lanes", "missing barrier before"} <= kinds
    assert {"divergent barrier", "wait one stage too weak", "two blocks on the same bytes"} <= kinds
    assert {"32-bit offset", "misaligned vector"} <= kinds


@pytest.mark.parametrize("kernel", SIGNATURES)
def test_random_launches(kernel: str) -> None:
    seed = int(np.random.default_rng().integers(1, 2**31))
    print(f"seed {seed}: kernel_cases.drawn({kernel!r}, {seed}, 'plain')")
    kernels = cpu_kernels.plain_kernels()
    for case in kernel_cases.drawn(kernel, seed, "plain"):
        kernel_cases.run(kernels, case, seed=seed)


def test_arguments_have_the_exact_type() -> None:
    kernels = cpu_kernels.plain_kernels()
    src, dst, slots = np.arange(32, dtype=np.uint8), np.zeros(32, np.uint8), np.zeros(1, np.int32)
    with pytest.raises(AssertionError, match="int64"):
        kernels.launch("gather_pages_u8", 1, 1, (src, dst, slots, 32, np.int32(1)))
    with pytest.raises(AssertionError, match="takes 5"):
        kernels.launch("gather_pages_u8", 1, 1, (src, dst, slots))
    with pytest.raises(AssertionError, match="error 1"):
        kernels.launch("gather_pages_u8", 0, 1, (src, dst, slots, np.int64(32), np.int32(1)))
    kernels.launch("gather_pages_u8", 1, 1, (src, dst, slots, np.int64(32), np.int32(1)))
    assert np.array_equal(src, dst)


def test_twins_by_hand() -> None:
    pool = np.arange(20, dtype=np.uint8)  # five pages of four bytes
    slots = np.array([4, 1, 3], np.int32)
    run = np.zeros(8, np.uint8)
    gather_pages_u8(pool, run, slots, 4, 2)
    assert run.tolist() == [16, 17, 18, 19, 4, 5, 6, 7]
    scatter_pages_u8(run, pool, np.array([0, 2], np.int32), 4, 2)
    assert pool.tolist() == [16, 17, 18, 19, 4, 5, 6, 7, 4, 5, 6, 7, 12, 13, 14, 15, 16, 17, 18, 19]
    copy_pages_u8(pool, pool, np.array([1], np.int32), np.array([4], np.int32), 4, 1)
    assert pool[16:].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("src_slots", "dst_slots", "page_bytes", "message"),
    [
        ([0, 1], [2, 2], 4, "twice"),
        ([0, 5], [1, 2], 4, "source slots 0..5"),
        ([0, 1], [-1, 2], 4, "destination slots -1..2"),
        ([0, 1], [1, 2], 4, "source and destination"),
        ([0, 1], [2, 3], 0, "page_bytes"),
    ],
)
def test_twins_refuse_what_a_kernel_takes_for_granted(
    src_slots: list[int], dst_slots: list[int], page_bytes: int, message: str
) -> None:
    pool = np.zeros(20, np.uint8)
    with pytest.raises(ValueError, match=message):
        copy_pages_u8(pool, pool, np.array(src_slots, np.int32), np.array(dst_slots, np.int32), page_bytes, 2)


def test_twins_of_vectors_refuse_what_is_not_aligned() -> None:
    pool, slots = np.zeros(100, np.uint8), np.zeros(1, np.int32)
    start = -pool.ctypes.data % 16
    with pytest.raises(ValueError, match="multiples of 16"):
        copy_pages_u128(pool[start:], pool[start + 48 :], slots, slots, 24, 1)
    with pytest.raises(ValueError, match="multiples of 16"):
        copy_pages_u128(pool[start + 8 :], pool[start + 48 :], slots, slots, 16, 1)
    assert set(TWINS) == set(SIGNATURES)

"""Bugs to plant in the kernels: the launches of kernel_cases.py must notice each, in the mode that is named.

A planted bug replaces one text that occurs exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    mode: str = "plain"
    says: str = ""  # what the report must contain

    def plant(self, sources: dict[str, str]) -> dict[str, str]:
        """The sources with the bug. Raises AssertionError unless `old` occurs exactly once."""
        text = sources[self.file]
        assert text.count(self.old) == 1, f"{self.name}: {text.count(self.old)} times in {self.file}.cu: {self.old!r}"
        return sources | {self.file: text.replace(self.old, self.new)}


_SHARE_END = "end = begin + each < total ? begin + each : total;"
_READ = "for (int i = threadIdx.x; i < count; i += blockDim.x) {"
_BEFORE = "__syncthreads();  // nobody still needs the window before"
_AFTER = "__syncthreads();  // all of this window is there"
_LOAD_GUARD = "if (at + (long long)i * blockDim.x < end) {"
_STORE_GUARD = "if (at + (long long)i * blockDim.x < end) store_once"
_U8 = "copy_through_registers<unsigned char>(window, src, dst, src_slots, dst_slots, page_bytes, num_pages);"
_VECTOR_IF_WHOLE = f"if (page_bytes % 16) {_U8}\n    else {_U8.replace('unsigned char', 'vec16')}"
_OVERLAP = _SHARE_END.replace("begin + each", "begin + each + 1")
_WAIT = "wait_async<STAGES - 1>();"
_WEAK_BUT_LAST = "if (storing + blockDim.x < end) wait_async<STAGES>();\n else wait_async<0>();"
_TWO_PLACES = "if (threadIdx.x & 1) __syncthreads();\nelse __syncthreads();"
_SOURCE = "(const char*)base + (long long)slot * page_bytes"
_TARGET = "(char*)base + (long long)slot * page_bytes"

MUTANTS = [
    Mutant("tail guard of the block", "walk", _SHARE_END, "end = begin + each;"),
    Mutant("tail guard of a load", "walk", _LOAD_GUARD, "if (at < end) {", "asan", "AddressSanitizer"),
    Mutant("tail guard of a store", "walk", _STORE_GUARD, "if (at < end) store_once"),
    Mutant("tail guard of the ring", "copy_ring", "if (starting < end) {", "if (storing < end) {"),
    Mutant("off by one page, source", "walk", "src_slots[first + i]", "src_slots[first + i + 1]"),
    Mutant("off by one page, end of a page", "walk", "if (unit >= per_page) {", "if (unit > per_page) {"),
    Mutant(
        "off by one page, end of a window", "walk", "(first + WINDOW) * per_page", "(first + WINDOW - 1) * per_page"
    ),
    Mutant("swapped slots, registers", "walk", "window.to[cursor.page]", "window.from[cursor.page]"),
    Mutant("swapped slots, ring", "copy_ring", "window.from[from.page]", "window.to[from.page]"),
    Mutant("swapped slots, lists", "walk", "src_slots ? src_slots[first + i]", "dst_slots ? dst_slots[first + i]"),
    Mutant("dropped lanes, slots", "walk", _READ, "if (const int i = threadIdx.x; i < count) {"),
    Mutant("dropped lanes, registers", "walk", "while (at < end) {", "while (at + 1 < end) {"),
    Mutant("dropped lanes, ring", "copy_ring", "storing < end; stage", "storing + 1 < end; stage"),
    Mutant("missing barrier before", "walk", _BEFORE, "", says="differ"),
    Mutant("missing barrier after", "walk", _AFTER, ""),
    Mutant("missing barrier before, as a race", "walk", _BEFORE, "", "tsan", "data race"),
    Mutant("missing barrier after, as a race", "walk", _AFTER, "", "tsan", "data race"),
    Mutant(
        "divergent barrier, not reached", "walk", _AFTER, f"if ((int)threadIdx.x < count) {_AFTER}", says="ended while"
    ),
    Mutant("divergent barrier, two places", "walk", _AFTER, _TWO_PLACES, says="wait at the barriers of lines"),
    Mutant("wait one stage too weak", "copy_ring", _WAIT, "wait_async<STAGES>();", says="on their way"),
    Mutant("wait one stage too weak but for the last", "copy_ring", _WAIT, _WEAK_BUT_LAST, says="differ"),
    Mutant("no wait", "copy_ring", _WAIT, "", says="on their way"),
    Mutant("empty groups left out", "copy_ring", "end_group_async();", "if (starting < end) end_group_async();"),
    Mutant("stage refilled too early", "copy_ring", "start_one((stage + STAGES - 1) % STAGES)", "start_one(stage)"),
    Mutant("ring filled one short", "copy_ring", "stage < STAGES - 1;", "stage < STAGES - 2;"),
    Mutant("two blocks on the same bytes", "walk", _SHARE_END, _OVERLAP, "tsan", "data race"),
    Mutant("32-bit offset of the source", "walk", _SOURCE, "(const char*)base + (unsigned)slot * (unsigned)page_bytes"),
    Mutant("32-bit offset of the target", "walk", _TARGET, "(char*)base + slot * (int)page_bytes"),
    Mutant("misaligned vector", "copy_pages", _U8, _VECTOR_IF_WHOLE, "asan", "misaligned address"),
]

"""`kvpool.replay`: trace reader, workload, prefixes, pattern, and sequential runs against known hit rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from kvpool.replay.generated import Workload, generate
from kvpool.replay.options import Options
from kvpool.replay.pattern import Pattern, block_tokens
from kvpool.replay.prefixes import PrefixIndex
from kvpool.replay.report import Report
from kvpool.replay.sequential import PAGE_BYTES, run_sequential
from kvpool.replay.traces import TraceError, TraceRequest, read_mooncake

CONVERSATION = Path(__file__).parents[1] / ".." / "shared" / "traces" / "mooncake_conversation.jsonl"
GOOD: dict[str, Any] = {"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]}


def requests_of(*id_lists: list[int]) -> list[TraceRequest]:
    return [TraceRequest(line, float(line), len(ids) * 4, 1, tuple(ids)) for line, ids in enumerate(id_lists, start=1)]


def write_trace(path: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def brute_force_lru(requests: list[TraceRequest], capacity: int) -> tuple[int, int]:
    """(hits, bound) of leaf-first LRU over whole prefixes, one request after the other. Slow and plain."""
    last_use: dict[tuple[int, ...], int] = {}
    seen: set[tuple[int, ...]] = set()
    hits = bound = 0
    for now, request in enumerate(requests):
        path = [request.hash_ids[: n + 1] for n in range(len(request.hash_ids))]
        bound += next((n for n, prefix in enumerate(path) if prefix not in seen), len(path))
        seen.update(path)
        path = path[:capacity]
        hits += next((n for n, prefix in enumerate(path) if prefix not in last_use), len(path))
        for prefix in path:
            if prefix not in last_use and len(last_use) == capacity:
                parents = {key[:-1] for key in last_use}
                leaves = [key for key in last_use if key not in parents and key not in path]
                del last_use[min(leaves, key=lambda key: (last_use[key], -len(key)))]
            last_use[prefix] = now
        last_use.update((prefix, now) for prefix in path)
    return hits, bound


# ---- traces ----


def test_mooncake_lines_are_read_in_order(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.jsonl", GOOD, "", {**GOOD, "hash_ids": [], "timestamp": 1.5, "more": None})
    assert read_mooncake(trace) == [
        TraceRequest(1, 0.0, 700, 5, (0, 1)),
        TraceRequest(3, 1.5, 700, 5, ()),
    ]


def test_limit_stops_before_a_bad_line(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.jsonl", GOOD, GOOD, "{")
    assert len(read_mooncake(trace, limit=2)) == 2
    with pytest.raises(TraceError):
        read_mooncake(trace)


@pytest.mark.parametrize(
    ("line", "field", "problem"),
    [
        ("{", None, "not valid JSON"),
        ("", None, "no requests"),
        ("[1]", None, "expected a JSON object"),
        ("[" * 100_000, None, "not valid JSON"),
        ('{"timestamp": ' + "9" * 5000 + "}", None, "not valid JSON"),
        *(({k: v for k, v in GOOD.items() if k != name}, name, "missing") for name in GOOD),
        *(({**GOOD, name: "7"}, name, "a string") for name in GOOD),
        *(({**GOOD, name: None}, name, "null") for name in GOOD),
        *(({**GOOD, name: True}, name, "a boolean") for name in GOOD),
        *(({**GOOD, name: -1}, name, "-1") for name in GOOD),
        ({**GOOD, "timestamp": float("nan")}, "timestamp", "finite"),
        ({**GOOD, "timestamp": 10**400}, "timestamp", "finite"),
        ({**GOOD, "input_length": 10**20}, "input_length", "at most 2147483647"),
        ({**GOOD, "output_length": 2**31}, "output_length", "at most 2147483647"),
        ({**GOOD, "input_length": 1.5}, "input_length", "1.5"),
        ({**GOOD, "hash_ids": [0, 1.0]}, "hash_ids", "entry 1"),
        ({**GOOD, "hash_ids": [0, 1, -2]}, "hash_ids", "entry 2"),
        ({**GOOD, "hash_ids": [[0]]}, "hash_ids", "entry 0"),
        ({**GOOD, "hash_ids": {"0": 1}}, "hash_ids", "an object"),
    ],
)
def test_malformed_line_names_line_and_field(tmp_path: Path, line: Any, field: str | None, problem: str) -> None:
    records = [line] if line == "" else [GOOD, GOOD, line, GOOD]
    trace = write_trace(tmp_path / "t.jsonl", *records)
    with pytest.raises(TraceError) as caught:
        read_mooncake(trace)
    assert caught.value.field == field
    assert problem in str(caught.value)
    if line != "":
        assert "line 3" in str(caught.value)
        assert field is None or f"'{field}'" in str(caught.value)


def test_bytes_that_are_not_text_are_malformed(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\n")
    with pytest.raises(TraceError, match="line 2: not UTF-8"):
        read_mooncake(trace)


# ---- generated workload, prefixes, pattern ----


def test_generated_workload_repeats_and_reuses() -> None:
    requests = generate(Workload(requests=500), seed=3, tokens_per_block=16)
    assert requests == generate(Workload(requests=500), seed=3, tokens_per_block=16)
    assert requests != generate(Workload(requests=500), seed=4, tokens_per_block=16)
    assert len(requests) == 500
    assert all(r.input_length == 16 * len(r.hash_ids) > 0 for r in requests)
    times = [r.timestamp_ms for r in requests]
    assert times == sorted(times)


def test_prefix_keys_tell_paths_apart() -> None:
    index = PrefixIndex()
    first = index.add([7, 8, 9])
    assert first.keys.tolist() == [0, 1, 2]
    assert first.seen == 0
    second = index.add([7, 9, 9])
    assert second.keys.tolist() == [0, 3, 4]  # id 9 again, under other prefixes
    assert second.seen == 1
    assert second.ids.tolist() == [0, 2, 2]
    assert index.add([7, 8, 9, 10]).seen == 3
    assert index.add([2**100]).ids.tolist() == [4]  # ids of any size
    assert index.add([]).seen == 0


@pytest.mark.parametrize("tokens_per_block", [1, 2, 16, 512])
def test_tokens_are_in_range_and_start_distinctly(tokens_per_block: int) -> None:
    ids = np.arange(1000, dtype=np.uint32)
    tokens = block_tokens(ids, tokens_per_block)
    assert tokens.dtype == np.int32
    assert tokens.shape == (1000 * tokens_per_block + 1,)
    assert tokens.min() >= 0
    assert tokens[:-1:tokens_per_block].tolist() == ids.tolist()
    again = block_tokens(ids[5:6], tokens_per_block)
    assert again[:-1].tolist() == tokens[5 * tokens_per_block : 6 * tokens_per_block].tolist()


def test_pattern_differs_by_block_pool_seed_and_word() -> None:
    keys = np.arange(64, dtype=np.uint64)
    words = [Pattern(64, pool, seed).pages(keys).view(np.uint64) for pool in range(3) for seed in range(3)]
    assert len(np.unique(np.concatenate(words))) == 9 * 64 * 8


@pytest.mark.parametrize("offset", [0, 1, 255])
def test_one_wrong_bit_is_found(offset: int) -> None:
    pattern = Pattern(256, 0, 1)
    keys = np.array([3, 9, 27], dtype=np.uint64)
    pages = pattern.pages(keys).copy()
    assert pattern.check(pages, keys) is None
    pages[1, offset] ^= 0x80
    wrong = pattern.check(pages, keys)
    assert wrong is not None
    assert (wrong.row, wrong.offset, wrong.found ^ wrong.expected) == (1, offset, 0x80)


@pytest.mark.parametrize("page_bytes", [0, -8, 12])
def test_pattern_needs_whole_words(page_bytes: int) -> None:
    with pytest.raises(ValueError, match="page_bytes"):
        Pattern(page_bytes, 0, 0)


# ---- sequential runs ----


def check_books(report: Report, options: Options) -> None:
    assert set(report.pools) == {"kv"}
    assert set(report.pools["kv"]) == {"device"}
    device = report.pools["kv"]["device"]
    assert device["slots"] == options.device_blocks
    assert device["free"] + device["active"] + device["held"] + device["cached"] + device["fenced"] == device["slots"]
    assert device["active"] == device["held"] == device["fenced"] == 0
    assert report.bytes_checked == report.reused_blocks * PAGE_BYTES
    assert report.evicted == report.dropped
    assert report.reused_blocks <= report.bound_blocks


def test_every_whole_block_is_reused() -> None:
    options = Options(tokens_per_block=4, device_blocks=10)
    report = run_sequential(requests_of([1, 2], [1, 2], [1, 2, 3], [1, 4], [], [5]), options)
    assert (report.requests, report.prompt_blocks, report.prompt_tokens) == (6, 10, 40)
    assert (report.reused_blocks, report.reused_tokens, report.bound_blocks) == (5, 20, 5)
    assert report.evicted == 0
    assert report.pools["kv"]["device"]["cached"] == 5
    check_books(report, options)


@pytest.mark.parametrize("tokens_per_block", [1, 3, 16])
@pytest.mark.parametrize("capacity", [1, 2, 40, 300, 100_000])
def test_hits_equal_a_plain_lru(capacity: int, tokens_per_block: int) -> None:
    requests = generate(Workload(requests=120, open_conversations=20), seed=capacity, tokens_per_block=16)
    options = Options(tokens_per_block=tokens_per_block, device_blocks=capacity)
    report = run_sequential(requests, options)
    assert (report.reused_blocks, report.bound_blocks) == brute_force_lru(requests, capacity)
    assert report.too_long == sum(len(r.hash_ids) > capacity for r in requests)
    check_books(report, options)


@pytest.mark.parametrize("policy", ["lru", "slru"])
def test_runs_repeat(policy: Literal["lru", "slru"]) -> None:
    requests = generate(Workload(requests=400), seed=1, tokens_per_block=16)
    options = Options(tokens_per_block=16, device_blocks=300, policy=policy)
    first, second = run_sequential(requests, options), run_sequential(requests, options)
    assert first.to_dict() == second.to_dict()
    assert first.evicted > 0
    check_books(first, options)


def test_wrong_byte_stops_the_run() -> None:
    requests = requests_of([9], [1, 2, 3], [1, 2, 3, 4], [1])
    report = run_sequential(requests, Options(tokens_per_block=4, device_blocks=10), corrupt_after=2)
    assert report.requests == 3
    assert report.wrong is not None
    assert report.wrong.startswith("request 3 (line 3), block 0, pool 'kv', slot ")
    assert "byte 128" in report.wrong


def test_should_stop_ends_the_run() -> None:
    seen: list[int] = []
    report = run_sequential(
        requests_of([1], [2], [3]),
        Options(tokens_per_block=4, device_blocks=10),
        should_stop=lambda: len(seen) == 2,
        advance=lambda report: seen.append(report.requests),
    )
    assert seen == [1, 2]
    assert report.interrupted
    assert report.requests == 2


@pytest.mark.skipif(not CONVERSATION.exists(), reason="the conversation trace is not here")
@pytest.mark.parametrize(("blocks", "lru_row"), [(1_000, 0.0445), (4_000, 0.0865), (20_000, 0.2878), (100_000, 0.3637)])
def test_conversation_trace_reaches_the_lru_row(
    blocks: int, lru_row: float, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = read_mooncake(CONVERSATION)
    rates: dict[str, float] = {}
    for policy in ("lru", "slru"):
        options = Options(device_blocks=blocks, policy=policy)
        report = run_sequential(requests, options)
        assert report.wrong is None
        assert (report.requests, report.prompt_blocks) == (12_031, 288_500)
        assert report.hit_rate_bound == pytest.approx(0.3664, abs=5e-5)
        check_books(report, options)
        rates[policy] = report.hit_rate_blocks
    with capsys.disabled():
        print(f"\n{blocks:>7,} blocks: LRU row {lru_row:.2%}, lru {rates['lru']:.2%}, slru {rates['slru']:.2%}")
    assert rates["lru"] >= lru_row - 0.005

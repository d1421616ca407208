"""`kvpool replay` in simulated time: contents, Azure traces, runs with room and without, plots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvpool.cli import main
from kvpool.replay import plots
from kvpool.replay.content import Contents
from kvpool.replay.generated import Workload, generate
from kvpool.replay.report import Report
from kvpool.replay.sequential import Options
from kvpool.replay.timed import STEP_MS, run_timed
from kvpool.replay.traces import TraceError, TraceRequest, read_azure, read_mooncake

TRACES = Path(__file__).parents[1] / ".." / "shared" / "traces"
WORKLOAD = generate(Workload(requests=150, answer_blocks=(0, 3)), 3, 16)


# -- contents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 3, 32, 33, 512])
def test_content_tells_every_prefix_position_and_block(block: int) -> None:
    contents = Contents(block, 1)
    tokens = np.arange(5 * block + block // 2, dtype=np.int32) % 7
    content = contents.of(tokens)
    assert content.count(len(tokens)) == len(content.ends)
    assert content.ends[content.per_page - 1] == block
    assert len(set(content.words.tolist())) == len(content.words)
    table = np.arange(6, dtype=np.int32)[::-1].copy()
    pages = np.zeros((6, contents.page_bytes // 8), np.uint64)
    content.write(pages, table, 0, len(content.ends))
    assert content.wrong(pages, table, len(content.ends)) is None
    other = tokens.copy()
    other[0] += 1  # every word behind it is another one
    assert contents.of(other).wrong(pages, table, len(content.ends)) == 0
    other = tokens.copy()
    other[-1] += 1
    last = content.count(len(tokens) - 1)
    assert contents.of(other).wrong(pages, table, last) is None
    pages[table[3], 0] ^= np.uint64(1 << 40)
    assert content.wrong(pages, table, len(content.ends)) == 3 * content.per_page


# -- Azure ------------------------------------------------------------------------------------------

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_azure_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HEAD + "2023-11-16 18:15:46.6805900,374,44\n\n2023-11-16 18:15:50.9951690,396,109\n")
    first, second = read_azure(path)
    assert first == TraceRequest(2, 0.0, 374, 44, ())
    assert (second.line, second.input_length, second.output_length) == (4, 396, 109)
    assert second.timestamp_ms == pytest.approx(4314.579, abs=0.01)
    assert read_azure(path, 1) == [first]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected the columns"),
        ("a,b\n1,2\n", "line 1: expected the columns"),
        (HEAD, "no requests"),
        (HEAD + "0,1\n", "line 2: expected 3 values"),
        (HEAD + "0,1,2\n0,-1,2\n", "line 3: field 'ContextTokens'"),
        (HEAD + "0,1,2.5\n", "line 2: field 'GeneratedTokens'"),
        (HEAD + "noon,1,2\n", "line 2: field 'TIMESTAMP'"),
        (HEAD + "inf,1,2\n", "line 2: field 'TIMESTAMP'"),
        (HEAD + "5,1,2\n4,1,2\n", "line 3: field 'TIMESTAMP'"),
    ],
)
def test_malformed_azure_line_names_line_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        read_azure(path)


# -- runs -------------------------------------------------------------------------------------------


def run(blocks: int, requests: list[TraceRequest] = WORKLOAD) -> Report:
    report = run_timed(requests, Options(16, blocks, seed=5, tokens_per_id=16))
    assert report.wrong is None
    assert report.requests == len(requests)
    books = report.pools["kv"]["device"]
    assert books["active"] == books["held"] == books["fenced"] == 0
    assert report.bytes_checked > 0
    return report


def test_with_room_for_all_everything_that_was_seen_is_reused() -> None:
    apart = [TraceRequest(r.line, i * 1e6, r.input_length, r.output_length, r.hash_ids) for i, r in enumerate(WORKLOAD)]
    report = run(20_000, apart)
    assert report.reused_blocks == report.bound_blocks
    assert (report.evicted, report.preempted, report.recomputed_tokens) == (0, 0, 0)
    assert report.prompt_tokens == sum(r.input_length for r in apart)


def test_steps_are_the_tokens_of_one_request() -> None:
    report = run(100, [TraceRequest(1, 0.0, 40, 7, (1, 2, 3))])
    assert report.steps == 7  # the context yields the first token
    assert report.simulated_s == pytest.approx(7 * STEP_MS / 1000)


def test_memory_running_out_frees_the_newest_and_everything_ends() -> None:
    long = [TraceRequest(i + 1, float(i), 30, 200, (2 * i, 2 * i + 1)) for i in range(12)]
    report = run(40, long)
    assert report.preempted > 0
    assert report.recomputed_tokens > 0
    assert report.evicted > 0


def test_runs_repeat() -> None:
    first, second = run(150), run(150)
    for report in (first, second):
        report.seconds = report.step_us_p50 = report.step_us_p99 = 0.0
    assert first.to_dict() == second.to_dict()


def test_request_longer_than_the_device_is_refused_and_counted() -> None:
    report = run(20, [TraceRequest(1, 0.0, 400, 1, tuple(range(25))), *WORKLOAD[:3]])
    assert report.too_long >= 1


def test_run_in_which_all_are_refused_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--limit", "3", "--device-blocks", "1"]) == 0
    out = capsys.readouterr().out
    assert "longer than the device, refused" in out
    assert "steps" in out


def test_wrong_byte_ends_the_run_and_names_the_place() -> None:
    report = run_timed(WORKLOAD, Options(16, 500, seed=5, tokens_per_id=16), corrupt_after=20)
    assert report.wrong is not None
    for word in ("request ", "block ", "pool 'kv'", "slot ", "expected 0x"):
        assert word in report.wrong


def test_stopping_keeps_what_was_counted() -> None:
    calls = iter(range(10**9))
    report = run_timed(WORKLOAD, Options(16, 500, tokens_per_id=16), should_stop=lambda: next(calls) >= 400)
    assert report.interrupted
    assert report.steps <= 400
    assert 0 < report.requests < len(WORKLOAD)


def test_plots_hold_the_samples() -> None:
    report = run(150)
    assert len(report.samples) > 100
    page = plots.html(report, "a title")
    for word in ("a title", "hit rate", "evicted", "pages of pool kv, device", "scheduler time per step", "suspended"):
        assert word in page


@pytest.mark.skipif(not TRACES.exists(), reason="no traces")
def test_whole_conversation_trace_finishes_with_every_byte_right() -> None:
    report = run_timed(read_mooncake(TRACES / "mooncake_conversation.jsonl"), Options())
    assert report.wrong is None
    assert report.requests == 12_031
    assert 0.20 < report.hit_rate_blocks <= report.hit_rate_bound < 0.37
    print(
        f"\n{report.steps:,} steps, {report.step_us_p50:.0f} / {report.step_us_p99:.0f} µs p50 / p99, "
        f"{report.step_us_sum / 1e6:.1f} s in all of {report.seconds:.1f} s; {report.bytes_checked:,} bytes checked"
    )


@pytest.mark.skipif(not TRACES.exists(), reason="no traces")
def test_azure_trace_under_pressure_finishes() -> None:
    report = run_timed(read_azure(TRACES / "azure_2023_conv.csv", 1500), Options(16, 600))
    assert report.wrong is None
    assert report.requests == 1500
    assert report.reused_tokens <= report.recomputed_tokens + report.prompt_tokens
    assert report.preempted > 0

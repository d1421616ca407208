"""`kvpool replay` in simulated time: contents, the model of time, Azure traces, runs with room and without, plots."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpool import ConfigError, KVCacheManager, Scheduler, StalledError
from kvpool.cli import main
from kvpool.replay import plots, timed
from kvpool.replay.content import Contents
from kvpool.replay.generated import Workload, generate
from kvpool.replay.model import StepModel, attention
from kvpool.replay.options import Options, make_manager
from kvpool.replay.report import Report
from kvpool.replay.timed import run_timed
from kvpool.replay.traces import TraceError, TraceRequest, read_azure, read_mooncake

TRACES = Path(__file__).parents[1] / ".." / "shared" / "traces"
WORKLOAD = generate(Workload(requests=150, answer_blocks=(0, 3)), 3, 16)
LONG = [TraceRequest(i + 1, float(i), 30, 200, (2 * i, 2 * i + 1)) for i in range(12)]


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
    every = len(content.ends)
    assert content.wrong(pages, table, every) == (None, every)
    other = tokens.copy()
    other[0] += 1  # every word behind it is another one
    assert contents.of(other).wrong(pages, table, every) == (0, every)
    assert Contents(block, 1, pool=1).of(tokens).wrong(pages, table, every) == (0, every)
    other = tokens.copy()
    other[-1] += 1
    last = content.count(len(tokens) - 1)
    assert contents.of(other).wrong(pages, table, last) == (None, last)
    pages[table[3], 0] ^= np.uint64(1 << 40)
    assert content.wrong(pages, table, every) == (3 * content.per_page, every)
    assert content.wrong(pages, table, every, stale=(2, 4)) == (None, every - 2 * content.per_page)
    pages[table[4], 0] ^= np.uint64(1)
    assert content.wrong(pages, table, every, stale=(2, 4))[0] == 4 * content.per_page


# -- the model of time --------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 5, 16])
def test_attention_counts_pairs_and_positions(window: int | None) -> None:
    for start in range(20):
        for tokens in range(1, 12):
            seen = [range(max(0, q + 1 - (window or 10**9)), q + 1) for q in range(start, start + tokens)]
            expected = sum(map(len, seen)), len(set().union(*seen))
            assert attention(start, tokens, window) == expected


def test_step_takes_what_arithmetic_or_memory_or_moves_take() -> None:
    model = StepModel(
        parameters=1e9, layers=10, query_heads=8, kv_heads=2, head_dim=50, weight_bytes=2, kv_value_bytes=1, gpus=2,
        flops_per_s=1e12, bytes_per_s=1e11, link_bytes_per_s=1e9,
    )  # fmt: skip
    assert model.kv_bytes_per_token == 2 * 10 * 2 * 50
    # One decode reads all weights, and the keys and values that it sees: memory decides.
    assert model.seconds(1, 1000, 1000) == pytest.approx((2e9 + 2000 * 1000) / 1e11 / 2)
    # A long chunk computes longer than it reads.
    flops = 2e9 * 4096 + 4 * 10 * 8 * 50 * 8e6
    assert model.seconds(4096, 8e6, 4096) == pytest.approx(flops / 1e12 / 2)
    # Moves come on top, the longer direction.
    moved = model.seconds(4096, 8e6, 4096, offloaded=512, onboarded=1024) - model.seconds(4096, 8e6, 4096)
    assert moved == pytest.approx(1024 * 2000 / 1e9 / 2)


def test_default_model_fits_the_default_blocks() -> None:
    model, options = StepModel(), Options()
    pages = options.device_blocks * options.tokens_per_block * model.kv_bytes_per_token
    assert pages == pytest.approx(839e9, rel=1e-3)
    assert pages + model.parameters * model.weight_bytes < model.gpus * 141e9


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
        (HEAD + "0,2147483648,2\n", "line 2: field 'ContextTokens': expected at most 2147483647"),
        (HEAD + f"0,1,{10**20}\n", "line 2: field 'GeneratedTokens': expected at most 2147483647"),
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


def run(blocks: int, requests: list[TraceRequest] = WORKLOAD, **options: Any) -> Report:
    report = run_timed(requests, Options(16, blocks, seed=5, tokens_per_id=16, **options))
    assert report.wrong is None
    assert report.requests == len(requests)
    for tiers in report.pools.values():
        for books in tiers.values():
            assert books["active"] == books["held"] == books["fenced"] == 0
    assert report.bytes_checked > 0
    assert report.output_tokens == sum(max(1, r.output_length) for r in requests) or report.refused
    return report


def test_with_room_for_all_everything_that_was_seen_is_reused() -> None:
    apart = [TraceRequest(r.line, i * 1e6, r.input_length, r.output_length, r.hash_ids) for i, r in enumerate(WORKLOAD)]
    report = run(20_000, apart)
    assert report.reused_blocks == report.bound_blocks
    assert (report.evicted, report.suspended, report.recomputed, report.recomputed_tokens) == (0, 0, 0, 0)
    assert report.prompt_tokens == sum(r.input_length for r in apart)


def test_times_of_one_request_follow_the_model() -> None:
    report = run(100, [TraceRequest(1, 5000.0, 40, 7, (1, 2, 3))])
    assert report.steps == 7  # the context yields the first token
    model, times = StepModel(), report.times
    assert times is not None
    context = model.seconds(40, 40 * 41 / 2, 40)
    decodes = [model.seconds(1, n, n) for n in range(41, 47)]
    assert times.arrivals == times.queue == [0.0]
    assert times.first_token == pytest.approx([context])
    assert times.per_token == pytest.approx([sum(decodes) / 6])
    assert times.simulated_s == pytest.approx(context + sum(decodes))
    assert report.throughput() == pytest.approx((47 / times.simulated_s, 7 / times.simulated_s))
    result = report.to_dict()
    assert result["ttft_s_p50"] == result["ttft_s_p99"] == pytest.approx(context)
    assert result["tpot_s_p50"] == pytest.approx(sum(decodes) / 6)
    assert result["queue_s_p99"] == 0.0


def test_times_with_a_window_follow_the_model() -> None:
    report = run(100, [TraceRequest(1, 0.0, 40, 7, ())], window=40)
    model = StepModel()
    # Both pools have half of the layers; from 41 tokens on the window leaves one out, then two, ...
    decodes = [model.seconds(1, (n + 40) / 2, (n + 40) / 2) for n in range(41, 47)]
    assert report.times is not None
    assert report.times.simulated_s == pytest.approx(model.seconds(40, 40 * 41 / 2, 40) + sum(decodes))


def test_moves_take_time() -> None:
    at_once = [TraceRequest(r.line, 0.0, r.input_length, r.output_length, ()) for r in LONG]
    options = Options(16, 40, tokens_per_id=16, host_blocks=200)
    seconds, reports = [], []
    for link in (1e6, 1e30):
        reports.append(run_timed(at_once, options, model=StepModel(link_bytes_per_s=link)))
        times = reports[-1].times
        assert times is not None
        seconds.append(times.simulated_s)
    # All are there from the beginning, so time changes nothing but itself.
    assert reports[0].offloaded == reports[1].offloaded > 0
    page = 16 * StepModel().kv_bytes_per_token / 1e6 / 8
    moved = (seconds[0] - seconds[1]) / page
    assert max(reports[0].offloaded, reports[0].onboarded) <= moved <= reports[0].offloaded + reports[0].onboarded


def test_long_prompts_are_computed_in_chunks() -> None:
    one = [TraceRequest(1, 0.0, 100, 1, ())]
    assert run(100, one, max_num_tokens=32, chunk_tokens=10).steps == 4  # 30, 30, 30, 10
    assert run(100, one, max_num_tokens=32, chunk_tokens=32).steps == 4  # 32, 32, 32, 4
    assert run(100, one).steps == 1


def test_second_request_waits_for_the_place_of_the_first() -> None:
    pair = [TraceRequest(1, 0.0, 40, 5, (1, 2, 3)), TraceRequest(2, 0.0, 40, 5, (4, 5, 6))]
    together, apart = run(100, pair), run(100, pair, max_batch_size=1)
    assert (together.steps, apart.steps) == (5, 10)
    assert together.times is not None
    assert apart.times is not None
    assert together.times.queue == [0.0, 0.0]
    assert apart.times.queue[1] == pytest.approx(apart.times.simulated_s / 2)


def test_memory_running_out_suspends_the_newest_and_everything_ends() -> None:
    report = run(40, LONG, host_blocks=200)
    assert report.suspended > 0
    assert report.offloaded > 0
    assert report.onboarded > 0
    assert (report.recomputed, report.recomputed_tokens) == (0, 0)
    # What ended was verified whole once, and what came back once more.
    whole = 8 * Contents(16, 0).of(np.zeros(229, np.int32)).count(229)
    assert report.bytes_checked > 12 * whole
    assert run(200, LONG).bytes_checked == 12 * whole


def test_memory_running_out_on_both_tiers_frees_the_newest_and_everything_ends() -> None:
    report = run(40, LONG, host_blocks=1)
    assert report.recomputed > 0
    assert report.recomputed_tokens > 0
    assert report.evicted > 0
    assert report.prompt_tokens == 12 * 30  # counted once, however often they started


def test_without_a_tier_requests_start_only_if_they_fit_to_their_end() -> None:
    report = run(40, LONG)
    assert (report.suspended, report.recomputed, report.offloaded) == (0, 0, 0)
    assert report.to_dict()["queue_s_p99"] > 0


@pytest.mark.parametrize("host", [0, 100])
def test_windowed_pool_has_books_of_its_own(host: int) -> None:
    report = run(150, window=40, host_blocks=host)
    assert list(report.pools) == ["kv", "window"]
    assert all(("host" in tiers) == bool(host) for tiers in report.pools.values())
    assert report.reused_blocks > 0
    full = run(150, host_blocks=host)
    assert report.bytes_checked > full.bytes_checked
    assert report.times is not None
    assert full.times is not None
    assert report.times.simulated_s < full.times.simulated_s  # half of the layers attend to less


@pytest.mark.parametrize("options", [{}, {"host_blocks": 60}, {"window": 40}])
def test_runs_repeat(options: dict[str, Any]) -> None:
    first, second = run(150, **options), run(150, **options)
    for report in (first, second):
        report.step_us_p50 = report.step_us_p99 = 0.0
    assert first.to_dict() == second.to_dict()


def test_request_longer_than_the_device_is_refused_with_the_numbers_and_counted() -> None:
    report = run(20, [TraceRequest(1, 0.0, 400, 1, tuple(range(25))), *WORKLOAD[:3]])
    assert report.refused >= 1
    assert report.refusal == (
        "request 1 needs 25 slots of pool 'kv' at its peak, there are 20; shorten it, use chunk_tokens, or raise "
        "device_bytes (line 1)"
    )
    assert report.to_dict()["refused"] == report.refused


def test_request_of_any_length_is_refused_before_its_tokens_are_made() -> None:
    longest = 2**31 - 1  # its tokens would take 32 GB
    report = run(20, [TraceRequest(1, 0.0, longest, longest, ()), *WORKLOAD[:3]])
    assert report.refused >= 1
    assert report.refusal.startswith(f"request 1 needs {-(-(2 * longest - 1) // 16)} slots of pool 'kv' at its peak")


def test_run_in_which_all_are_refused_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--limit", "3", "--device-blocks", "1"]) == 0
    out, err = capsys.readouterr()
    assert "refused: longer than the device" in out
    assert "steps" in out
    assert "refused 3, the first: request 1 needs " in err


def test_wrong_byte_ends_the_run_and_names_the_place() -> None:
    report = run_timed(WORKLOAD, Options(16, 500, seed=5, tokens_per_id=16), corrupt_after=20)
    assert report.wrong is not None
    for word in ("request ", "block ", "pool 'kv'", "slot ", "expected 0x"):
        assert word in report.wrong


def run_and_flip(monkeypatch: pytest.MonkeyPatch, requests: list[TraceRequest], flip: Any, **options: Any) -> Report:
    """A run in which `flip(manager)` is called before every step."""
    made: list[KVCacheManager] = []

    def make(*args: Any) -> KVCacheManager:
        made.append(make_manager(*args))
        return made[0]

    monkeypatch.setattr(timed, "make_manager", make)
    return run_timed(requests, Options(16, 40, tokens_per_id=16, **options), should_stop=lambda: flip(made[0]))


def test_wrong_byte_on_the_host_is_found_after_the_move(monkeypatch: pytest.MonkeyPatch) -> None:
    flipped = False

    def flip(manager: KVCacheManager) -> bool:
        nonlocal flipped
        if not flipped and manager.stats().pools["kv"]["host"]["held"]:
            manager.pages("kv", "host").view(np.uint64)[:] ^= np.uint64(1)
            flipped = True
        return False

    report = run_and_flip(monkeypatch, LONG, flip, host_blocks=200)
    assert flipped
    assert report.wrong is not None


@pytest.mark.parametrize("pool", ["kv", "window"])
def test_wrong_byte_of_a_page_that_nobody_reuses_is_found_at_the_end(
    monkeypatch: pytest.MonkeyPatch, pool: str
) -> None:
    steps = iter(range(10**9))

    def flip(manager: KVCacheManager) -> bool:
        if next(steps) == 180:  # of 200
            manager.pages(pool)[1:].view(np.uint64)[:] ^= np.uint64(1)
        return False

    report = run_and_flip(monkeypatch, LONG[:1], flip, window=40)
    assert report.wrong is not None
    assert report.wrong.startswith(f"request 1 (line 1), block {0 if pool == 'kv' else 11}, pool '{pool}', slot ")
    assert report.steps == 200


def test_what_the_scheduler_cannot_solve_is_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    def stall(self: Scheduler) -> None:
        raise StalledError("planted")

    monkeypatch.setattr(Scheduler, "schedule", stall)
    with pytest.raises(StalledError, match="planted"):
        run(100)


def test_error_in_the_executor_is_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: StepModel, *args: float) -> float:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(StepModel, "seconds", fail)
    with pytest.raises(ZeroDivisionError, match="planted"):
        run(100)


def test_limits_that_allow_no_chunk_are_an_error() -> None:
    with pytest.raises(ConfigError, match="chunk_tokens"):
        run(100, max_num_tokens=8, chunk_tokens=9)


def test_stopping_keeps_what_was_counted() -> None:
    calls = iter(range(10**9))
    report = run_timed(WORKLOAD, Options(16, 500, tokens_per_id=16), should_stop=lambda: next(calls) >= 400)
    assert report.interrupted
    assert report.steps <= 400
    assert 0 < report.requests < len(WORKLOAD)


def test_plots_hold_the_samples() -> None:
    report = run(150, host_blocks=50, window=40)
    assert len(report.samples) > 100
    page = plots.html(report, "a title")
    for word in (
        "a title", "hit rate", "evicted", "onboarded", "pages of pool kv, device", "pages of pool window, host",
        "scheduler time per step", "suspended", "time to first token",
    ):  # fmt: skip
        assert word in page


def test_samples_are_spread_over_the_run() -> None:
    late = [*WORKLOAD, TraceRequest(151, WORKLOAD[-1].timestamp_ms + 1000, 20_000, 12_000, ())]
    report = run(20_000, late)
    at = [sample.seconds for sample in report.samples]
    assert at == sorted(at)
    assert 250 <= len(at) <= 2 * timed.SAMPLES + 1
    assert report.times is not None
    assert at[-1] > 0.98 * report.times.simulated_s


# -- traces -----------------------------------------------------------------------------------------

whole_traces = pytest.mark.skipif(
    not TRACES.exists() or "KVPOOL_WHOLE_TRACES" not in os.environ,
    reason="minutes: KVPOOL_WHOLE_TRACES=1 pytest -m slow tests/test_timed.py",
)


def replay_trace(name: str, limit: int | None, **options: Any) -> Report:
    read = read_azure if name.endswith(".csv") else read_mooncake
    requests = read(TRACES / name, limit)
    report = run_timed(requests, Options(**options))
    assert report.wrong is None
    assert report.requests == len(requests)
    assert report.output_tokens == sum(max(1, request.output_length) for request in requests)
    for tiers in report.pools.values():
        for books in tiers.values():
            assert books["free"] + books["cached"] == books["slots"]
    print(
        f"\n{name}, {options}: {report.steps:,} steps, {report.step_us_p50:.0f} / {report.step_us_p99:.0f} µs, "
        f"{report.step_us_sum / 1e6:.1f} s in all of {report.seconds:.1f} s; hit rate {report.hit_rate_blocks:.2%} of "
        f"{report.hit_rate_bound:.2%}; {report.suspended:,} suspended, {report.recomputed:,} recomputed; "
        f"{report.bytes_checked:,} bytes checked"
    )
    return report


@pytest.mark.skipif(not TRACES.exists(), reason="no traces")
@pytest.mark.parametrize(("limit", "host"), [(2000, 0), (1000, 1000)])
def test_conversation_trace_begins_with_every_byte_right(limit: int, host: int) -> None:
    report = replay_trace("mooncake_conversation.jsonl", limit, device_blocks=1500, host_blocks=host)
    assert 0 < report.hit_rate_blocks <= report.hit_rate_bound < 0.37
    assert report.evicted > 0
    assert (report.onboarded > 0) == bool(host)


@pytest.mark.skipif(not TRACES.exists(), reason="no traces")
def test_azure_trace_under_pressure_finishes() -> None:
    report = replay_trace(
        "azure_2023_conv.csv", 500, tokens_per_block=16, device_blocks=600, host_blocks=300, tokens_per_id=16
    )
    assert report.suspended > 0
    assert report.reused_tokens <= report.recomputed_tokens + report.prompt_tokens


@whole_traces
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("host", [0, 10_000])
def test_whole_conversation_trace_finishes_with_every_byte_right(host: int) -> None:
    report = replay_trace("mooncake_conversation.jsonl", None, host_blocks=host)
    assert report.requests == 12_031
    assert 0.20 < report.hit_rate_blocks <= report.hit_rate_bound < 0.37


@whole_traces
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("host", [0, 10_000])
def test_whole_azure_trace_finishes_with_every_byte_right(host: int) -> None:
    assert replay_trace("azure_2023_conv.csv", None, host_blocks=host).requests == 19_366

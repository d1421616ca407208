"""The `kvpool` command: exit codes, what goes to which stream, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import kvpool
from kvpool.cli import main

KEYS = [
    "requests",
    "prompt_tokens",
    "reused_tokens",
    "prompt_blocks",
    "reused_blocks",
    "hit_rate_tokens",
    "hit_rate_blocks",
    "hit_rate_bound",
    "evicted",
    "dropped",
    "offloaded",
    "onboarded",
    "suspended",
    "recomputed_tokens",
    "steps",
    "step_us_p50",
    "step_us_p99",
    "bytes_checked",
    "pools",
]
TIMED_KEYS = [
    "recomputed",
    "refused",
    "output_tokens",
    "simulated_s",
    "tokens_per_s",
    "output_tokens_per_s",
    "ttft_s_p50",
    "ttft_s_p99",
    "tpot_s_p50",
    "tpot_s_p99",
    "queue_s_p50",
    "queue_s_p99",
]
ALL_KEYS = KEYS + TIMED_KEYS
SMALL = ["--tokens-per-block", "4", "--sequential"]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "t.jsonl"
    rows = ([1, 2], [1, 2, 3], [1, 2, 3, 4], [5])
    path.write_text(
        "".join(
            json.dumps({"timestamp": n, "input_length": 8, "output_length": 1, "hash_ids": ids}) + "\n"
            for n, ids in enumerate(rows)
        )
    )
    return path


def child(*argv: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=120, check=False, **kwargs)


def test_table_goes_to_stdout(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(trace), *SMALL]) == 0
    out, err = capsys.readouterr()
    assert "50.00%" in out  # 5 of 10 blocks
    assert err == ""


def test_json_has_every_key(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.json"
    assert main(["replay", str(trace), *SMALL, "--device-blocks", "7", "--json", str(target)]) == 0
    assert "hit rate" in capsys.readouterr().out
    result = json.loads(target.read_text())
    assert list(result) == ALL_KEYS
    assert result["requests"] == 4
    assert (result["prompt_blocks"], result["reused_blocks"]) == (10, 5)
    assert (result["prompt_tokens"], result["reused_tokens"]) == (40, 20)
    assert result["hit_rate_blocks"] == result["hit_rate_tokens"] == result["hit_rate_bound"] == 0.5
    for later in ("offloaded", "onboarded", "suspended", "recomputed_tokens", "steps"):
        assert result[later] == 0
    assert result["step_us_p50"] is None
    assert result["step_us_p99"] is None
    assert [result[key] for key in TIMED_KEYS[:3]] == [0, 0, 0]
    assert all(result[key] is None for key in TIMED_KEYS[3:])
    device = result["pools"]["kv"]["device"]
    assert set(device) == {"slots", "free", "active", "held", "cached", "fenced", "peak"}
    assert device["slots"] == 7
    assert "host" not in result["pools"]["kv"]


def test_json_to_stdout_is_alone_there(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(trace), *SMALL, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert list(json.loads(out)) == ALL_KEYS
    assert "hit rate" in err


def test_generated_workload_needs_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["replay", "--sequential", "--limit", "50", "--seed", "7", "--json", "-"]
    assert main(argv) == 0
    first = capsys.readouterr().out
    assert main(argv) == 0
    assert capsys.readouterr().out == first
    assert json.loads(first)["requests"] == 50


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sequential", "--format", "azure"], "TRACE"),
        (["--sequential", "--format", "mooncake"], "TRACE"),
        (["TRACE", "--sequential", "--format", "azure"], "no prefixes"),
        (["TRACE", "--format", "azure"], "expected the columns"),
        (["TRACE", "--html", "TRACE"], "overwrite"),
        (["TRACE", "--html", "-"], "--html: - is no file"),
        (["TRACE", "--html", "/nowhere/at/all.html"], "cannot write"),
        (
            ["TRACE", "--json", "/nowhere/at/all", "--html", "/nowhere/at/../at/all"],
            "--json and --html name the same file",
        ),
        (["TRACE", "--sequential", "--format", "generated"], "takes no TRACE"),
        (["TRACE", "--sequential", "--html", "x.html"], "no time to plot"),
        (["TRACE", "--sequential", "--window", "8"], "--window: --sequential"),
        (["TRACE", "--sequential", "--max-batch-size", "8"], "--max-batch-size: --sequential"),
        (["TRACE", "--chunk-tokens", "9", "--max-num-tokens", "8"], "chunk_tokens: 9 is above max_num_tokens = 8"),
        (["TRACE", "--window", "0"], "--window"),
        (["TRACE", "--sequential", "--json", "TRACE"], "overwrite"),
        (["TRACE", "--sequential", "--json", "/nowhere/at/all.json"], "cannot write"),
        (["TRACE", "--sequential", "--policy", "mru"], "--policy"),
        (["TRACE", "--sequential", "--device-blocks", "0"], "--device-blocks"),
        (["TRACE", "--sequential", "--device-blocks", "1e3"], "--device-blocks"),
        (["TRACE", "--sequential", "--device-blocks", "2147483646"], "not enough memory"),
        (["TRACE", "--sequential", "--tokens-per-block", "-1"], "--tokens-per-block"),
        (["TRACE", "--sequential", "--limit", "0"], "--limit"),
        (["TRACE", "--sequential", "--wat"], "--wat"),
        (["no-such-file.jsonl", "--sequential"], "no-such-file.jsonl"),
    ],
)
def test_bad_option_exits_2(trace: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = trace.read_bytes()
    assert main(["replay", *(str(trace) if arg == "TRACE" else arg for arg in argv)]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""
    assert trace.read_bytes() == before


def test_json_and_html_into_one_file_are_refused(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second one written would replace the first; whatever the path, and whether the file is there or not."""
    there, link = trace.with_name("there"), trace.with_name("link")
    there.write_text("kept")
    link.hardlink_to(there)
    new, roundabout = trace.with_name("new"), trace.parent / "x" / ".." / "new"
    trace.with_name("x").mkdir()
    for json_path, html_path in ((new, new), (new, roundabout), (there, there), (there, link)):
        assert main(["replay", str(trace), "--json", str(json_path), "--html", str(html_path)]) == 2
        out, err = capsys.readouterr()
        assert f"--json and --html name the same file, {html_path}" in err
        assert out == ""
    assert there.read_text() == "kept"
    assert not new.exists()


def test_unknown_suffix_needs_format(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = trace.rename(trace.with_suffix(".txt"))
    assert main(["replay", str(other), *SMALL]) == 2
    assert "--format" in capsys.readouterr().err
    assert main(["replay", str(other), *SMALL, "--format", "mooncake"]) == 0


def test_csv_means_azure(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = trace.rename(trace.with_suffix(".csv"))
    assert main(["replay", str(other), *SMALL]) == 2
    assert "no prefixes" in capsys.readouterr().err
    other.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,8,2\n1,8,2\n")
    assert main(["replay", str(other), "--tokens-per-block", "4", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["requests"], result["reused_tokens"], result["steps"]) == (2, 0, 4)


def test_timed_is_the_default_and_draws(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    argv = ["replay", str(trace), "--tokens-per-block", "4", "--json", "-", "--html", str(page)]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert list(result) == ALL_KEYS
    assert result["requests"] == 4
    assert result["steps"] > 0
    assert result["step_us_p50"] > 0
    assert all(result[key] is not None for key in ALL_KEYS if key not in ("tpot_s_p50", "tpot_s_p99"))
    assert result["tpot_s_p50"] is None  # every answer has one token
    assert 0 <= result["queue_s_p50"] < result["ttft_s_p50"] <= result["ttft_s_p99"]
    assert "it is no measurement" in err.replace("\n", " ")
    assert "time to first token" in err
    assert "hit rate" in page.read_text()


def test_limits_and_window_reach_the_scheduler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "0,20,5\n" * 6)
    argv = ["replay", str(path), "--tokens-per-block", "4", "--json", "-"]

    def result(*more: str) -> Any:
        assert main([*argv, *more]) == 0
        return json.loads(capsys.readouterr().out)

    assert result()["steps"] == 5
    assert result("--max-batch-size", "1")["steps"] == 30
    # A unit of 30, so one whole prompt per step; with units of 5 a step takes parts of two.
    assert result("--max-num-tokens", "30")["steps"] == 10
    assert result("--max-num-tokens", "30", "--chunk-tokens", "5")["steps"] == 9
    assert list(result("--window", "16")["pools"]) == ["kv", "window"]


def test_wrong_byte_in_time_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["replay", "--limit", "40", "--tokens-per-block", "4", "--json", "-"]
    assert main(argv, corrupt_after=10) == 1
    assert "wrong byte: request " in capsys.readouterr().err


def test_malformed_line_exits_2(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with trace.open("a") as file:
        file.write('{"timestamp": 1, "input_length": -4, "output_length": 1, "hash_ids": [1]}\n')
    assert main(["replay", str(trace), *SMALL, "--json", "-"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "line 5: field 'input_length'" in err


def test_wrong_byte_exits_1(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(trace), *SMALL, "--json", "-"], corrupt_after=2) == 1
    out, err = capsys.readouterr()
    assert "wrong byte: request 3 (line 3), block 0, pool 'kv', slot " in err
    assert json.loads(out)["requests"] == 3


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"kvpool, version {kvpool.__version__}")
    assert main(["replay", "--help"]) == 0
    out = capsys.readouterr().out
    for option in (
        "--format", "--tokens-per-block", "--device-blocks", "--host-blocks", "--policy", "--window",
        "--max-batch-size", "--max-num-tokens", "--chunk-tokens",
    ):  # fmt: skip
        assert option in out
    assert main(["frobnicate"]) == 2


def test_module_runs() -> None:
    done = child("-m", "kvpool", "replay", "--sequential", "--limit", "5", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)) == ALL_KEYS


def test_import_needs_no_extra() -> None:
    done = child("-c", "import kvpool, kvpool.cli, sys; print({'click', 'rich'} & set(sys.modules))")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("missing", ["click", "rich", "plotly"])
def test_missing_extra_says_what_to_install(missing: str) -> None:
    code = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
from kvpool.cli import main
sys.exit(main(['replay', '--html', 'plots.html']))
"""
    done = child("-c", code)
    assert done.returncode == 2
    assert "pip install kvpool[cli]" in done.stderr
    assert "Traceback" not in done.stderr


def test_closed_stdout_is_not_a_traceback(trace: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "kvpool", "replay", str(trace), *SMALL, "--json", "-"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert "Exception ignored" not in err


def test_interrupt_prints_the_summary_so_far(trace: Path) -> None:
    code = """
import os, signal, sys
import kvpool.replay.sequential as sequential
from kvpool.cli import main
serve = sequential._Sequential.serve
def serve_then_interrupt(self, request):
    serve(self, request)
    if self._report.requests == 2:
        os.kill(os.getpid(), signal.SIGINT)
sequential._Sequential.serve = serve_then_interrupt
sys.exit(main(sys.argv[1:]))
"""
    done = child("-c", code, "replay", str(trace), *SMALL, "--json", "-")
    assert done.returncode == 130, done.stderr
    assert json.loads(done.stdout)["requests"] == 2
    assert "interrupted after 2 of 4 requests" in done.stderr
    assert "hit rate" in done.stderr


def test_interrupt_in_simulated_time_prints_the_report_so_far() -> None:
    code = """
import os, signal, sys
import kvpool.replay.timed as timed
from kvpool.cli import main
step = timed._Timed.step
def step_then_interrupt(self):
    step(self)
    if self.report.steps == 100:
        os.kill(os.getpid(), signal.SIGINT)
timed._Timed.step = step_then_interrupt
sys.exit(main(sys.argv[1:]))
"""
    done = child("-c", code, "replay", "--limit", "100", "--json", "-")
    assert done.returncode == 130, done.stderr
    result = json.loads(done.stdout)
    assert list(result) == ALL_KEYS
    assert result["steps"] == 100
    assert result["pools"]["kv"]["device"]["active"] > 0
    assert "interrupted after " in done.stderr
    assert "time to first token" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_interrupt_from_the_terminal_under_the_progress_bar(tmp_path: Path) -> None:
    trace = tmp_path / "long.jsonl"
    with trace.open("w") as file:
        for n in range(40_000):
            ids = list(range(n * 20, n * 20 + 20))
            record = {"timestamp": n, "input_length": 10_240, "output_length": 1, "hash_ids": ids}
            file.write(json.dumps(record) + "\n")
    terminal, end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "kvpool", "replay", str(trace), "--sequential", "--json", "-"],
        stdout=subprocess.PIPE,
        stderr=end,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(end)
    shown = b""
    deadline = time.monotonic() + 60
    while b"/40000" not in shown and time.monotonic() < deadline:
        shown += os.read(terminal, 4096)
    process.send_signal(signal.SIGINT)
    try:
        while chunk := os.read(terminal, 4096):
            shown += chunk
    except OSError:  # Linux: the other end is closed
        pass
    out, _ = process.communicate(timeout=60)
    os.close(terminal)
    assert process.returncode == 130, shown
    assert json.loads(out)["requests"] < 40_000
    assert b"interrupted after" in shown

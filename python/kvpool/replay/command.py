"""The command line: `kvpool replay`, `kvpool doctor` and `kvpool --version`. Needs click and rich."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvpool import ConfigError, __version__
from kvpool.doctor import doctor
from kvpool.replay import plots
from kvpool.replay.content import Contents
from kvpool.replay.generated import Workload, generate
from kvpool.replay.report import Report, tables
from kvpool.replay.sequential import PAGE_BYTES, Options, run_sequential
from kvpool.replay.timed import run_timed
from kvpool.replay.traces import TraceError, TraceRequest, read_azure, read_mooncake

TOKENS_PER_ID = 512  # of Mooncake's hash ids
MAX_BLOCKS = 2**31 - 2  # slots are int32, and slot 0 is the null page


def run(argv: list[str], *, corrupt_after: int | None = None) -> int:
    """Run the command line and return the exit code (see `kvpool.cli.main`)."""
    try:
        code = group.main(args=argv, prog_name="kvpool", standalone_mode=False, obj=corrupt_after)
        sys.stdout.flush()
        return int(code or 0)
    except click.ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return 130
    except OSError as error:
        if error.errno != errno.EPIPE:
            raise
        # The reader of stdout left. Python's own flush at exit must not fail on it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvpool")
def group() -> None:
    """KV-cache block manager for LLM inference engines."""


group.add_command(doctor)


@group.command()
@click.argument("trace", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--format",
    "trace_format",
    type=click.Choice(["mooncake", "azure", "generated"]),
    help="What TRACE is. Default: by its suffix (.jsonl mooncake, .csv azure); without TRACE generated.",
)
@click.option(
    "--tokens-per-block",
    type=click.IntRange(min=1, max=2**20),
    default=512,
    show_default=True,
    help="Tokens per block. Mooncake's ids stand for 512.",
)
@click.option(
    "--device-blocks",
    type=click.IntRange(min=1, max=MAX_BLOCKS),
    default=10_000,
    show_default=True,
    help="Slots on the device, exactly.",
)
@click.option(
    "--host-blocks",
    type=click.IntRange(min=0, max=MAX_BLOCKS),
    default=0,
    show_default=True,
    help="Slots in host memory, where evicted pages go; 0: no host tier.",
)
@click.option(
    "--policy",
    type=click.Choice(["lru", "slru"]),
    default="lru",
    show_default=True,
    help="Who goes first: least recently used, or segmented LRU by request.",
)
@click.option(
    "--sequential",
    is_flag=True,
    help="One request after the other, timestamps and outputs ignored, every hash id a full block.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N requests.", metavar="N")
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**63 - 1),
    default=0,
    show_default=True,
    help="Seed of the page pattern and of the generated workload.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, allow_dash=True),
    metavar="PATH|-",
    help="Write the result as JSON. '-': stdout, which then carries nothing else.",
)
@click.option(
    "--html", "html_path", type=click.Path(dir_okay=False), metavar="PATH", help="Write plots over simulated time."
)
@click.pass_obj
def replay(
    corrupt_after: int | None,
    trace: Path | None,
    trace_format: str | None,
    tokens_per_block: int,
    device_blocks: int,
    host_blocks: int,
    policy: Literal["lru", "slru"],
    sequential: bool,
    limit: int | None,
    seed: int,
    json_path: str | None,
    html_path: str | None,
) -> int:
    """Run a request trace through the cache manager and verify every reused page.

    Requests arrive at their timestamps in simulated time, several are active at once, and their answers are
    generated token by token; with --sequential they come one after the other. A simulated engine writes a
    recognisable pattern into every page that it computes, and each page is compared with it, byte for byte,
    whenever it is reused and after it came back from the host. The result is a table of hit rates, evictions
    and slots. Without TRACE a workload of conversations is generated from the seed (3,000 requests, or as
    many as --limit says).

    \b
    Exit codes: 0 done; 1 a wrong byte was read; 2 bad input or option;
    130 Ctrl-C (the summary so far is printed).

    \b
    Examples:
      kvpool replay
      kvpool replay trace.jsonl --device-blocks 4000 --host-blocks 20000 --html plots.html
      kvpool replay trace.jsonl --sequential --json -
    """
    trace_format = _format(trace, trace_format)
    if html_path is not None and sequential:
        raise click.UsageError("--html: --sequential has no time to plot over; leave one of them out")
    if sequential and trace_format == "azure":
        raise click.UsageError("--sequential: an azure trace has no prefixes to match; leave it out")
    tokens_per_id = TOKENS_PER_ID if trace_format == "mooncake" else tokens_per_block
    options = Options(tokens_per_block, device_blocks, policy, seed, tokens_per_id, host_blocks)
    requests = _requests(trace, trace_format, limit, options)
    for name, path in (("--json", json_path), ("--html", html_path)):
        _check_writable(name, path, trace)
    page_bytes = PAGE_BYTES if sequential else Contents(tokens_per_block, seed).page_bytes
    _check_memory(options, page_bytes)
    run = run_sequential if sequential else run_timed
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    with _interrupts() as stopped, progress:
        task = progress.add_task("replay", total=len(requests), rate="")

        def advance(report: Report) -> None:
            if report.requests % 16 == 0 or report.requests == len(requests):
                rate = f"{report.hit_rate_blocks:.2%} hits"
                progress.update(task, completed=report.requests, rate=rate)

        try:
            report = run(requests, options, should_stop=stopped, advance=advance, corrupt_after=corrupt_after)
        except ConfigError as error:
            raise click.UsageError(str(error)) from None
        except MemoryError:
            raise _too_big(options, page_bytes) from None
    source = "generated workload" if trace is None else trace.name
    title = f"{source}: {policy}, {device_blocks:,} blocks of {tokens_per_block} tokens"
    _print_result(report, title, json_path)
    if html_path is not None:
        _write("--html", html_path, plots.html(report, title))
    if report.wrong is not None:
        click.echo(f"wrong byte: {report.wrong}", err=True)
        return 1
    if report.interrupted:
        click.echo(f"interrupted after {report.requests:,} of {len(requests):,} requests", err=True)
        return 130
    return 0


def _format(trace: Path | None, given: str | None) -> str:
    """The trace's format: as given, else by its suffix."""
    if trace is None:
        if given not in (None, "generated"):
            raise click.UsageError(f"--format {given} needs a TRACE")
        return "generated"
    if given == "generated":
        raise click.UsageError("--format generated takes no TRACE")
    found = given or {".jsonl": "mooncake", ".csv": "azure"}.get(trace.suffix.lower())
    if found is None:
        raise click.UsageError(f"cannot tell the format of {trace.name} from its suffix; give --format")
    return found


def _requests(trace: Path | None, trace_format: str, limit: int | None, options: Options) -> list[TraceRequest]:
    if trace is None:
        workload = Workload() if limit is None else Workload(requests=limit)
        return generate(workload, options.seed, options.tokens_per_block)
    try:
        return read_mooncake(trace, limit) if trace_format == "mooncake" else read_azure(trace, limit)
    except TraceError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"cannot read {trace}: {error.strerror}") from None


def _check_writable(name: str, path: str | None, trace: Path | None) -> None:
    """Before the run, not after it: the file can be written, and is not the trace itself."""
    if path is None or path == "-":
        return
    if trace is not None and os.path.exists(path) and os.path.samefile(path, trace):
        raise click.UsageError(f"{name} would overwrite TRACE")
    try:
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise click.UsageError(f"{name}: cannot write {path}: {error.strerror}") from None


def _write(name: str, path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"{name}: cannot write {path}: {error.strerror}") from None


def _check_memory(options: Options, page_bytes: int) -> None:
    """Refuse what cannot fit this machine at all, before anything tries to allocate it."""
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return  # a platform that does not tell
    if _bytes_needed(options, page_bytes) > physical:
        raise _too_big(options, page_bytes)


def _bytes_needed(options: Options, page_bytes: int) -> int:
    """Bytes of pages and of the tree's tokens; the tree's nodes come on top."""
    return (options.device_blocks + options.host_blocks) * (page_bytes + 4 * options.tokens_per_block)


def _too_big(options: Options, page_bytes: int) -> click.UsageError:
    return click.UsageError(
        f"not enough memory: --device-blocks {options.device_blocks} and --host-blocks "
        f"{options.host_blocks} of {options.tokens_per_block} tokens need "
        f"{_bytes_needed(options, page_bytes):,} bytes"
    )


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """While inside, the first Ctrl-C only makes the given function True; a second one interrupts as usual."""
    stopped = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before: Any = signal.signal(signal.SIGINT, stop)
    except ValueError:  # not the main thread: signals are somebody else's
        yield lambda: False
        return
    try:
        yield lambda: stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _print_result(report: Report, title: str, json_path: str | None) -> None:
    to_stdout = json_path == "-"
    console = Console(stderr=to_stdout)
    console.print(title, highlight=False, soft_wrap=True)
    for table in tables(report):
        console.print(table)
    if to_stdout:
        click.echo(report.to_json(), nl=False)
    elif json_path is not None:
        _write("--json", json_path, report.to_json())

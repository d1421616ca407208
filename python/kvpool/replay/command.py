"""The command line: `kvpool replay`, `kvpool doctor` and `kvpool --version`. Needs click and rich."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvpool import ConfigError, __version__
from kvpool.doctor import doctor
from kvpool.replay import plots
from kvpool.replay.content import Contents
from kvpool.replay.generated import Workload, generate
from kvpool.replay.guards import check_different, check_memory, check_writable, interrupts, too_big, write
from kvpool.replay.options import Options
from kvpool.replay.report import Report, tables
from kvpool.replay.sequential import PAGE_BYTES, run_sequential
from kvpool.replay.timed import run_timed
from kvpool.replay.traces import TraceError, TraceRequest, read_azure, read_mooncake

TOKENS_PER_ID = 512  # of Mooncake's hash ids
MAX_BLOCKS = 2**31 - 2  # slots are int32, and slot 0 is the null page


def run(argv: list[str], *, corrupt_after: int | None = None) -> int:
    """Run the command line and return the exit code (see `kvpool.cli.main`)."""
    try:
        code = group.main(args=argv, prog_name="kvpool", standalone_mode=False, obj=corrupt_after)
        if sys.stdout is not None:
            sys.stdout.flush()
        return int(code or 0)
    except click.ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return 130
    except SystemExit:  # click's own answer to a reader of stdout that has left
        _leave_stdout()
        return 2
    except OSError as error:
        if error.errno != errno.EPIPE:
            print(f"kvpool: cannot write: {error.strerror}", file=sys.stderr)
        _leave_stdout()
        return 2


def _leave_stdout() -> None:
    """Nobody reads it any more: Python's own flush at exit must not fail on it once more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    "--window",
    type=click.IntRange(min=1, max=2**31 - 1),
    metavar="TOKENS",
    help="A second pool of layers with a sliding window, with as many slots.",
)
@click.option(
    "--max-batch-size",
    type=click.IntRange(min=1, max=2**20),
    default=256,
    show_default=True,
    help="Requests in a step, and started at once.",
)
@click.option(
    "--max-num-tokens",
    type=click.IntRange(min=1, max=2**31 - 1),
    default=8192,
    show_default=True,
    help="Tokens in a step.",
)
@click.option(
    "--chunk-tokens",
    type=click.IntRange(min=1, max=2**31 - 1),
    help="Unit of chunked prefill. Default: 512, or --max-num-tokens if that is less.",
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
@click.pass_context
def replay(
    context: click.Context,
    /,
    trace: Path | None,
    trace_format: str | None,
    sequential: bool,
    limit: int | None,
    json_path: str | None,
    html_path: str | None,
    **given: Any,
) -> int:
    """Run a request trace through scheduler and cache manager and verify every reused page.

    Requests arrive at their timestamps in simulated time. The scheduler decides who runs in each step, the prompts
    are computed in chunks and the answers token by token; with --sequential they come one after the other and there
    is no scheduler. A simulated engine writes a recognisable pattern into every page that it computes, and each page
    is compared with it, byte for byte, whenever it is reused, after it came back from the host, and when its
    request ends. How long a step takes is a model (a roofline of 70 billion parameters on eight H200), not a
    measurement. The result is a table of hit rates, evictions, times and slots. Without TRACE a workload of
    conversations is generated from the seed (3,000 requests, or as many as --limit says).

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
    if sequential:
        _check_sequential(context, trace_format, html_path)
    given["chunk_tokens"] = given["chunk_tokens"] or min(512, given["max_num_tokens"])
    tokens_per_id = TOKENS_PER_ID if trace_format == "mooncake" else given["tokens_per_block"]
    options = Options(tokens_per_id=tokens_per_id, **given)
    requests = _requests(trace, trace_format, limit, options)
    if html_path is not None:
        _check_plotly()
    if html_path == "-":
        raise click.UsageError("--html: - is no file; give a path (--json alone writes to stdout)")
    files = {"--json": json_path, "--html": html_path}
    check_different(files)
    for name, path in files.items():
        check_writable(name, path, trace)
    report = _run(requests, options, sequential, corrupt_after=context.obj)
    source = "generated workload" if trace is None else trace.name
    title = f"{source}: {options.policy}, {options.device_blocks:,} blocks of {options.tokens_per_block} tokens"
    if options.host_blocks:
        title += f", {options.host_blocks:,} on the host"
    _print_result(report, title, json_path)
    if html_path is not None:
        write("--html", html_path, plots.html(report, title))
    if report.wrong is not None:
        click.echo(f"wrong byte: {report.wrong}", err=True)
        return 1
    if report.interrupted:
        click.echo(f"interrupted after {report.requests:,} of {len(requests):,} requests", err=True)
        return 130
    return 0


def _check_plotly() -> None:
    """Before the replay, which may take an hour."""
    try:
        import plotly  # noqa: F401
    except ModuleNotFoundError:
        raise click.UsageError("--html needs plotly; install it with: pip install kvpool[cli]") from None


def _check_sequential(context: click.Context, trace_format: str, html_path: str | None) -> None:
    """Options and traces that --sequential has no use for."""
    if html_path is not None:
        raise click.UsageError("--html: --sequential has no time to plot over; leave one of them out")
    if trace_format == "azure":
        raise click.UsageError("--sequential: an azure trace has no prefixes to match; leave it out")
    for name in ("window", "max_batch_size", "max_num_tokens", "chunk_tokens"):
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise click.UsageError(
                f"--{name.replace('_', '-')}: --sequential has no scheduler and one pool; leave one of them out"
            )


def _run(requests: list[TraceRequest], options: Options, sequential: bool, corrupt_after: int | None) -> Report:
    """The replay, under a progress bar."""
    page_bytes = PAGE_BYTES if sequential else Contents(options.tokens_per_block, options.seed).page_bytes
    check_memory(options, page_bytes)
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
    with interrupts() as stopped, progress:
        task = progress.add_task("replay", total=len(requests), rate="")

        def advance(report: Report) -> None:
            if report.requests % 16 == 0 or report.requests == len(requests):
                rate = f"{report.hit_rate_blocks:.2%} hits"
                progress.update(task, completed=report.requests, rate=rate)

        try:
            return run(requests, options, should_stop=stopped, advance=advance, corrupt_after=corrupt_after)
        except ConfigError as error:
            raise click.UsageError(str(error)) from None
        except MemoryError:
            raise too_big(options, page_bytes) from None


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


def _print_result(report: Report, title: str, json_path: str | None) -> None:
    to_stdout = json_path == "-"
    console = Console(stderr=to_stdout)
    console.print(title, highlight=False, soft_wrap=True)
    for table in tables(report):
        console.print(table)
    if report.refusal:
        click.echo(f"refused {report.refused:,}, the first: {report.refusal}", err=True)
    if to_stdout:
        click.echo(report.to_json(), nl=False)
    elif json_path is not None:
        write("--json", json_path, report.to_json())

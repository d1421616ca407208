"""One command for a machine with a GPU: `python bench/gpu_check [--json PATH]`.

Runs the tests that need a GPU, verifies and times every way for pages to travel, beside a plain copy of as many bytes
in the same run, and a matrix multiply beside each. Ends within ten minutes.

Exit codes: 0 done; 1 a test failed or a byte was wrong; 2 there is no GPU to use.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import click
from measure import Bench, Result, Sizes, calibrate
from rich.console import Console
from rich.table import Table

from kvpool import ConfigError, __version__, machine
from kvpool.mover.cuda_runtime import CudaRuntime

ROOT = Path(__file__).parents[2]
SECONDS = 560  # of the whole run
TARGETS = {2 << 20: 0.95, 16 << 10: 0.80}  # fraction of the plain copy that the best path should reach, by fragment


def run_tests(seconds: float) -> tuple[bool, str]:
    """The tests that need a GPU, in a process of their own: whether they passed, and pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return False, f"not over after {seconds:.0f} s"
    return done.returncode == 0, (done.stdout.strip().splitlines() or ["no output"])[-1]


def speeds(result: Result) -> Table:
    table = Table("direction", "pages", "path", "blocks", "GB/s", "of plain", title="speed", title_justify="left")
    for row in result.rows:
        pages = f"{row.count} x {row.fragment_bytes >> 10} KiB"
        blocks = "" if row.blocks is None else str(row.blocks)
        table.add_row(row.direction, pages, row.path, blocks, f"{row.gb_per_s:.2f}", f"{row.of_plain:.0%}")
    return table


def targets(result: Result) -> Table:
    """The best path of each direction and fragment with a target, for the largest count."""
    table = Table("direction", "fragment", "best path", "of plain", "target", title="targets", title_justify="left")
    for direction, fragment in sorted({(row.direction, row.fragment_bytes) for row in result.rows}):
        rows = [row for row in result.rows if (row.direction, row.fragment_bytes) == (direction, fragment)]
        largest = max(row.count for row in rows)
        own = [row for row in rows if row.count == largest and not row.path.startswith("plain")]
        if fragment in TARGETS and own:
            best = max(own, key=lambda row: row.of_plain)
            met = "met" if best.of_plain >= TARGETS[fragment] else "MISSED"
            name = best.path if best.blocks is None else f"{best.path}, {best.blocks} blocks"
            wanted = f"{TARGETS[fragment]:.0%} {met}"
            table.add_row(direction, f"{fragment >> 10} KiB", name, f"{best.of_plain:.0%}", wanted)
    return table


def calibration(result: Result) -> Table:
    """The thresholds that these figures suggest."""
    table = Table("direction", "copy engine from", "blocks of a kernel", title="calibration", title_justify="left")
    for direction, found in calibrate(result.rows).items():
        engine = "never" if found["engine_bytes"] is None else f"{found['engine_bytes'] >> 10} KiB"
        table.add_row(direction, engine, str(found["max_blocks"]))
    return table


def multiplies(result: Result) -> Table:
    table = Table("beside", "path", "blocks", "alone ms", "beside ms", "slower by", title_justify="left")
    table.title = "matrix multiply"
    for row in result.beside:
        blocks = "" if row.blocks is None else str(row.blocks)
        figures = f"{row.alone_ms:.2f}", f"{row.beside_ms:.2f}", f"{row.slower - 1:.1%}"
        table.add_row(row.direction, row.path, blocks, *figures)
    return table


def check(device: str, json_path: Path | None, tests: bool, sizes: Sizes) -> int:
    """The whole run; returns the exit code."""
    start, console = time.monotonic(), Console()
    try:
        machine.check_cuda(device)
    except ConfigError as error:
        click.echo(f"gpu_check: there is no GPU to measure. {error}", err=True)
        return 2
    ordinal = machine.parse_device(device) or 0
    passed, line = run_tests(240) if tests else (True, "left out")
    console.print(f"tests on CUDA: {line}", highlight=False)
    bench = Bench(CudaRuntime(ordinal), sizes, SECONDS - (time.monotonic() - start))
    try:
        result = bench.run(lambda text: click.echo(text, err=True))
    finally:
        bench.close()
    found = machine.look()
    if json_path is not None:
        document = {"version": __version__, "machine": found.to_dict(), "device": device, "tests": line}
        json_path.write_text(json.dumps(document | result.to_dict(), indent=2) + "\n")
    gpu = found.cuda.gpus[ordinal]
    console.print(f"{gpu.name}, driver CUDA {found.cuda.driver}, CuPy {found.cuda.cupy}", highlight=False)
    for table in (speeds(result), targets(result), calibration(result), multiplies(result)):
        console.print(table)
    if result.cut:
        console.print(f"cut short after {SECONDS} s: rows are missing")
    if result.wrong:
        click.echo(f"wrong byte: {result.wrong}", err=True)
    return 0 if passed and not result.wrong else 1


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--device", default="cuda", show_default=True, help="Which GPU: cuda, cuda:1, ...")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there.")
@click.option("--no-tests", is_flag=True, help="Measure only.")
def main(device: str, json_path: Path | None, no_tests: bool) -> None:
    """Check and measure kvpool's page copies on a GPU. Exit codes: 0 done; 1 wrong bytes or tests; 2 no GPU."""
    sys.exit(check(device, json_path, not no_tests, Sizes()))


if __name__ == "__main__":
    main()

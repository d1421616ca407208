"""One command for a machine with a GPU: `python bench/gpu_check [--json PATH]`.

Runs the tests that need a GPU, verifies and times every path of pages, beside a plain copy of as many bytes in the same
run, stores the calibration that follows, and times a matrix multiply beside each path. Ends within ten minutes.

Exit codes: 0 done; 1 a test failed or a byte was wrong; 2 there is no GPU to use.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from measure import Interference, interfere
from rich.console import Console
from rich.table import Table

from kvpool import ConfigError, __version__, doctor, machine
from kvpool.mover.calibrate import Bench, Result, Sizes
from kvpool.mover.cuda_runtime import CudaRuntime

ROOT = Path(__file__).parents[2]
SECONDS = 560  # of the whole run
MATRIX = 4096  # rows of the matrices that are multiplied
RESERVED = 90  # seconds of them for the multiplies
TARGETS = {2 << 20: 0.95, 16 << 10: 0.80}  # fraction of the plain copy that the best path should reach, by fragment


def run_tests(seconds: float) -> tuple[bool, str]:
    """The tests that need a GPU, in a process of their own: whether they passed, and pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return False, f"not over after {seconds:.0f} s"
    return done.returncode == 0, (done.stdout.strip().splitlines() or ["no output"])[-1]


def targets(result: Result) -> Table:
    """The best path of each direction and fragment with a target, for the largest count."""
    table = Table("direction", "fragment", "best path", "of plain", "target", title="targets", title_justify="left")
    for direction, fragment in dict.fromkeys((row.direction, row.page_bytes) for row in result.own()):
        rows = [row for row in result.own() if (row.direction, row.page_bytes) == (direction, fragment)]
        if fragment not in TARGETS:
            continue
        best = max((row for row in rows if row.count == max(r.count for r in rows)), key=lambda row: row.gb_per_s)
        fraction = best.gb_per_s / result.plain(best)
        name = best.path if best.blocks is None else f"{best.path}, {best.blocks} blocks"
        met = "met" if fraction >= TARGETS[fragment] else "MISSED"
        table.add_row(direction, f"{fragment >> 10} KiB", name, f"{fraction:.0%}", f"{TARGETS[fragment]:.0%} {met}")
    return table


def multiplies(found: Interference) -> Table:
    table = Table("beside", "path", "blocks", "alone ms", "beside ms", "slower by", title_justify="left")
    table.title = "matrix multiply"
    for row in found.rows:
        blocks = "" if row.blocks is None else str(row.blocks)
        figures = f"{row.alone_ms:.2f}", f"{row.beside_ms:.2f}", f"{row.slower - 1:.1%}"
        table.add_row(row.direction, row.path, blocks, *figures)
    return table


def document(result: Result, found: Interference, device: str, tests: str) -> dict[str, Any]:
    """All figures, for JSON."""
    rows = [asdict(row) | {"of_plain": row.gb_per_s / result.plain(row)} for row in result.rows]
    return {
        "version": __version__,
        "machine": machine.look().to_dict(),
        "device": device,
        "tests": tests,
        "rows": rows,
        "chosen": [asdict(row) for row in result.calibration("", "").best()],
        "not_offered": result.problems,
        "wrong": result.wrong,
        "cut": result.cut or found.cut,
        "beside": [asdict(row) for row in found.rows],
        "beside_missing": found.missing,
    }


def store(result: Result, name: str, driver: str) -> str:
    """Where the calibration lies now, or why it lies nowhere."""
    if result.wrong or not result.own():
        return "nothing is stored"
    try:
        return f"stored in {result.calibration(name, driver).save()}"
    except OSError as error:
        return f"not stored: {error}"


def check(device: str, json_path: Path | None, tests: bool, sizes: Sizes, matrix: int = MATRIX) -> int:
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
    runtime, end = CudaRuntime(ordinal), start + SECONDS
    with Bench(runtime, sizes, end - RESERVED - time.monotonic()) as bench:
        result, found = bench.run(_say), Interference()
        if not result.wrong:
            found = interfere(runtime, bench, matrix, end, _say)
    if json_path is not None:
        json_path.write_text(json.dumps(document(result, found, device, line), indent=2) + "\n")
    cuda = machine.look_for_cuda()
    gpu = cuda.gpus[ordinal]
    console.print(f"{gpu.name}, driver CUDA {cuda.driver}, CuPy {cuda.cupy}", highlight=False)
    doctor.show(result, console)
    console.print(targets(result))
    console.print(f"matrix multiply: {found.missing}" if found.missing else multiplies(found), highlight=False)
    if result.cut or found.cut:
        console.print(f"cut short after {SECONDS} s: rows are missing")
    console.print(f"calibration: {store(result, gpu.name, cuda.driver or '')}", highlight=False, soft_wrap=True)
    if result.wrong:
        click.echo(f"wrong byte: {result.wrong}", err=True)
    return 0 if passed and not result.wrong else 1


def _say(text: str) -> None:
    click.echo(text, err=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--device", default="cuda", show_default=True, help="Which GPU: cuda, cuda:1, ...")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there.")
@click.option("--no-tests", is_flag=True, help="Measure only.")
def main(device: str, json_path: Path | None, no_tests: bool) -> None:
    """Check, measure and calibrate kvpool's page copies on a GPU. Exit codes: 0 done; 1 wrong bytes or tests; 2 no GPU.

    The calibration is stored where kvpool looks for it."""
    sys.exit(check(device, json_path, not no_tests, Sizes()))


if __name__ == "__main__":
    main()

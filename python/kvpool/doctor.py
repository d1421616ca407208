"""`kvpool doctor`: what this machine offers, and what kvpool will use of it. Needs click and rich."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvpool import ConfigError, __version__, _core, machine
from kvpool.machine import Cuda, Machine
from kvpool.mover.calibration import CalibrationError, file_of, load, table
from kvpool.mover.paths import ENGINE_BYTES, MAX_BLOCKS
from kvpool.mover.pinned import CHUNK_BYTES, MAX_THREADS

if TYPE_CHECKING:
    from kvpool.mover.calibrate import Result

SECONDS = 300  # of a calibration, at most


def size(num_bytes: int | None) -> str:
    """Bytes in the largest binary unit that leaves at least one; None is "unlimited"."""
    if num_bytes is None:
        return "unlimited"
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if num_bytes >= 1 << shift:
            return f"{num_bytes / (1 << shift):.1f} {unit}"
    return f"{num_bytes} bytes"


def uses(found: Machine) -> dict[str, Any]:
    """What kvpool makes of it: bytes, counts, and reasons."""
    problems = found.cuda.problems
    return {
        "device": "cpu" if problems else "cuda",
        "why_not_cuda": problems,
        "kernels": _core.kernel_names(),
        "pinned_chunk_bytes": CHUNK_BYTES,
        "prefault_threads": min(found.host.cores, MAX_THREADS),
        "calibration": [calibrated(found.cuda, gpu.name) for gpu in found.cuda.gpus],
        "without_calibration": {"copy_engine_from_bytes": ENGINE_BYTES, "blocks_of_a_kernel": MAX_BLOCKS},
    }


def calibrated(cuda: Cuda, name: str) -> dict[str, Any]:
    """What is known of a GPU's paths. measured: when; None: there is no file, or it cannot be used (`problem`)."""
    driver = cuda.driver or ""
    known: dict[str, Any] = {"gpu": name, "file": str(file_of(name, driver)), "measured": None, "problem": None}
    try:
        calibration = load(name, driver)
    except CalibrationError as error:
        return known | {"problem": str(error)}
    return known if calibration is None else known | {"measured": calibration.measured}


def _offers(found: Machine) -> Table:
    cuda, host = found.cuda, found.host
    table = Table("offered", "", title=f"kvpool {__version__}", title_justify="left")
    table.add_row("NVIDIA driver", f"CUDA {cuda.driver}" if cuda.driver else "none")
    for gpu in cuda.gpus:
        name = f"{escape(gpu.name)}, {size(gpu.memory_bytes)}, compute capability {gpu.compute}"
        table.add_row(f"GPU {gpu.ordinal}", name)
    if not cuda.gpus:
        table.add_row("GPUs", "none")
    table.add_row("CuPy", cuda.cupy or "none")
    table.add_row("NVRTC", cuda.nvrtc or "none")
    table.add_row("cuda.bindings (batched copies)", cuda.bindings or "none")
    table.add_row("locked memory (ulimit -l)", size(host.locked_bytes))
    table.add_row("memory", size(host.memory_bytes))
    table.add_row("cores", str(host.cores))
    for node in host.numa:
        table.add_row(f"NUMA node {node.node}", f"{node.cores} cores, {size(node.memory_bytes)}")
    if not host.numa:
        table.add_row("NUMA nodes", "the system does not tell")
    return table


def _used(used: dict[str, Any]) -> Table:
    table = Table("used", "")
    if used["why_not_cuda"]:
        table.add_row("device", "cpu (pages in host memory)")
        table.add_row("not CUDA, because", escape("\n".join(used["why_not_cuda"])))
    else:
        table.add_row("device", "cuda where it is asked for; never tried on a GPU by kvpool's own tests")
    table.add_row("kernels", ", ".join(used["kernels"]))
    table.add_row("pinned memory, per registration", size(used["pinned_chunk_bytes"]))
    table.add_row("threads that touch it first", str(used["prefault_threads"]))
    for known in used["calibration"]:
        table.add_row(f"calibration, {escape(known['gpu'])}", escape(_state(known)))
    if not used["calibration"]:
        table.add_row("calibration", "none: there is no GPU")
    return table


def _state(known: dict[str, Any]) -> str:
    if known["measured"] is not None:
        return f"measured {known['measured']}: {known['file']}"
    default = f"copy engine from {size(ENGINE_BYTES)} on, else a kernel of {MAX_BLOCKS} blocks: guesses"
    return f"{known['problem'] or 'none'}. Until kvpool doctor --calibrate has run: {default}"


def show(result: Result, console: Console) -> None:
    """What was measured, and what follows."""
    speeds = Table(
        "direction", "page", "count", "path", "blocks", "GB/s", "of plain", title="speed", title_justify="left"
    )
    for row, cells in zip(result.rows, table(result.rows), strict=True):
        speeds.add_row(*cells, f"{row.gb_per_s / result.plain(row):.0%}")
    console.print(speeds)
    chosen = Table("direction", "page", "count", "path", "blocks", "GB/s", title="chosen", title_justify="left")
    for cells in table(result.calibration("", "").best()):
        chosen.add_row(*cells)
    console.print(chosen)
    for path, problem in result.problems.items():
        console.print(f"not offered: {path}: {escape(problem)}", highlight=False)
    if result.cut:
        console.print("cut short: what is missing goes by the nearest row, or by the default")


def calibrate(device: str) -> int:
    """Measure, print, store. 0 done; 1 a wrong byte, or the GPU failed; 2 there is no GPU to use."""
    try:
        machine.check_cuda(device)
    except ConfigError as error:
        click.echo(f"kvpool doctor: there is no GPU to calibrate. {error}", err=True)
        return 2
    from kvpool.mover.calibrate import Bench, Sizes
    from kvpool.mover.cuda_runtime import CudaRuntime

    ordinal = machine.parse_device(device) or 0
    found = machine.find_gpu(ordinal)
    assert found is not None
    try:
        with Bench(CudaRuntime(ordinal), Sizes(), SECONDS) as bench:
            result = bench.run(lambda text: click.echo(text, err=True))
    except (MemoryError, RuntimeError) as error:
        click.echo(f"kvpool doctor: {found[0].name}: {error}", err=True)
        return 1
    show(result, Console())
    if result.wrong or not result.own():
        click.echo(f"nothing is stored: {f'wrong byte: {result.wrong}' if result.wrong else 'no time'}", err=True)
        return 1
    click.echo(f"stored in {result.calibration(found[0].name, found[1]).save()}")
    return 0


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, in bytes and counts, and nothing else.")
@click.option("--calibrate", "measure", is_flag=True, help="Time every path of pages on a GPU, and store the figures.")
@click.option("--device", default="cuda", show_default=True, help="Which GPU --calibrate takes: cuda, cuda:1, ...")
def doctor(as_json: bool, measure: bool, device: str) -> int:
    """Print what this machine offers, and what kvpool will use of it.

    Looks for the NVIDIA driver and its GPUs, CuPy, NVRTC (which compiles the kernels), the limit of locked memory,
    cores and NUMA nodes. Changes nothing and takes no GPU. Exit code 0, whatever is missing.

    With --calibrate it takes the GPU for some minutes (600 MiB of its memory, and as much pinned), verifies and times
    every path, and stores what managers on that GPU then go by. Exit codes: 0 done; 1 a wrong byte, or the GPU failed;
    2 there is no GPU to use, or nowhere to store.
    """
    if measure:
        if as_json:
            raise click.UsageError("--calibrate prints tables and stores JSON; it does not go with --json")
        return calibrate(device)
    found = machine.look()
    used = uses(found)
    if as_json:
        click.echo(json.dumps({"version": __version__, "offers": found.to_dict(), "uses": used}, indent=2))
        return 0
    console = Console()
    console.print(_offers(found))
    console.print(_used(used))
    return 0

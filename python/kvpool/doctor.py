"""`kvpool doctor`: what this machine offers, and what kvpool will use of it. Needs click and rich."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvpool import __version__, _core, machine
from kvpool.machine import Machine
from kvpool.mover.pinned import CHUNK_BYTES, MAX_THREADS


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
        "calibration": None,
    }


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
    table.add_row("calibration", "none: not measured on this machine")
    return table


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, in bytes and counts, and nothing else.")
def doctor(as_json: bool) -> int:
    """Print what this machine offers, and what kvpool will use of it.

    Looks for the NVIDIA driver and its GPUs, CuPy, NVRTC (which compiles the kernels), the limit of locked memory,
    cores and NUMA nodes. Changes nothing and takes no GPU. Exit code 0, whatever is missing.
    """
    found = machine.look()
    used = uses(found)
    if as_json:
        click.echo(json.dumps({"version": __version__, "offers": found.to_dict(), "uses": used}, indent=2))
        return 0
    console = Console()
    console.print(_offers(found))
    console.print(_used(used))
    return 0

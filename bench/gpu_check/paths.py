"""Ways for pages to travel, and the jobs they are measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpool.mover.cuda_runtime import CudaRuntime
from kvpool.mover.launches import plan_launch

DIRECTIONS = ("offload", "onboard", "copy")
Slots = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Job:
    """n pages from slots to slots. `source`, `target`: addresses of pools of 2 n slots; `lists`: the same slots where
    the GPU reads them (addresses); `staging`: device memory for n pages."""

    direction: str
    source: int
    target: int
    staging: int
    src_slots: Slots
    dst_slots: Slots
    lists: tuple[int, int]
    page_bytes: int

    @property
    def num_pages(self) -> int:
        return len(self.src_slots)

    @property
    def num_bytes(self) -> int:
        return self.num_pages * self.page_bytes


@dataclass(frozen=True)
class Path:
    """name, and a cap of blocks where a kernel takes part. `enqueue` gives a stream all of a job.

    run: the side ("source" or "target", by direction) on which the path wants the pages side by side, from slot 0.
    """

    name: str
    blocks: int | None
    enqueue: Callable[[CudaRuntime, Job, Any], None]
    run: bool = False

    def job(self, job: Job) -> Job:
        """The job as this path can do it: the host's pages side by side if it goes by a run."""
        if not self.run:
            return job
        side_by_side = np.arange(job.num_pages, dtype=np.int32)
        if job.direction == "offload":
            return replace(job, dst_slots=side_by_side)
        return replace(job, src_slots=side_by_side)


def _plain(runtime: CudaRuntime, job: Job, stream: Any) -> None:
    target = job.target + (job.num_bytes if job.source == job.target else 0)
    runtime.copy_async(target, job.source, job.num_bytes, stream)


def _page_by_page(runtime: CudaRuntime, job: Job, stream: Any) -> None:
    size = job.page_bytes
    for source, target in zip(job.src_slots.tolist(), job.dst_slots.tolist(), strict=True):
        runtime.copy_async(job.target + target * size, job.source + source * size, size, stream)


def _kernel(operation: str, blocks: int) -> Callable[[CudaRuntime, Job, Any], None]:
    def enqueue(runtime: CudaRuntime, job: Job, stream: Any) -> None:
        launch = plan_launch(operation, (job.source, job.target), job.page_bytes, job.num_pages, blocks)
        assert launch is not None
        numbers = np.int64(job.page_bytes), np.int32(job.num_pages)
        runtime.launch(launch, (job.source, job.target, *job.lists, *numbers), stream)

    return enqueue


def _by_a_run(blocks: int) -> Callable[[CudaRuntime, Job, Any], None]:
    """Offload: gathered in device memory, then one copy. Onboard: one copy, then scattered."""

    def enqueue(runtime: CudaRuntime, job: Job, stream: Any) -> None:
        numbers = np.int64(job.page_bytes), np.int32(job.num_pages)
        if job.direction == "offload":
            launch = plan_launch("gather_pages", (job.source, job.staging), job.page_bytes, job.num_pages, blocks)
            assert launch is not None
            runtime.launch(launch, (job.source, job.staging, job.lists[0], *numbers), stream)
            runtime.copy_async(job.target, job.staging, job.num_bytes, stream)
        else:
            launch = plan_launch("scatter_pages", (job.staging, job.target), job.page_bytes, job.num_pages, blocks)
            assert launch is not None
            runtime.copy_async(job.staging, job.source, job.num_bytes, stream)
            runtime.launch(launch, (job.staging, job.target, job.lists[1], *numbers), stream)

    return enqueue


PLAIN = Path("plain copy of as many bytes", None, _plain)


def paths(direction: str, blocks: tuple[int, ...]) -> list[Path]:
    """All ways for one direction, with each cap of blocks."""
    found = [Path("copy engine, page by page", None, _page_by_page)]
    for cap in blocks:
        found.append(Path("registers", cap, _kernel("copy_pages", cap)))
        found.append(Path("ring", cap, _kernel("copy_ring", cap)))
        if direction != "copy":
            found.append(Path("gather or scatter, one run", cap, _by_a_run(cap), run=True))
    return found

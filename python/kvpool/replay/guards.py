"""What is looked at before a run, and what ends one: files, memory, Ctrl-C."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from kvpool.replay.options import Options


def check_writable(name: str, path: str | None, trace: Path | None) -> None:
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


def check_different(paths: dict[str, str | None]) -> None:
    """Before the run: no two options name one file, by whatever path. Devices take what comes."""
    files = {name: path for name, path in paths.items() if path not in (None, "-")}
    for (name, path), (other, its) in itertools.combinations(files.items(), 2):
        if os.path.exists(path) and os.path.exists(its):
            same = os.path.isfile(path) and os.path.samefile(path, its)
        else:
            same = os.path.realpath(path) == os.path.realpath(its)
        if same:
            raise click.UsageError(f"{name} and {other} name the same file, {its}; give each its own")


def write(name: str, path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"{name}: cannot write {path}: {error.strerror}") from None


def check_memory(options: Options, page_bytes: int) -> None:
    """Refuse what cannot fit this machine at all, before anything tries to allocate it."""
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return  # a platform that does not tell
    if _bytes_needed(options, page_bytes) > physical:
        raise too_big(options, page_bytes)


def _bytes_needed(options: Options, page_bytes: int) -> int:
    """Bytes of pages and of the tree's tokens; the tree's nodes come on top."""
    pages = page_bytes * len(options.pools)
    return (options.device_blocks + options.host_blocks) * (pages + 4 * options.tokens_per_block)


def too_big(options: Options, page_bytes: int) -> click.UsageError:
    return click.UsageError(
        f"not enough memory: --device-blocks {options.device_blocks} and --host-blocks "
        f"{options.host_blocks} of {options.tokens_per_block} tokens need "
        f"{_bytes_needed(options, page_bytes):,} bytes"
    )


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
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

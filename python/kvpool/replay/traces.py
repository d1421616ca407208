"""Requests of a trace, and the readers of Mooncake's JSONL and Azure's CSV format.

One JSON object per line: `timestamp` (ms), `input_length` and `output_length` (tokens), `hash_ids` (one id
per block of the prompt; equal ids = equal prefix). Further fields are ignored, and so are empty lines.
"""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any, NoReturn

MOST_TOKENS = 2**31 - 1  # of a prompt or an answer: lengths of caches are int32


class TraceError(ValueError):
    """A trace that cannot be used. `line` counts from 1 (0: the file as a whole)."""

    def __init__(self, path: str, line: int, field: str | None, problem: str) -> None:
        self.path, self.line, self.field, self.problem = path, line, field, problem
        where = path if line == 0 else f"{path}: line {line}"
        super().__init__(f"{where}: field '{field}': {problem}" if field else f"{where}: {problem}")


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. `line`: where it stands in its file (a generated one: its number), from 1. Times in ms."""

    line: int
    timestamp_ms: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def read_mooncake(path: str | os.PathLike[str], limit: int | None = None) -> list[TraceRequest]:
    """The first `limit` requests of the file (None: all), in file order.

    Raises TraceError for a malformed line, naming its number and field, and for a file without a request;
    OSError where the file cannot be read. Lines after the limit are not looked at.
    """
    requests = list(islice(_mooncake_lines(os.fspath(path)), limit))
    if not requests:
        raise TraceError(os.fspath(path), 0, None, "no requests")
    return requests


def _mooncake_lines(path: str) -> Iterator[TraceRequest]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield _mooncake_request(path, number, raw)


def _mooncake_request(path: str, line: int, raw: bytes) -> TraceRequest:
    try:
        record = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise TraceError(path, line, None, f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise TraceError(path, line, None, f"not valid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise TraceError(path, line, None, f"not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise TraceError(path, line, None, f"expected a JSON object, got {_name(record)}")
    fields = _Fields(path, line, record)
    return TraceRequest(
        line=line,
        timestamp_ms=fields.milliseconds("timestamp"),
        input_length=fields.count("input_length"),
        output_length=fields.count("output_length"),
        hash_ids=fields.ids("hash_ids"),
    )


def read_azure(path: str | os.PathLike[str], limit: int | None = None) -> list[TraceRequest]:
    """The first `limit` requests of a CSV `TIMESTAMP,ContextTokens,GeneratedTokens`, in file order.

    TIMESTAMP: date and time, or seconds; the first one counts as 0. There are no prefixes: nothing matches. Raises as
    `read_mooncake`.
    """
    requests = list(islice(_azure_lines(os.fspath(path)), limit))
    if not requests:
        raise TraceError(os.fspath(path), 0, None, "no requests")
    return requests


def _azure_lines(path: str) -> Iterator[TraceRequest]:
    names = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    first: float | None = None
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        try:
            header = next(rows, [])
            if tuple(name.strip() for name in header) != names:
                raise TraceError(path, 1, None, f"expected the columns {','.join(names)}, got {','.join(header)}")
            for row in rows:
                if not row:
                    continue
                line = rows.line_num
                if len(row) != len(names):
                    raise TraceError(path, line, None, f"expected {len(names)} values, got {len(row)}")
                now = _moment(path, line, row[0])
                first = now if first is None else first
                counts = [_whole(path, line, name, value) for name, value in zip(names[1:], row[1:], strict=True)]
                if now < first:
                    raise TraceError(path, line, names[0], f"{row[0]!r} lies before the first one")
                yield TraceRequest(line, (now - first) * 1000, counts[0], counts[1], ())
        except UnicodeDecodeError as error:
            raise TraceError(path, rows.line_num + 1, None, f"not UTF-8 ({error.reason})") from None
        except csv.Error as error:
            raise TraceError(path, rows.line_num, None, f"not valid CSV ({error})") from None


def _moment(path: str, line: int, value: str) -> float:
    """Seconds. `fromisoformat` knows six digits behind the second, these traces have seven."""
    try:
        seconds = float(value)
    except ValueError:
        head, _, fraction = value.strip().partition(".")
        try:
            moment = datetime.fromisoformat(head).replace(tzinfo=UTC)
            seconds = moment.timestamp() + (float(f"0.{fraction}") if fraction else 0.0)
        except ValueError:
            raise TraceError(path, line, "TIMESTAMP", f"expected date and time or seconds, got {value!r}") from None
    if not math.isfinite(seconds):
        raise TraceError(path, line, "TIMESTAMP", f"expected a finite number, got {value!r}")
    return seconds


def _whole(path: str, line: int, name: str, value: str) -> int:
    if not value.strip().isascii() or not value.strip().isdigit():
        raise TraceError(path, line, name, f"expected an integer >= 0, got {value!r}")
    if len(value.strip()) > 18 or int(value) > MOST_TOKENS:
        raise TraceError(path, line, name, f"expected at most {MOST_TOKENS}, got {value.strip()[:24]}")
    return int(value)


class _Fields:
    """Typed access to one line's object."""

    def __init__(self, path: str, line: int, record: dict[str, Any]) -> None:
        self._path, self._line, self._record = path, line, record

    def milliseconds(self, name: str) -> float:
        value = self._get(name)
        if type(value) is not int and type(value) is not float:
            self._fail(name, f"expected a number, got {_name(value)}")
        if not 0 <= value <= sys.float_info.max:
            self._fail(name, f"expected a finite number >= 0, got {str(value)[:24]}")
        return float(value)

    def count(self, name: str) -> int:
        number = self._natural(name, "", self._get(name))
        if number > MOST_TOKENS:
            self._fail(name, f"expected at most {MOST_TOKENS}, got {number}")
        return number

    def ids(self, name: str) -> tuple[int, ...]:
        value = self._get(name)
        if not isinstance(value, list):
            self._fail(name, f"expected a list of integers, got {_name(value)}")
        # One pass in C for good lines; the slow one only to find the culprit.
        if any(type(item) is not int or item < 0 for item in value):
            for index, item in enumerate(value):
                self._natural(name, f"entry {index}: ", item)
        return tuple(value)

    def _get(self, name: str) -> Any:
        if name not in self._record:
            self._fail(name, "missing")
        return self._record[name]

    def _natural(self, name: str, prefix: str, value: Any) -> int:
        if type(value) is not int:
            self._fail(name, f"{prefix}expected an integer, got {_name(value)}")
        if value < 0:
            self._fail(name, f"{prefix}expected an integer >= 0, got {value}")
        return int(value)

    def _fail(self, name: str, problem: str) -> NoReturn:
        raise TraceError(self._path, self._line, name, problem)


def _name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), repr(value))

"""W4, W1, W2 and W3 of kvpool, vLLM and SGLang in one run, in turns; and short memory with vLLM's scheduler.

    bench/rivals_py/run [--json PATH] [--rounds N] [--trace PATH]      makes the environment, then calls this

Each system runs in a process of its own, in its own environment; a round is one world of 100 steps per system and case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import memory_short  # noqa: E402
import tables  # noqa: E402

RIVALS = HERE / ".venv" / "bin" / "python"
SYSTEMS = {
    "kvpool": [sys.executable, str(HERE / "kvpool_worker.py")],
    "vLLM 0.33.0": [str(RIVALS), str(HERE / "vllm_worker.py")],
    "SGLang 0.5.23": [str(RIVALS), str(HERE / "sglang_worker.py")],
}
THROUGHPUT = "kvpool, throughput"  # SchedulerConfig.admission; the first of SYSTEMS
CASES: dict[str, dict[str, Any]] = {
    "A": {"kind": "A"},
    "B": {"kind": "B memory"},
    "B, somebody comes and goes in each step": {"kind": "B asked"},
    "C": {"kind": "C"},
    "A, 4,000 waiting": {"kind": "A", "waiting": 4000},
    "B, somebody comes and goes, 4,000 waiting": {"kind": "B asked", "waiting": 4000},
}
STEPS, WARM = 100, 10


class Worker:
    """One system: a line of JSON in, a line out; what it prints besides goes to stderr."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.error = ""
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **what: Any) -> Any:
        """The answer, or None: it failed, see `error`."""
        if self.error:
            return None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"it ended with {self._process.wait()}"}
        if isinstance(answer, dict) and "error" in answer:
            if "unsupported" in answer:
                return None
            self.error = answer["error"]
            print(f"{self.name}: {self.error}", file=sys.stderr)
            return None
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def low(values: list[int]) -> list[float]:
    """(min, median), µs."""
    return [round(min(values) / 1000, 1), round(statistics.median(values) / 1000, 1)]


def w4(workers: list[Worker], rounds: int) -> dict[str, dict[str, Any]]:
    """{case: {system: {"schedule": [min, median], "update": ..., "together": ...}}}"""
    table: dict[str, dict[str, Any]] = {}
    for case, given in CASES.items():
        times: dict[str, list[list[int]]] = {}
        for _ in range(rounds):
            for worker in workers:
                answer = worker.ask(do="w4", number=STEPS, warm=WARM, **given)
                if answer:
                    times.setdefault(worker.name, []).extend(answer)
        table[case] = {
            name: {
                "schedule": low([s for s, _ in all_of]),
                "update": low([u for _, u in all_of]),
                "together": low([s + u for s, u in all_of]),
            }
            for name, all_of in times.items()
        }
    return table


def blocks(workers: list[Worker], rounds: int) -> dict[str, dict[str, list[int]]]:
    """{"W1" | "W1t" | ...: {system: [min, median]}}, ns per block."""
    table: dict[str, dict[str, list[int]]] = {}
    for _ in range(rounds):
        for worker in workers:
            for name, times in (worker.ask(do="blocks", number=500) or {}).items():
                table.setdefault(name, {}).setdefault(worker.name, []).extend(times)
    return {
        name: {system: [round(ns * 1000 / 64) for ns in low(times)] for system, times in systems.items()}
        for name, systems in table.items()
    }


def short(workers: list[Worker]) -> dict[str, dict[str, Any]]:
    """{"lengths, pool / need": {system: {"steps": ..., "extra_percent": ..., "mean_end": ...}}}"""
    asked: list[tuple[str, Worker, dict[str, str]]] = [(worker.name, worker, {}) for worker in workers]
    asked.insert(1, (THROUGHPUT, workers[0], {"admission": "throughput"}))
    table: dict[str, dict[str, Any]] = {}
    for name, lengths in (("equal", memory_short.EQUAL), ("mixed", memory_short.mixed())):
        for ratio in (1.0, 0.8, 0.7, 0.5):
            answers = {
                system: worker.ask(do="short", ratio=ratio, lengths=lengths, **more) for system, worker, more in asked
            }
            table[f"{name}, {ratio}"] = {system: answer for system, answer in answers.items() if answer}
    return table


def trace(workers: list[Worker], path: str) -> dict[str, dict[str, Any]]:
    """{blocks of the pool: {system: {"hit_percent": ..., "ns": ...}}}"""
    return {
        str(slots): {w.name: answer for w in workers if (answer := w.ask(do="w3", path=path, slots=slots))}
        for slots in (3_000, 10_000, 30_000)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trace", help="a Mooncake trace, for W3")
    given = parser.parse_args()
    workers = [Worker(name, command) for name, command in SYSTEMS.items()]
    results: dict[str, Any] = {
        "w4": w4(workers, given.rounds),
        "blocks": blocks(workers, given.rounds),
        "short": short(workers),
    }
    if given.trace:
        results["w3"] = trace(workers, given.trace)
    results["failed"] = {worker.name: worker.error for worker in workers if worker.error}
    for worker in workers:
        worker.close()
    for table in (tables.w4, tables.python_blocks, tables.python_trace, tables.short):
        print(table({"python": results}), end="\n\n")
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

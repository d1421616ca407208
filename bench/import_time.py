"""What `import kvpool` costs: python bench/import_time.py [rounds]

Each line is the best of so many fresh processes, in milliseconds of processor time and of wall time. Bytecode is cached
first, as an installation does it. "adds": to the line above.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time

LINES = {"python itself": "", "import numpy": "import numpy", "import kvpool": "import kvpool"}


def once(code: str, cache: str) -> tuple[float, float]:
    """Milliseconds of one process: processor, wall."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=environment | {"PYTHONPYCACHEPREFIX": cache}, check=True)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - begun
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return 1e3 * busy, 1e3 * wall


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as cache:
        once("import kvpool", cache)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in LINES}
        for _ in range(rounds):  # by turns: whatever else runs hits all of them
            for name, code in LINES.items():
                times[name].append(once(code, cache))
    print("| best of", rounds, "| processor, ms | adds | wall, ms | adds |\n| --- | --- | --- | --- | --- |")
    last = (0.0, 0.0)
    for name, found in times.items():
        busy, wall = (min(column) for column in zip(*found, strict=True))
        print(f"| {name} | {busy:.0f} | {busy - last[0]:.0f} | {wall:.0f} | {wall - last[1]:.0f} |")
        last = busy, wall


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)

"""Instructions of the hot paths under callgrind, beside the record of the last commit.

    make instructions                         count and write record.json
    python bench/instructions/count.py        count and compare; exit 1 when a path takes more than 5 % more

Counts repeat exactly on one toolchain and differ between toolchains: they are compared only where rustc, valgrind, C
library and architecture are those of the record. Who changes a hot path on purpose commits the new record with it.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORD = HERE / "record.json"
TARGET = HERE.parents[1] / "target"
GROWTH = 5  # percent that pass
CALLS = 16  # of main.rs
PATHS = ["probe", "create", "resume", "block_table", "decode", "release", "churn", "evict", "resize", "commit", "crowd"]
PER_PATH = {"evict": 2 * CALLS, "decode": 16 * CALLS}


def output(*command: str) -> str:
    """What a command prints to stdout and stderr."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def toolchain() -> dict[str, str]:
    """What the counts depend on besides the sources."""
    return {
        "rustc": output("rustc", "--version").strip(),
        "valgrind": output("valgrind", "--version").strip(),
        "libc": " ".join(platform.libc_ver()),
        "machine": platform.machine(),
    }


def count() -> dict[str, int]:
    """Instructions of one operation by path; one run each, counting only inside its function."""
    manifest = str(HERE / "Cargo.toml")
    output("cargo", "build", "--quiet", "--release", "--manifest-path", manifest, "--target-dir", str(TARGET))
    program = str(TARGET / "release" / "kvpool-instructions")
    counts = {}
    for path in PATHS:
        toggle = f"--toggle-collect=kvpool_instructions::hot::{path}"
        printed = output("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", toggle, program)
        collected = int(re.findall(r"Collected : (\d+)", printed)[0])
        assert collected > 0, f"{path}: callgrind has not found the function"
        counts[path] = round(collected / PER_PATH.get(path, CALLS))
    return counts


def compare(record: dict[str, Any], tools: dict[str, str], counts: dict[str, int]) -> tuple[list[str], bool]:
    """(what to print, whether it passes)."""
    if record["toolchain"] != tools:
        return [f"not compared: recorded with {record['toolchain']}, this is {tools}"], True
    lines, passes = [], True
    for path, now in counts.items():
        before = record["instructions"].get(path)
        if before is None:
            lines.append(f"{path}: {now:,}, not in the record")
            passes = False
            continue
        grown = 100 * now > (100 + GROWTH) * before
        passes &= not grown
        lines.append(f"{path}: {now:,}, recorded {before:,} ({now / before - 1:+.1%}){': GROWN' if grown else ''}")
    if not passes:
        lines.append("more than the record allows: mend the path, or commit what `make instructions` writes")
    return lines, passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", action="store_true", help="write the record instead of comparing with it")
    given = parser.parse_args()
    if shutil.which("valgrind") is None:
        if given.record:
            sys.exit("valgrind is missing")
        print("SKIPPED: valgrind is missing and cannot be installed here")
        return
    tools, counts = toolchain(), count()
    if given.record:
        RECORD.write_text(json.dumps({"toolchain": tools, "instructions": counts}, indent=1) + "\n")
        print("\n".join(f"{path}: {now:,}" for path, now in counts.items()))
        return
    lines, passes = compare(json.loads(RECORD.read_text()), tools, counts)
    print("\n".join(lines))
    sys.exit(not passes)


if __name__ == "__main__":
    main()

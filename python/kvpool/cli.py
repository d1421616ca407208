"""Entry point of the `kvpool` command.

The command needs click and rich, the extra `kvpool[cli]`. They are imported here, when the command runs, and
nowhere on the way of `import kvpool`; without them the command says what to install.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

_NEEDED = ("click", "rich")


def main(argv: Sequence[str] | None = None, *, corrupt_after: int | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code.

    0: done; 1: `replay` read a wrong byte; 2: bad input or option; 130: Ctrl-C. `corrupt_after` serves
    tests: after so many requests `replay` flips one bit of each page of the last of them, so that the next
    reuse must notice.
    """
    try:
        from kvpool.replay.command import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _NEEDED:
            raise
        print(f"kvpool: the command needs {missing}; install it with: pip install kvpool[cli]", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return run(list(sys.argv[1:] if argv is None else argv), corrupt_after=corrupt_after)


if __name__ == "__main__":
    sys.exit(main())

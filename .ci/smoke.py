"""What an installed kvpool must do with the extras that it was installed with, and say of those that it was not.

    python -P .ci/smoke.py [EXTRA ...]        # those that are installed; from an empty folder

The script of the installation under test runs it; it needs nothing of the source tree.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import metadata
from pathlib import Path

EXTRAS = ("cli", "cuda", "torch", "transformers")
COMMAND = Path(sys.executable).with_name("kvpool")


def base() -> None:
    """The package itself, from where it was installed to, without any extra."""
    import kvpool
    from kvpool import _core

    extras = {"torch", "transformers", "cupy", "click", "rich", "plotly"} & set(sys.modules)
    assert not extras, f"import kvpool imports {extras}"
    assert Path(kvpool.__file__).is_relative_to(sys.prefix), kvpool.__file__
    assert "copy_pages" in _core.kernel_source("copy_pages")
    assert {*EXTRAS, "dev"} <= set(metadata("kvpool").get_all("Provides-Extra") or ())
    with kvpool.KVCacheManager(config()) as manager:
        for name, reused in (("first", 0), ("second", 4)):
            with manager.create(name, range(5)) as cache:
                assert cache.num_reused_tokens == reused
                assert cache.resume()
                assert cache.resize(5)
                cache.commit(range(reused, 5))
        manager.check()


def config():  # type: ignore[no-untyped-def]
    import kvpool

    return kvpool.CacheConfig(tokens_per_block=4, pools=[kvpool.PoolConfig("kv", page_bytes=64)], device_bytes=512)


def replay(*options: str) -> subprocess.CompletedProcess[str]:
    command = [str(COMMAND), "replay", "--limit", "50", "--device-blocks", "500", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def cli() -> None:
    done = replay("--html", "plots.html")
    assert done.returncode == 0, done.stderr
    assert Path("plots.html").stat().st_size > 10_000
    assert subprocess.run([str(COMMAND), "doctor"], capture_output=True, timeout=60, check=False).returncode == 0


def no_cli() -> str:
    done = replay()
    assert done.returncode == 2, done
    return done.stderr


def cuda() -> None:
    """Without a driver: it imports, the error names the driver, and the CPU works on."""
    import cupy

    import kvpool
    from kvpool import machine
    from kvpool.mover.batch_copy import BatchCopy

    found = machine.look_for_cuda()
    assert found.cupy == cupy.__version__, found
    assert found.nvrtc, found
    assert found.bindings, found
    if found.driver is None:
        said = refusal(lambda: kvpool.KVCacheManager(config(), device="cuda"), kvpool.ConfigError)
        assert "NVIDIA driver is missing" in said, said
        assert "CuPy" not in said, said
        assert "finds no driver" in refusal(BatchCopy, RuntimeError)


def no_cuda() -> str:
    import kvpool

    return refusal(lambda: kvpool.KVCacheManager(config(), device="cuda"), kvpool.ConfigError)


def torch() -> None:
    from kvpool.integrations.torch import page_tensor

    assert callable(page_tensor)


def no_torch() -> str:
    return refusal(lambda: __import__("kvpool.integrations.torch"), ModuleNotFoundError)


def transformers() -> None:
    from kvpool.integrations.transformers import PagedCache

    assert callable(PagedCache)


def no_transformers() -> str:
    return refusal(lambda: __import__("kvpool.integrations.transformers"), ModuleNotFoundError)


def refusal(call: Callable[[], object], kind: type[Exception]) -> str:
    """What the error says that there must be."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def main(installed: list[str]) -> None:
    base()
    for extra in EXTRAS:
        if extra in installed:
            globals()[extra]()
        else:
            said = globals()[f"no_{extra}"]()
            assert "pip install" in said, said
            assert f"kvpool[{extra}]" in said, said
    print(f"kvpool {metadata('kvpool')['Version']} works; extras: {', '.join(installed) or 'none'}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Packages that only an extra installs."""

from __future__ import annotations

from importlib import import_module


def need(package: str, extra: str) -> None:
    """Import `package`; ModuleNotFoundError names the `pip install` line where it is missing."""
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise  # it is there, and something that it needs is not
        raise ModuleNotFoundError(
            f"kvpool.integrations.{extra} needs {package}; install it with: pip install 'kvpool[{extra}]'",
            name=package,
        ) from error

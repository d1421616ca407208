"""Every test of the CPU backend's suite runs on CUDA too: backend.py says which, and what they make there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import backend


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    devices = backend.parameters(metafunc.module.__name__, metafunc.function.__name__)
    if len(devices) > 1:
        metafunc.parametrize("device", devices, indirect=True)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where this test's managers are."""
    name = getattr(request, "param", "cpu")
    if name == "cuda":
        backend.enter_cuda(monkeypatch)
    yield name
    backend.leave_cuda()

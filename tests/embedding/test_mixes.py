"""Token for token: a model on kvpool's pages says what the same weights say without them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import mixes
import pytest
import torch

from kvpool.batches import Batches
from kvpool.integrations.torch import executor
from kvpool.mover import CpuMover, MoveBatch
from kvpool.scheduler import request


def test_200_mixes_token_for_token() -> None:
    counts: Counter[str] = Counter()
    for seed in range(200):
        mixes.run(seed, counts)
    print(dict(counts))
    missing = [what for what in mixes.WANTED if not counts[what]]
    assert not missing, f"200 mixes never saw {missing}"


def _without(kind: bool) -> Callable[..., None]:
    """A manager that forgets to make copies from the host (True), or within the device (False)."""
    made = Batches._copy

    def copy(self: Batches, copies: Any) -> None:
        made(self, [one for one in copies if one[1] is not kind])

    return copy


def _noticed() -> bool:
    """Whether some mix among 60 fails as wrong bytes must: by its tokens, or their logits."""
    for seed in range(60):
        try:
            mixes.run(seed, Counter())
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("from_host", [False, True], ids=["partial copies", "onboards"])
def test_a_copy_that_is_not_made_is_noticed(monkeypatch: pytest.MonkeyPatch, from_host: bool) -> None:
    monkeypatch.setattr(Batches, "_copy", _without(from_host))
    assert _noticed()


def test_an_offload_of_another_page_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = CpuMover.submit

    def submit(self: CpuMover, batch: MoveBatch, after: Any = ()) -> Any:
        if batch.direction == "offload":  # another page goes down instead
            batch = MoveBatch(batch.pool, batch.direction, [1] * len(batch.src), batch.dst)
        return whole(self, batch, after)

    monkeypatch.setattr(CpuMover, "submit", submit)
    assert _noticed()


def test_reuse_across_scopes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "scope_key", lambda scope: (b"", None))
    assert _noticed()


def test_a_token_that_is_not_written_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = executor.paged_attention

    def forgetful(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, *rest: Any) -> torch.Tensor:
        k = k.clone()
        k[0] = torch.nan  # as the poisoned page has it
        return whole(q, k, v, pages, *rest)

    monkeypatch.setattr(executor, "paged_attention", forgetful)
    assert _noticed()

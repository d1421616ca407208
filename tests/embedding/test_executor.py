"""The torch integration, piece by piece."""

from __future__ import annotations

import pytest
import torch

from kvpool import CacheConfig, ConfigError, Engine, KVCacheManager, PoolConfig, Request, Scheduler, SchedulerConfig
from kvpool.integrations.torch import (
    Decoder,
    DecoderConfig,
    DecoderLayer,
    NGramDrafter,
    PagedExecutor,
    PagedModel,
    Rows,
    greedy,
    page_tensor,
    paged_attention,
)


def _manager(pool: PoolConfig, tokens_per_block: int = 4) -> KVCacheManager:
    return KVCacheManager(CacheConfig(tokens_per_block, [pool], 64 * pool.page_bytes, host_bytes=8 * pool.page_bytes))


def _attention(**changed: object) -> PoolConfig:
    sizes = {"layers": 2, "kv_heads": 2, "head_dim": 8, "dtype": torch.float64, "tokens_per_block": 4}
    return PoolConfig.attention("kv", **(sizes | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("tier", ["device", "host"])
def test_page_tensor_is_a_view_without_a_copy(tier: str) -> None:
    with _manager(_attention()) as manager:
        pages = manager.pages("kv", tier)
        tensor = page_tensor(manager, "kv", torch.float64, tier)
        assert tensor.shape == (len(pages), 2, 2, 4, 2, 8)
        assert tensor.data_ptr() == pages.ctypes.data
        tensor[3, 1, 0, 2] = 1.5
        assert (pages[3].view("f8").reshape(2, 2, 4, 2, 8)[1, 0, 2] == 1.5).all()
        pages[3] = 0
        assert not tensor.any()


def test_page_tensor_of_bfloat16() -> None:
    with _manager(_attention(dtype=torch.bfloat16)) as manager:
        page_tensor(manager, "kv", torch.bfloat16)[1:] = 3.0
        assert manager.pages("kv")[5].tobytes() == b"\x40\x40" * 256  # 3.0 in bfloat16


def test_page_tensor_names_what_does_not_fit() -> None:
    with _manager(_attention()) as manager:
        with pytest.raises(ConfigError, match=r"torch.float32 .* has 1024 bytes, one of pool 'kv' has 2048"):
            page_tensor(manager, "kv", torch.float32)
        with pytest.raises(ConfigError, match="'other' is unknown"):
            page_tensor(manager, "other", torch.float64)
    with _manager(PoolConfig("kv", 64)) as manager, pytest.raises(ConfigError, match=r"PoolConfig\.attention"):
        page_tensor(manager, "kv", torch.float64)


def test_a_paged_model_needs_the_pools_of_its_model() -> None:
    with _manager(_attention()) as manager, pytest.raises(ConfigError, match="no pool 'full'"):
        PagedModel(Decoder(DecoderConfig(dtype=torch.float64)), manager)


def test_paged_attention_never_writes_the_null_page() -> None:
    pages = torch.zeros(3, 2, 4, 1, 2)
    q = k = v = torch.ones(1, 1, 2)
    with pytest.raises(IndexError, match="slot 0"):
        paged_attention(q, k, v, pages, torch.tensor([[1, 0]], dtype=torch.int32), Rows([4], [1]))
    assert not pages.any()


def test_ngram_drafter_proposes_what_followed_last_time() -> None:
    request = Request("r", [1, 2, 3, 4, 1, 2, 5, 6, 1, 2], 10)
    assert NGramDrafter(2)(request, 3) == [5, 6, 1]
    assert NGramDrafter(3)(request, 3) == []
    request.output_tokens = [3, 4]
    assert NGramDrafter(2)(request, 2) == [1, 2]


@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding window and sinks beside full"])
def test_a_model_of_millions_of_parameters(sliding: bool) -> None:
    """Two prompts with a common prefix, chunked, decoding beside each other, with drafts from their own tokens."""
    layers = (DecoderLayer(), DecoderLayer("window", 24, 4)) * 2 if sliding else (DecoderLayer(),) * 4
    model = Decoder(DecoderConfig(layers, dtype=torch.float64))
    assert 2e6 < sum(one.numel() for some in model.weights.values() for one in some) < 1e7
    config = CacheConfig(
        16, model.config.pools(16), 32 << 20, max_batch_size=2, max_seq_len=128, max_num_tokens=48, draft_tokens=2
    )
    prompts = [list(range(70)), [*range(60), 5, 4, 5, 4, 5]]
    with KVCacheManager(config) as manager:
        executor = PagedExecutor(PagedModel(model, manager, poison=True), drafter=NGramDrafter(1))
        engine = Engine(Scheduler(manager, SchedulerConfig(2, 48, chunk_tokens=16)), executor)
        engine.submit(Request(0, prompts[0], 6, draft_tokens=2))
        while not engine.step():
            pass
        engine.submit(Request(1, prompts[1], 12, draft_tokens=2))
        engine.submit(Request(2, prompts[0], 6, draft_tokens=2))
        ended = engine.run()
        assert ended[1].output_tokens == greedy(model, prompts[1], 12)
        assert ended[2].output_tokens == greedy(model, prompts[0], 6)
        assert manager.stats().reused_tokens >= 60 + 64
        manager.check()

"""Models that nobody here wrote, on kvpool's pages: the tokens that they give with their own cache."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
import transformers

from kvpool import BatchDesc, CacheConfig, ConfigError, KVCacheDesc, KVCacheManager, LogicError, PoolConfig, Scope
from kvpool.integrations.transformers import PagedCache, pools_of

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip
CLASSES = {
    "Llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "Mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": 12}),
    "Gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM, {"sliding_window": 10}),
}
T = 4


@cache
def model(name: str) -> Any:
    config, of, more = CLASSES[name]
    torch.manual_seed(11)
    return of(config(**SIZES, **more)).double().eval()


def memory(name: str, **changed: Any) -> KVCacheManager:
    pools = pools_of(model(name), T)
    given = {"device_bytes": 1 << 22, "max_seq_len": 128} | changed
    manager = KVCacheManager(CacheConfig(T, pools, **given))
    for pool in pools:
        manager.pages(pool.name).view("f8")[1:] = float("nan")  # a read of what nobody wrote would show
    return manager


def generate(name: str, ids: torch.Tensor, cache: Any = None) -> list[int]:
    return model(name).generate(ids, max_new_tokens=16, do_sample=False, cache=cache)[0].tolist()


@pytest.mark.parametrize("name", CLASSES)
def test_generate_gives_the_same_tokens_and_reuses_a_prefix(name: str) -> None:
    r = random.Random(5)
    common = [r.randrange(1, 97) for _ in range(22)]
    first, second = (torch.tensor([[*common, *tail]]) for tail in ([3, 5, 7], [11, 13]))
    with memory(name) as manager:
        with PagedCache(manager, model(name), "first", first) as one:
            assert one.num_reused_tokens == 0
            output = generate(name, first, one)
            assert output == generate(name, first)
            one.commit(output)
        with PagedCache(manager, model(name), "second", second) as two:
            assert two.num_reused_tokens == 22  # the last two of them are copied from within a block
            assert generate(name, second, two) == generate(name, second)
        manager.check()


@pytest.mark.parametrize("name", CLASSES)
def test_the_second_time_a_prompt_gives_the_same_tokens_again(name: str) -> None:
    ids = torch.arange(1, 30)[None]
    right = generate(name, ids)
    with memory(name) as manager:
        for number in range(3):
            with PagedCache(manager, model(name), number, ids) as paged:
                assert paged.num_reused_tokens == (0 if number == 0 else 28)
                assert generate(name, ids, paged) == right
        manager.check()


@pytest.mark.parametrize("name", CLASSES)
def test_generated_tokens_are_reused_by_the_next_turn(name: str) -> None:
    ids = torch.arange(1, 22)[None]
    with memory(name) as manager:
        with PagedCache(manager, model(name), "turn 1", ids) as paged:
            output = generate(name, ids, paged)
            paged.commit(torch.tensor([output]))
        longer = torch.tensor([[*output, 5, 6, 7]])
        with PagedCache(manager, model(name), "turn 2", longer) as paged:
            assert paged.num_reused_tokens >= len(output) - T
            assert generate(name, longer, paged) == generate(name, longer)


def test_commit_of_another_sequence_than_before_is_refused() -> None:
    ids = torch.arange(1, 22)[None]
    with memory("Llama") as manager, PagedCache(manager, model("Llama"), "one", ids) as paged:
        output = generate("Llama", ids, paged)
        paged.commit(output[:25])
        other = [*output[:23], (output[23] + 1) % 97, *output[24:]]
        with pytest.raises(LogicError, match="25 tokens that were committed before"):
            paged.commit(other)
        paged.commit(output[:24])  # less than before: nothing new
        paged.commit(output)
        assert manager.probe([*output, 0]) == (len(output) - 1) // T * T


@pytest.mark.parametrize("name", CLASSES)
def test_sequences_that_take_turns_and_prompts_in_pieces(name: str) -> None:
    """Forward passes of two caches alternate; each prompt is computed in pieces of 5."""
    prompts = [[r % 97 for r in range(3, 40, step)] for step in (1, 2)]
    with memory(name) as manager, torch.no_grad():
        caches = [PagedCache(manager, model(name), i, prompt) for i, prompt in enumerate(prompts)]
        tokens = [list(prompt) for prompt in prompts]
        right = [generate(name, torch.tensor([prompt])) for prompt in prompts]
        while any(len(mine) < len(whole) for mine, whole in zip(tokens, right, strict=True)):
            for i, cache in enumerate(caches):
                at = cache.get_seq_length()
                piece = torch.tensor([tokens[i][at : at + 5]])
                if piece.numel() and len(tokens[i]) < len(right[i]):
                    logits = model(name)(piece, cache=cache).logits
                    if cache.get_seq_length() == len(tokens[i]):
                        tokens[i].append(int(logits[0, -1].argmax()))
        assert tokens == right
        for cache in caches:
            cache.close()
        manager.check()


def test_pages_that_fall_out_of_the_window_are_given_back() -> None:
    name = "Mistral"
    ids = torch.arange(1, 10)[None]
    with memory(name) as manager:
        before = manager.stats().pools["window 12"]["device"]["free"]
        with PagedCache(manager, model(name), "long", ids) as paged:
            output = model(name).generate(ids, max_new_tokens=100, do_sample=False, cache=paged)
            used = before - manager.stats().pools["window 12"]["device"]["free"]
            assert used <= 5 + 3  # the window straddles five blocks; the prompt's three are cached
        assert output.tolist() == model(name).generate(ids, max_new_tokens=100, do_sample=False).tolist()


def test_scopes_share_nothing() -> None:
    ids = torch.arange(1, 30)[None]
    with memory("Llama") as manager:
        for salt in ("a", "b"):
            with PagedCache(manager, model("Llama"), 1, ids, scope=Scope(salt=salt)) as paged:
                assert paged.num_reused_tokens == 0
                generate("Llama", ids, paged)


def test_no_room_is_a_memory_error_and_gives_all_back() -> None:
    page = sum(pool.page_bytes for pool in pools_of(model("Llama"), T))
    ids = torch.arange(1, 30)[None]
    with memory("Llama", device_bytes=9 * page, max_seq_len=32) as manager:
        with (
            PagedCache(manager, model("Llama"), 1, ids[:, :9]),
            PagedCache(manager, model("Llama"), 2, ids[:, :8]) as two,
        ):
            generate("Llama", ids[:, :8], two)
            with pytest.raises(MemoryError, match="no room for"), PagedCache(manager, model("Llama"), 3, ids) as three:
                generate("Llama", ids, three)
        manager.check()
        assert manager.stats().pools["full"]["device"]["active"] == 0


def test_what_is_not_supported_says_so() -> None:
    ids = torch.arange(1, 10)[None]
    with memory("Llama") as manager, PagedCache(manager, model("Llama"), 1, ids) as paged:
        with pytest.raises(ValueError, match="a batch of 2 sequences"):
            model("Llama")(ids.repeat(2, 1), cache=paged)
        with pytest.raises(NotImplementedError, match="beam search"):
            paged.crop(-1)
        with pytest.raises(ValueError, match=r"shape \(2, 9\) is not one sequence"):
            PagedCache(manager, model("Llama"), 2, ids.repeat(2, 1))
        with pytest.raises(LogicError, match="does not begin with the prompt"):
            paged.commit([5, 6, 7])
    with KVCacheManager(CacheConfig(T, [PoolConfig("full", 64)], 1 << 12)) as manager:
        with pytest.raises(ConfigError, match="make it with pools_of"):
            PagedCache(manager, model("Llama"), 1, ids)
        assert not manager._caches


def test_a_forward_pass_that_is_broken_off_gives_its_pages_back() -> None:
    ids = torch.arange(1, 10)[None]
    with memory("Llama") as manager:
        paged = PagedCache(manager, model("Llama"), 1, ids)
        hook = model("Llama").model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), paged:
            generate("Llama", ids, paged)
        hook.remove()
        books = manager.stats().pools["full"]["device"]
        assert books["free"] == books["slots"]
        manager.check()


@pytest.mark.parametrize("name", CLASSES)
def test_a_prefix_comes_back_from_the_host(name: str) -> None:
    page = sum(pool.page_bytes for pool in pools_of(model(name), T))
    prompts = [torch.arange(1, 30)[None] + 30 * i for i in range(3)]
    sizes = {"device_bytes": 17 * page, "host_bytes": 200 * page, "max_seq_len": 48, "max_num_tokens": 48}
    # By default pools are split for 2,048 tokens, and a window would get next to nothing of the host.
    with memory(name, typical_step=BatchDesc([KVCacheDesc(29, 28)]), **sizes) as manager:
        for turn in range(2):
            for prompt in prompts:
                with PagedCache(manager, model(name), "r", prompt) as paged:
                    assert paged.num_reused_tokens == 28 * turn
                    assert generate(name, prompt, paged) == generate(name, prompt)
        assert manager.stats().onboarded > 0
        manager.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_of_real_models(dtype: torch.dtype) -> None:
    """What comes back from a page is bit for bit what went in, so even coarse arithmetic gives the same tokens."""
    config, of, more = CLASSES["Gemma2"]
    torch.manual_seed(3)
    gemma = of(config(**SIZES, **more)).to(dtype).eval()
    ids = torch.arange(1, 40)[None]
    right = gemma.generate(ids, max_new_tokens=30, do_sample=False).tolist()
    manager = KVCacheManager(CacheConfig(T, pools_of(gemma, T), 1 << 20, max_seq_len=128))
    with manager, PagedCache(manager, gemma, 1, ids) as paged:
        assert gemma.generate(ids, cache=paged, max_new_tokens=30, do_sample=False).tolist() == right

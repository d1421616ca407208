"""vLLM's side of `compare.py`: its real Scheduler, schedule() and update_from_output(), without an engine."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("PYTHONHASHSEED", "0")

import numpy as np
import torch
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from worker import replay, serve, steps

T, DECODES, WAITING, CONTEXT, CACHED, PROMPT, LIFE = 16, 256, 16, 1024, 512, 512, 1500
SLOTS = 1 << 17
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
    "num_attention_heads": 1, "num_hidden_layers": 1, "num_key_value_heads": 1, "vocab_size": 32000,
    "max_position_embeddings": 131072, "torch_dtype": "float16",
}  # fmt: skip

init_none_hash(sha256_cbor)
HASHER = get_request_block_hasher(T, sha256_cbor)


def build(slots: int, places: int, tokens: int) -> Scheduler:
    """A scheduler over one full-attention group; the pool has a null block besides."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        model = ModelConfig(model=folder, skip_tokenizer_init=True, dtype="float16", seed=0)
    config = VllmConfig(
        model_config=model,
        scheduler_config=SchedulerConfig(
            max_num_seqs=places, max_num_batched_tokens=tokens, max_model_len=model.max_model_len,
            enable_chunked_prefill=True, async_scheduling=False, is_encoder_decoder=False,
        ),
        cache_config=CacheConfig(block_size=T, enable_prefix_caching=True),
        device_config=DeviceConfig(device="cpu"),
    )  # fmt: skip
    config.cache_config.num_gpu_blocks = slots + 1
    spec = FullAttentionSpec(block_size=T, num_kv_heads=1, head_size=1, dtype=torch.float32)
    caches = KVCacheConfig(num_blocks=slots + 1, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["0"], spec)])
    return Scheduler(config, caches, StructuredOutputManager(config), block_size=T)


def request(number: int, tokens: np.ndarray, new: int) -> Request:
    """Its blocks are hashed here, as vLLM's frontend process does: no step pays for them."""
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    params.update_from_generation_config({}, 2)
    return Request(str(number), tokens.tolist(), params, None, block_hasher=HASHER)


def runner_output(scheduled: Any, scheduler: Scheduler) -> ModelRunnerOutput:
    """A token of each request that is due one."""
    ids = list(scheduled.num_scheduled_tokens)
    due = [scheduler.requests[i].num_computed_tokens >= scheduler.requests[i].num_tokens for i in ids]
    return ModelRunnerOutput(ids, {one: at for at, one in enumerate(ids)}, [[1] if one else [] for one in due])


class World:
    """The states of ../w4.py; see there."""

    def __init__(self, kind: str, waiting: int = WAITING) -> None:
        self._random = np.random.default_rng(0)
        self._ids = 0
        self._kind = kind
        self.scheduler = build(SLOTS, DECODES if kind == "A" else DECODES + WAITING, 1 << 14)
        self._prefixes = [self._tokens(CACHED) for _ in range(WAITING)] if kind == "C" else []
        for prefix in self._prefixes:
            self._add(prefix, 1)
        self._until(lambda: not self.scheduler.requests)
        decodes = [self._add(self._tokens(PROMPT + i % T), LIFE) for i in range(DECODES)]
        self._until(lambda: all(one.num_output_tokens for one in decodes))
        self._new: list[Request] = []
        self._held: list[Any] = []
        if kind != "C":
            for _ in range(waiting):
                self._last = self._add(self._tokens(CONTEXT), LIFE)

    def _tokens(self, length: int) -> np.ndarray:
        return self._random.integers(0, 32000, length, np.int32)

    def _add(self, tokens: np.ndarray, new: int) -> Request:
        one = request(self._ids, tokens, new)
        self._ids += 1
        self.scheduler.add_request(one)
        return one

    def _until(self, done: Any) -> None:
        while not done():
            scheduled = self.scheduler.schedule()
            self.scheduler.update_from_output(scheduled, runner_output(scheduled, self.scheduler))

    def prepare(self) -> None:
        if self._new:
            self.scheduler.finish_requests([one.request_id for one in self._new], RequestStatus.FINISHED_ABORTED)
        self._new = [
            self._add(np.concatenate([prefix, self._tokens(CONTEXT - CACHED)]), 64) for prefix in self._prefixes
        ]
        if self._kind == "B asked":
            self.scheduler.finish_requests([self._last.request_id], RequestStatus.FINISHED_ABORTED)
            self._last = self._add(np.array(self._last.prompt_token_ids), LIFE)
        if self._kind in ("B memory", "B asked"):  # as ../w4.py: half of what the head needs stays free
            pool = self.scheduler.kv_cache_manager.block_pool
            more = pool.get_num_free_blocks() - DECODES // T - CONTEXT // T // 2
            if more > 0:
                self._held += pool.get_new_blocks(more)
            elif more < 0:
                pool.free_blocks([self._held.pop() for _ in range(-more)])

    def step(self) -> tuple[int, int]:
        clock = time.thread_time_ns
        start = clock()
        scheduled = self.scheduler.schedule()
        middle = clock()
        output = runner_output(scheduled, self.scheduler)
        again = clock()
        self.scheduler.update_from_output(scheduled, output)
        end = clock()
        assert len(scheduled.num_scheduled_tokens) == DECODES + len(self._new)
        assert scheduled.total_num_scheduled_tokens == DECODES + len(self._new) * (CONTEXT - CACHED)
        return middle - start, end - again


def short(ratio: float, lengths: list[tuple[int, int]]) -> dict[str, Any]:
    """See ../memory_short.py. A request ends by its max_tokens: vLLM admits without a look at it."""
    need = sum(-(-(prompt + outputs) // T) for prompt, outputs in lengths)
    tokens = sum(prompt + outputs for prompt, outputs in lengths)
    scheduler = build(int(need * ratio), 256, 8192)
    rng = np.random.default_rng(0)
    for at, (prompt, outputs) in enumerate(lengths):
        scheduler.add_request(request(at, rng.integers(0, 32000, prompt, np.int32), outputs))
    number = executed = ends = 0
    while scheduler.requests:
        before = len(scheduler.requests)
        scheduled = scheduler.schedule()
        number += 1
        executed += scheduled.total_num_scheduled_tokens
        scheduler.update_from_output(scheduled, runner_output(scheduled, scheduler))
        ends += number * (before - len(scheduler.requests))
    extra = executed - (tokens - len(lengths))
    return {
        "steps": number, "extra_percent": round(100 * extra / tokens, 2), "mean_end": round(ends / len(lengths), 1)
    }  # fmt: skip


def blocks(number: int) -> dict[str, list[int]]:
    """W1, W1t, W1s and W2, ns per call of 64 blocks: BlockPool's calls, its hashes made before."""
    rng = np.random.default_rng(0)
    clock = time.thread_time_ns

    def fill(pool: BlockPool, one: Request, turns: int = 1) -> None:
        new: list[Any] = []
        for turn in range(turns):
            new += pool.get_new_blocks(64 // turns)
            pool.cache_full_blocks(one, new, 64 * turn // turns, 64 * (turn + 1) // turns, T, 0)
        pool.free_blocks(reversed(new))

    def fresh(at: int) -> Request:
        return request(at, rng.integers(0, 2**31 - 1, 64 * T), 1)

    def touch(pool: BlockPool, one: Request) -> list[Any]:
        found = []
        for key in one.block_hashes:
            hit = pool.get_cached_block(key, [0])
            assert hit
            found.append(hit[0])
        pool.touch(found)
        return found

    def claims(pool: BlockPool) -> list[int]:
        times = []
        for at in rng.integers(0, 1000, number).tolist():
            start = clock()
            pool.free_blocks(reversed(touch(pool, cached[at])))
            times.append(clock() - start)
        return times

    cached = [fresh(at) for at in range(1000)]
    times = {}
    for name, turns in (("W1t", 8), ("W1", 1)):
        pool = BlockPool(65_536 + 1, enable_caching=True, hash_block_size=T)
        for one in cached:
            fill(pool, one, turns)
        times[name] = claims(pool)
    held = [touch(pool, one) for one in cached]
    times["W1s"] = claims(pool)
    for found in held:
        pool.free_blocks(reversed(found))
    for at in range(65_536 // 64):
        fill(pool, fresh(at))
    times["W2"] = []
    for at in range(number):
        one = fresh(at)
        start = clock()
        fill(pool, one)
        times["W2"].append(clock() - start)
    return times


def w3(path: str, slots: int) -> dict[str, float]:
    """BlockPool's calls; the trace's ids are its hashes."""
    pool = BlockPool(slots + 1, enable_caching=True, hash_block_size=512)

    def prepare(ids: list[int]) -> Any:
        return SimpleNamespace(request_id="", block_hashes=[at.to_bytes(32, "little") for at in ids], lora_request=None)

    def claim(one: Any) -> tuple[list[Any], int]:
        found = []
        for key in one.block_hashes:
            hit = pool.get_cached_block(key, [0])
            if not hit:
                break
            found.append(hit[0])
        pool.touch(found)
        return found, len(found)

    def store(held: list[Any], one: Any) -> bool:
        reused, whole = len(held), len(one.block_hashes)
        if pool.get_num_free_blocks() < whole - reused:
            return False
        held += pool.get_new_blocks(whole - reused)
        pool.cache_full_blocks(one, held, reused, whole, 512, 0)
        return True

    return replay(path, slots, prepare, claim, store, lambda held: pool.free_blocks(reversed(held)))


def w4(number: int, warm: int, **case: Any) -> list[tuple[int, int]]:
    return steps(World(**case), number, warm)


if __name__ == "__main__":
    serve({"w4": w4, "short": short, "blocks": blocks, "w3": w3})

"""SGLang's side of `compare.py`: its real batches, admission and result loops, without an engine (states A and C).

On the CPU, pages of 16. A: filter_batch, check_decode_mem and prepare_for_decode of ScheduleBatch are "schedule",
process_batch_result_decode of the result processor is "update"; its streamer and its metrics are left out. C: besides,
a batch of the 16 contexts (SGLang computes contexts and decodes in different passes): SchedulePolicy, PrefillAdder and
prepare_for_extend are "schedule", process_batch_result_prefill is "update". B is not driven: after a head that found no
memory SGLang looks at nobody who waits until a request has left the batch.
"""

from __future__ import annotations

import json
import tempfile
import time
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sglang.srt import runtime_context
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.schedule_policy import PrefillAdder, SchedulePolicy
from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from worker import serve, steps

T, DECODES, WAITING, CONTEXT, CACHED, PROMPT, LIFE, SLOTS = 16, 256, 16, 1024, 512, 512, 1500, 1 << 17
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
    "num_attention_heads": 1, "num_hidden_layers": 1, "num_key_value_heads": 1, "vocab_size": 32000,
    "max_position_embeddings": 131072, "torch_dtype": "float16",
}  # fmt: skip


def configure() -> ModelConfig:
    """What its parts read from the process."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        args = ServerArgs(
            model_path=folder, skip_tokenizer_init=True, device="cpu", page_size=T, disable_overlap_schedule=True
        )
        runtime_context.publish(args, role="scheduler")
        return ModelConfig.from_server_args(args)


def pools(slots: int) -> tuple[ReqToTokenPool, PagedTokenToKVPoolAllocator, UnifiedRadixCache]:
    """Rows of requests, pages, and the tree over them, with the core in Rust. Keys and values: nobody touches them."""
    rows = ReqToTokenPool(DECODES + WAITING + 1, 4096, "cpu", False)
    pages = PagedTokenToKVPoolAllocator(slots * T, T, torch.float16, "cpu", SimpleNamespace(), need_sort=False)
    params = CacheInitParams(
        disable=False, req_to_token_pool=rows, token_to_kv_pool_allocator=pages, page_size=T,
        tree_components=(ComponentType.FULL,), tree_core_backend="rust",
    )  # fmt: skip
    return rows, pages, UnifiedRadixCache(params)


class World:
    """256 running decodes, and in C the contexts that start."""

    def __init__(self, kind: str) -> None:
        self._model = configure()
        self._rows, self._slots, self._tree = pools(SLOTS)
        self._processor = SchedulerBatchResultProcessor(
            is_generation=True, disaggregation_mode=DisaggregationMode.NULL, enable_overlap=False,
            enable_overlap_mlx=False, model_config=self._model, token_to_kv_pool_allocator=self._slots,
            tree_cache=self._tree, hisparse_coordinator=None, req_to_token_pool=self._rows,
            decode_offload_manager=None, metrics_collector=None,
            metrics_reporter=SimpleNamespace(
                num_generated_tokens=0, forward_ct_decode=0, report_decode_stats=lambda *a, **k: None
            ),
            draft_worker=None, model_worker=None, logprob_result_processor=None,
            output_streamer=SimpleNamespace(stream_output=lambda *a, **k: None),
            beam_coordinator=SimpleNamespace(commit_decode=lambda batch: set()), abort_request=None,
        )  # fmt: skip
        self._random = np.random.default_rng(0)
        self._ids = 0
        self._policy = SchedulePolicy("fcfs", self._tree, False, False, False)
        self._running = self._contexts([self._tokens(PROMPT + i % T) for i in range(DECODES)], LIFE)
        self._finish_contexts(self._running)
        self._result = GenerationBatchResult(logits_output=None, next_token_ids=torch.ones(DECODES, dtype=torch.int64))
        self._prefixes = [self._tokens(CACHED) for _ in range(WAITING)] if kind == "C" else []
        self._waiting: list[Req] = []
        self._new: ScheduleBatch | None = None
        if self._prefixes:
            self._new = self._contexts(self._prefixes, 64)
            self._finish_contexts(self._new)

    def _tokens(self, length: int) -> np.ndarray:
        return self._random.integers(0, 32000, length)

    def _req(self, tokens: np.ndarray, new: int) -> Req:
        params = SamplingParams(max_new_tokens=new, ignore_eos=True)
        params.normalize(None)
        self._ids += 1
        return Req(str(self._ids), "", array("q", tokens.tolist()), params, vocab_size=32000)

    def _contexts(self, prompts: list[np.ndarray], new: int) -> ScheduleBatch:
        return self._admit([self._req(tokens, new) for tokens in prompts], None)

    def _admit(self, waiting: list[Req], running: ScheduleBatch | None) -> ScheduleBatch:
        """A batch of all that wait, by the steps of its scheduler for a new batch of contexts."""
        self._policy.calc_priority(waiting, running)
        adder = PrefillAdder(T, self._tree, self._slots, running, 0.7, 1 << 20, None, max_running_requests=4096)
        for req in waiting:
            req.init_next_round_input(self._tree)
            adder.add_one_req(req, has_chunked_req=False, truncation_align_size=None)
        assert len(adder.can_run_list) == len(waiting)
        batch = ScheduleBatch.init_new(
            adder.can_run_list, self._rows, self._slots, self._tree, self._model, False, SpeculativeAlgorithm.NONE
        )
        batch.prepare_for_extend()
        return batch

    def _finish_contexts(self, batch: ScheduleBatch) -> None:
        result = GenerationBatchResult(
            logits_output=None, next_token_ids=torch.ones(len(batch.reqs), dtype=torch.int64)
        )
        self._processor.process_batch_result_prefill(batch, result)

    def prepare(self) -> None:
        """The contexts of the step before end, new ones arrive."""
        for req in self._new.reqs if self._new else ():
            release_kv_cache(req, self._tree, checkpoint=True)
        self._waiting = [self._req(np.concatenate([p, self._tokens(CONTEXT - CACHED)]), 64) for p in self._prefixes]

    def step(self) -> tuple[int, int]:
        running, clock = self._running, time.thread_time_ns
        start = clock()
        if self._waiting:
            self._new = self._admit(self._waiting, running)
        running.filter_batch()
        assert running.check_decode_mem()
        running.prepare_for_decode()
        middle = clock()
        if self._waiting:
            self._finish_contexts(self._new)
        self._processor.process_batch_result_decode(running, self._result)
        end = clock()
        assert running.batch_size() == DECODES
        assert not self._waiting or self._new.extend_num_tokens == WAITING * (CONTEXT - CACHED)
        return middle - start, end - middle


def w4(number: int, warm: int, kind: str, **more: Any) -> list[tuple[int, int]]:
    if kind not in ("A", "C") or more:
        raise NotImplementedError("only A and C are driven, and who waits is not looked at in a full batch")
    return steps(World(kind), number, warm)


def blocks(number: int) -> dict[str, list[int]]:
    """W1, W1t, W1s and W2, ns per call of 64 blocks: the tree's calls and the allocator's."""
    configure()
    rng = np.random.default_rng(0)
    clock = time.thread_time_ns

    def fresh() -> array[int]:
        return array("q", rng.integers(0, 2**31 - 1, 1024).tolist())

    def hold(tree: UnifiedRadixCache, one: RadixKey) -> tuple[Any, Any]:
        match = tree.match_prefix(MatchPrefixParams(key=one))
        assert match.device_prefix_len == 1024
        return match.last_device_node, tree.inc_lock_ref(match.last_device_node)

    def claims(tree: UnifiedRadixCache) -> list[int]:
        times = []
        for at in rng.integers(0, 1000, number).tolist():
            start = clock()
            node, held = hold(tree, keys[at])
            tree.dec_lock_ref(node, held.to_dec_params())
            times.append(clock() - start)
        return times

    tokens = [fresh() for _ in range(1000)]
    keys = [RadixKey(one) for one in tokens]
    times = {}
    for name, turns in (("W1t", 8), ("W1", 1)):
        _, pages, tree = pools(65_536)
        for one in tokens:
            value = pages.alloc(1024)
            for end in range(1024 // turns, 1025, 1024 // turns):
                tree.insert(InsertParams(key=RadixKey(one[:end]), value=value[:end]))
        times[name] = claims(tree)
    live = [hold(tree, key) for key in keys]
    times["W1s"] = claims(tree)
    for node, held in live:
        tree.dec_lock_ref(node, held.to_dec_params())
    while pages.available_size() >= 1024:
        tree.insert(InsertParams(key=RadixKey(fresh()), value=pages.alloc(1024)))
    times["W2"] = []
    for _ in range(number):
        one = RadixKey(fresh())
        start = clock()
        tree.evict(EvictParams(num_tokens=1024))
        tree.insert(InsertParams(key=one, value=pages.alloc(1024)))
        node, held = hold(tree, one)
        tree.dec_lock_ref(node, held.to_dec_params())
        times["W2"].append(clock() - start)
    return times


def short(ratio: float, lengths: list[tuple[int, int]]) -> None:
    raise NotImplementedError(f"its scheduler is not driven ({len(lengths)} requests, pool / need = {ratio})")


def w3(path: str, slots: int) -> None:
    raise NotImplementedError(f"the trace {path} is not driven ({slots} blocks)")


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve({"w4": w4, "short": short, "blocks": blocks, "w3": w3})

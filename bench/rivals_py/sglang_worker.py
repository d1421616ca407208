"""SGLang's side of `compare.py`: its real decode preparation and result loop (state A only), without an engine.

One batch of decodes on the CPU, pages of 16: filter_batch, check_decode_mem and prepare_for_decode of ScheduleBatch are
"schedule"; process_batch_result_decode of the result processor is "update". Its streamer and its metrics are left out.
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
from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from worker import serve, steps

T, DECODES, PROMPT, LIFE, SLOTS = 16, 256, 512, 1500, 1 << 17
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
    "num_attention_heads": 1, "num_hidden_layers": 1, "num_key_value_heads": 1, "vocab_size": 32000,
    "max_position_embeddings": 131072, "torch_dtype": "float16",
}  # fmt: skip


class World:
    """256 running decodes."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(MODEL))
            args = ServerArgs(
                model_path=folder, skip_tokenizer_init=True, device="cpu", page_size=T, disable_overlap_schedule=True
            )
            runtime_context.publish(args, role="scheduler")
            self._model = ModelConfig.from_server_args(args)
        self._rows = ReqToTokenPool(DECODES + 1, 4096, "cpu", False)
        buffers = SimpleNamespace()  # keys and values: nobody touches them
        self._slots = PagedTokenToKVPoolAllocator(SLOTS * T, T, torch.float16, "cpu", buffers, need_sort=False)
        self._tree = RadixCache(
            CacheInitParams(
                disable=False, req_to_token_pool=self._rows, token_to_kv_pool_allocator=self._slots, page_size=T
            )
        )
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
        rng = np.random.default_rng(0)
        reqs = [self._req(i, rng.integers(0, 32000, PROMPT + i % T)) for i in range(DECODES)]
        self._batch = ScheduleBatch.init_new(
            reqs, self._rows, self._slots, self._tree, self._model, False, SpeculativeAlgorithm.NONE
        )
        self._batch.prepare_for_extend()
        for req in reqs:
            req.output_ids.append(1)
        self._result = GenerationBatchResult(logits_output=None, next_token_ids=torch.ones(DECODES, dtype=torch.int64))

    def _req(self, number: int, tokens: np.ndarray) -> Req:
        params = SamplingParams(max_new_tokens=LIFE, ignore_eos=True)
        params.normalize(None)
        req = Req(str(number), "", array("q", tokens.tolist()), params, vocab_size=32000)
        req.init_next_round_input(self._tree)
        req.extend_end = len(tokens)  # what the adder of prefills would set
        return req

    def prepare(self) -> None:
        """Nothing has to be restored."""

    def step(self) -> tuple[int, int]:
        batch, clock = self._batch, time.thread_time_ns
        start = clock()
        batch.filter_batch()
        assert batch.check_decode_mem()
        batch.prepare_for_decode()
        middle = clock()
        self._processor.process_batch_result_decode(batch, self._result)
        end = clock()
        assert batch.batch_size() == DECODES
        return middle - start, end - middle


def w4(number: int, warm: int, kind: str, **more: Any) -> list[tuple[int, int]]:
    if kind != "A" or more:
        raise NotImplementedError("only state A is driven: who waits is not looked at in a full batch")
    return steps(World(), number, warm)


def short(ratio: float) -> None:
    raise NotImplementedError(f"its scheduler is not driven (pool / need = {ratio})")


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve({"w4": w4, "short": short})

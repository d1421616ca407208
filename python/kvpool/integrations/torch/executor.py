"""Runs the steps of a scheduler on a decoder: prefill chunks, decodes and drafts of many requests in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kvpool.cache import KVCache
from kvpool.errors import ConfigError
from kvpool.integrations.torch.attention import Rows, paged_attention
from kvpool.integrations.torch.decoder import Adapter, Decoder
from kvpool.integrations.torch.drafts import Drafter
from kvpool.integrations.torch.pages import page_tensor
from kvpool.manager import KVCacheManager
from kvpool.scheduler import Request, Step


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens that one request computes in a step. yields: how many of the last ones a token is sampled after."""

    request: Request
    start: int
    tokens: list[int]
    yields: int


@dataclass(frozen=True, slots=True)
class Batch:
    """A step as it is launched: block tables (request, block) by pool are as they were then."""

    work: list[Work]
    tables: Mapping[str, torch.Tensor]


class PagedExecutor:
    """An `Executor` on one manager, greedy. adapters: by lora_id. drafter: guesses for requests with draft_tokens.

    poison: fill what a step is about to own, and has not written, with NaN, so that a read of it shows in the tokens'
    logits (a test's tool).
    """

    def __init__(
        self,
        model: Decoder,
        manager: KVCacheManager,
        *,
        adapters: Mapping[int | str, Adapter] | None = None,
        drafter: Drafter | None = None,
        poison: bool = False,
    ) -> None:
        self.model, self.manager = model, manager
        self.adapters = dict(adapters or {})
        self.drafter = drafter
        self.poison = poison
        config = model.config
        self.pages = {pool.name: page_tensor(manager, pool.name, config.dtype) for pool in manager.config.pools}
        missing = {layer.pool for layer in config.layers} - set(self.pages)
        if missing:
            raise ConfigError(f"manager: it has no pool {min(missing)!r}; build its config from model.config.pools()")
        # Of each layer: its pool, and its place within the pages of that pool.
        self.places = [(layer.pool, config.layers_of(layer.pool).index(i)) for i, layer in enumerate(config.layers)]
        if poison:
            for pages in self.pages.values():
                pages[1:] = torch.nan

    def execute(self, step: Step) -> dict[int | str, list[int]]:
        """One forward pass: {request_id: tokens} of generations and last chunks."""
        return self.run(self.prepare(step))

    def prepare(self, step: Step) -> Batch:
        """What a step computes, and where; to be called when it is launched, between step_begin and step_end."""
        work = self.work(step)
        caches = [self.manager.cache(one.request.request_id) for one in work]
        tables = {name: torch.from_numpy(self.manager.block_tables(caches, name)) for name in self.pages}
        if self.poison:
            self._poison(work, caches, tables)
        return Batch(work, tables)

    def run(self, batch: Batch) -> dict[int | str, list[int]]:
        """The forward pass; asks the manager for nothing, so its requests may be cancelled meanwhile."""
        return self._results(batch.work, self._forward(batch.work, batch.tables))

    def work(self, step: Step) -> list[Work]:
        """What each request of a step computes."""
        work = []
        for request, start, num_tokens, is_last in step.context:
            tokens = [*map(int, request.tokens), *request.output_tokens]  # computed again after a recompute
            work.append(Work(request, start, tokens[start : start + num_tokens], int(is_last)))
        for request in step.generation:
            start = request.num_computed
            most = min(request.draft_tokens, len(request.tokens) + request.max_new_tokens - 2 - start)
            drafts = self.drafter(request, most)[:most] if self.drafter is not None and most > 0 else []
            work.append(Work(request, start, [request.output_tokens[-1], *drafts], 1 + len(drafts)))
        return work

    def extra(self, work: list[Work]) -> torch.Tensor | None:
        """Added to the embeddings of all tokens; None. For models that see more than token ids (then use a salt)."""
        return None

    def _forward(self, work: list[Work], tables: Mapping[str, torch.Tensor]) -> torch.Tensor:
        rows = Rows([one.start for one in work], [len(one.tokens) for one in work])

        def attention(i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            layer, (pool, place) = self.model.config.layers[i], self.places[i]
            pages = self.pages[pool][:, place]
            return paged_attention(q, k, v, pages, tables[pool], rows, layer.window, layer.sink_tokens)

        tokens = torch.tensor([token for one in work for token in one.tokens])
        return self.model.forward(tokens, rows.positions, attention, self._adapted(work), self.extra(work))

    def _adapted(self, work: list[Work]) -> list[tuple[slice, Adapter]]:
        """Runs of tokens with the same adapter; a step is sorted so that there are few."""
        runs: list[tuple[slice, Adapter]] = []
        at, last = 0, None
        for one in work:
            end = at + len(one.tokens)
            lora_id = one.request.lora_id
            if lora_id is not None:
                start = runs.pop()[0].start if lora_id == last else at
                runs.append((slice(start, end), self.adapters[lora_id]))
            at, last = end, lora_id
        return runs

    def _results(self, work: list[Work], hidden: torch.Tensor) -> dict[int | str, list[int]]:
        """Greedy tokens; of drafts as many as the model would have chosen itself, and the one behind them."""
        results = {}
        at = 0
        for one in work:
            at += len(one.tokens)
            if one.yields:
                logits = self.model.logits(hidden[at - one.yields : at])
                chosen = [int(token) for token in logits.argmax(-1)]
                drafts = one.tokens[len(one.tokens) - one.yields + 1 :]
                accepted = next((i for i, draft in enumerate(drafts) if draft != chosen[i]), len(drafts))
                results[one.request.request_id] = chosen[: accepted + 1]
                self.accept(one, logits[: accepted + 1])
        return results

    def accept(self, work: Work, logits: torch.Tensor) -> None:
        """Called with the logits (token, vocab_size) of the tokens that a request gets."""

    def _poison(self, work: list[Work], caches: list[KVCache], tables: Mapping[str, torch.Tensor]) -> None:
        """Nothing behind the history is readable: new pages, the rest of a copied one, rejected drafts."""
        t = self.manager.config.tokens_per_block
        for name, pages in self.pages.items():
            for row, (one, cache) in enumerate(zip(work, caches, strict=True)):
                first, rest = divmod(one.start, t)
                for block in range(first, -(-cache.capacity // t)):
                    slot = int(tables[name][row, block])
                    if slot:
                        pages[slot, :, :, rest if block == first else 0 :] = torch.nan

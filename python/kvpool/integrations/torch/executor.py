"""Runs the steps of a scheduler on a decoder: prefill chunks, decodes and drafts of many requests in one pass.

A draft model has pages of its own in a second manager, and computes every token that the target computes:

    position        start    start + 1   ...   start + k
    target reads    last     draft 1     ...   draft k       and says what follows each
    draft model     last     draft 1     ...   draft k       the last only for its keys and values: it may be accepted
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from kvpool.errors import ConfigError
from kvpool.integrations.torch.attention import Rows, paged_attention
from kvpool.integrations.torch.decoder import Adapter, Decoder
from kvpool.integrations.torch.drafts import Drafter
from kvpool.integrations.torch.pages import page_tensor
from kvpool.manager import KVCacheManager
from kvpool.scheduler import Request, Step

Tables = Mapping[str, torch.Tensor]
"""By pool: slots (request, block)."""


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens that one request computes in a step, and whether one is sampled behind them.

    drafts: how many more there is room for, to be guessed and verified.
    """

    request: Request
    start: int
    tokens: list[int]
    samples: bool
    drafts: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """A step as it is launched: block tables are as they were then. draft_tables: of a draft model, if there is one."""

    work: list[Work]
    tables: Tables
    draft_tables: Tables = field(default_factory=dict)


class PagedModel:
    """A decoder whose keys and values are in a manager's pages. adapters: by lora_id.

    extra: of a step's work, what is added to the embeddings (token, hidden) of its tokens, None for nothing: for models
    that see more than token ids (such requests need a salt). poison: fill what a step is about to own, and has not
    written, with NaN, so that a read of it shows in the logits (a test's tool). ConfigError: the manager lacks a pool.
    """

    def __init__(
        self,
        model: Decoder,
        manager: KVCacheManager,
        *,
        adapters: Mapping[int | str, Adapter] | None = None,
        extra: Callable[[Sequence[Work]], torch.Tensor | None] | None = None,
        poison: bool = False,
    ) -> None:
        self.model, self.manager, self.adapters = model, manager, dict(adapters or {})
        self.extra, self.poison = extra, poison
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

    def tables(self, work: Sequence[Work]) -> Tables:
        """Block tables of the requests of a step."""
        caches = [self.manager.cache(one.request.request_id) for one in work]
        tables = {name: torch.from_numpy(self.manager.block_tables(caches, name)) for name in self.pages}
        if self.poison:
            self._poison(work, [cache.capacity for cache in caches], tables)
        return tables

    def hidden(self, work: Sequence[Work], tables: Tables) -> list[torch.Tensor]:
        """Of each request the final hidden states (token, hidden) of its tokens, whose keys and values are written."""
        rows = Rows([one.start for one in work], [len(one.tokens) for one in work])

        def attention(i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            layer, (pool, place) = self.model.config.layers[i], self.places[i]
            pages = self.pages[pool][:, place]
            return paged_attention(q, k, v, pages, tables[pool], rows, layer.window, layer.sink_tokens)

        tokens = torch.tensor([token for one in work for token in one.tokens])
        extra = None if self.extra is None else self.extra(work)
        hidden = self.model.forward(tokens, rows.positions, attention, self._adapted(work), extra)
        return list(hidden.split(list(rows.lengths)))

    def _adapted(self, work: Sequence[Work]) -> list[tuple[slice, Adapter]]:
        """Runs of tokens with the same adapter; a step is sorted so that there are few."""
        runs: list[tuple[slice, Adapter]] = []
        at, last = 0, None
        for one in work:
            end = at + len(one.tokens)
            lora_id = one.request.lora_id
            if lora_id in self.adapters:
                start = runs.pop()[0].start if lora_id == last else at
                runs.append((slice(start, end), self.adapters[lora_id]))
            at, last = end, lora_id
        return runs

    def _poison(self, work: Sequence[Work], capacities: Sequence[int], tables: Tables) -> None:
        """Nothing behind the history is readable: new pages, the rest of a copied one, rejected drafts."""
        t = self.manager.config.tokens_per_block
        for name, pages in self.pages.items():
            for row, (one, capacity) in enumerate(zip(work, capacities, strict=True)):
                first, rest = divmod(one.start, t)
                for block in range(first, -(-capacity // t)):
                    slot = int(tables[name][row, block])
                    if slot:
                        pages[slot, :, :, rest if block == first else 0 :] = torch.nan


class PagedExecutor:
    """An `Executor`, greedy. Requests with draft_tokens are guessed at by `draft`, a model with pages in the
    scheduler's draft_manager, or else by `drafter`; neither changes a token that comes out.
    """

    def __init__(self, target: PagedModel, *, drafter: Drafter | None = None, draft: PagedModel | None = None) -> None:
        self.target, self.drafter, self.draft = target, drafter, draft

    def execute(self, step: Step) -> dict[int | str, list[int]]:
        """One forward pass: {request_id: tokens} of generations and last chunks."""
        return self.run(self.prepare(step))

    def prepare(self, step: Step) -> Batch:
        """What a step computes, and where; to be called when it is launched, between step_begin and step_end."""
        work = []
        for request, start, num_tokens, is_last in step.context:
            # Output too: after a recompute it is computed again.
            work.append(Work(request, start, request.token_slice(start, start + num_tokens).tolist(), is_last))
        for request, num_tokens in zip(step.generation, step.generation_tokens, strict=True):
            work.append(Work(request, request.num_computed, request.output_tokens[-1:], True, num_tokens - 1))
        return Batch(work, self.target.tables(work), self.draft.tables(work) if self.draft else {})

    def run(self, batch: Batch) -> dict[int | str, list[int]]:
        """The forward pass; asks the manager for nothing, so its requests may be cancelled meanwhile."""
        guesses = self._guesses(batch)
        work = [replace(one, tokens=one.tokens + drafts) for one, drafts in zip(batch.work, guesses, strict=True)]
        results = {}
        states = self.target.hidden(work, batch.tables)
        for one, drafts, hidden in zip(work, guesses, states, strict=True):
            if one.samples:
                logits = self.target.model.logits(hidden[-1 - len(drafts) :])
                chosen = [int(token) for token in logits.argmax(-1)]
                accepted = next((i for i, draft in enumerate(drafts) if draft != chosen[i]), len(drafts))
                results[one.request.request_id] = chosen[: accepted + 1]
                self.accept(one.request, logits[: accepted + 1], len(drafts))
        return results

    def accept(self, request: Request, logits: torch.Tensor, num_drafts: int) -> None:
        """Called with the logits (token, vocab_size) of the tokens that a request gets."""

    def _guesses(self, batch: Batch) -> list[list[int]]:
        """Of each request the drafts that are to be verified."""
        if self.draft is not None:
            return self._drafted(self.draft, batch)
        if self.drafter is None:
            return [[] for _ in batch.work]
        return [self.drafter(one.request, one.drafts)[: one.drafts] if one.drafts else [] for one in batch.work]

    def _drafted(self, draft: PagedModel, batch: Batch) -> list[list[int]]:
        """Drafts of the draft model, which computes all that the target will."""
        guesses: list[list[int]] = [[] for _ in batch.work]
        work = dict(enumerate(batch.work))
        while work:
            tables = {name: table[list(work)] for name, table in batch.draft_tables.items()}
            for i, hidden in zip(list(work), draft.hidden(list(work.values()), tables), strict=True):
                one = work.pop(i)
                if len(guesses[i]) < one.drafts:
                    guesses[i].append(int(draft.model.logits(hidden[-1:]).argmax()))
                    work[i] = replace(one, start=one.start + len(one.tokens), tokens=guesses[i][-1:])
        return guesses

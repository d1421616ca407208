"""Random request mixes on a real model: what runs on kvpool's pages against the same weights without any pages.

`run` drives an engine through one and raises AssertionError at the first token, or logit, that differs. Pools are so
small that requests wait, give way, move to the host and are computed again; everything a request gets is NaN before it
is written. Counts say what has happened.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch

from kvpool import (
    CacheConfig,
    Engine,
    KVCache,
    KVCacheManager,
    PoolPlan,
    Request,
    RequestTooLargeError,
    Scheduler,
    SchedulerConfig,
    Scope,
    Step,
    peak_slots,
)
from kvpool.integrations.torch import (
    Adapter,
    Decoder,
    DecoderConfig,
    DecoderLayer,
    NGramDrafter,
    PagedExecutor,
    PagedModel,
)
from kvpool.integrations.torch.executor import Batch, Work
from kvpool.mover import CpuMover

VOCAB, HIDDEN = 61, 24
LAYERS = {
    "full": (DecoderLayer(), DecoderLayer()),
    "sliding beside full": (DecoderLayer("window", 6, 3), DecoderLayer()),
    "two windows": (DecoderLayer("near", 4), DecoderLayer("far", 9, 1)),
    "more sinks than window": (DecoderLayer("window", 2, 7), DecoderLayer("window", 2, 7)),
    "three pools": (DecoderLayer("self", 1), DecoderLayer(), DecoderLayer("far", 11)),
}
ADAPTERS: dict[int | str, int] = {1: 101, "two": 102}  # lora_id: seed
SALTS = ("a", b"b")
DRAFTS = 3

ORDERS = ("compute-last", "copies-eager", "copies-last", "random")
WANTED = (
    "moves in threads",
    "reused", "partial copies", "chunks", "mixed steps", "evicted", "dropped", "offloaded", "onboarded", "suspended",
    "resumed", "recomputed", "recomputed after output", "adapter 1", "adapter two", "adapters mixed", "salt a",
    "salt b", "drafts accepted", "drafts rejected", "drafts cut", "stale blocks", "turns", "stop", "length",
    "cancelled", "drafts of a model", "epochs", "overlapped", "faults", "failed moves", "lost",
    *(f"moves {order}" for order in ORDERS),
    "cancelled in flight",
)  # fmt: skip


@cache
def model(variant: str, epoch: int) -> Decoder:
    """Tiny, float64: logits of both ways agree to rounding. Other weights in each epoch."""
    sizes = {"vocab_size": VOCAB, "hidden": HIDDEN, "heads": 4, "kv_heads": 2, "head_dim": 6, "mlp": 40}
    return Decoder(DecoderConfig(LAYERS[variant], dtype=torch.float64, **sizes), seed=7 + epoch)


@cache
def adapter(variant: str, lora_id: int | str) -> Adapter:
    return model(variant, 0).adapter(ADAPTERS[lora_id])


@cache
def content(salt: str | bytes | None) -> torch.Tensor | None:
    """What token ids do not tell: a request with a salt has it added to all embeddings."""
    if salt is None:
        return None
    return torch.randn(HIDDEN, generator=torch.Generator().manual_seed(SALTS.index(salt)), dtype=torch.float64)


def salt_of(request: Request) -> str | bytes | None:
    return None if request.scope is None else request.scope.salt


def right_logits(variant: str, epoch: int, request: Request, tokens: list[int]) -> torch.Tensor:
    """From scratch, without pages."""
    lora = None if request.lora_id is None else adapter(variant, request.lora_id)
    return model(variant, epoch).plain(tokens, lora, content(salt_of(request)))


@dataclass
class Oracle:
    """Drafts what the model would say, now and then with a mistake; else looks it up in the request's own tokens."""

    mix: Mix

    def __call__(self, request: Request, most: int) -> list[int]:
        r = self.mix.random
        if r.random() < 0.3:
            return NGramDrafter(1)(request, most)
        tokens = [*request.tokens, *request.output_tokens]
        drafts: list[int] = []
        for _ in range(most):
            right = int(self.mix.right_logits(request, [*tokens, *drafts])[-1].argmax())
            drafts.append(right if r.random() < 0.8 else r.randrange(VOCAB))
        return drafts


class Watched(PagedExecutor):
    """Counts what it is asked to do and keeps the logits of what it answers."""

    def __init__(self, mix: Mix, managers: list[KVCacheManager]) -> None:
        target, *draft = (self.paged(mix.variant, manager) for manager in managers)
        super().__init__(target, drafter=Oracle(mix), draft=draft[0] if draft else None)
        self.counts = mix.counts
        self.managers = managers
        self.logits: dict[int | str, dict[int, torch.Tensor]] = {}  # by place in the output
        self.gone: dict[int | str, str] = {}  # gave way, and how
        self.begun: set[int | str] = set()

    def paged(self, variant: str, manager: KVCacheManager) -> PagedModel:
        if any(manager.plan.host_slots.values()):
            for pool in manager.config.pools:
                manager.pages(pool.name, "host").view("f8")[:] = float("nan")
        adapters = {lora_id: adapter(variant, lora_id) for lora_id in ADAPTERS}
        return PagedModel(model(variant, 0), manager, adapters=adapters, extra=self.extra, poison=True)

    @staticmethod
    def extra(work: Sequence[Work]) -> torch.Tensor | None:
        parts = [content(salt_of(one.request)) for one in work for _ in one.tokens]
        return torch.stack([torch.zeros(HIDDEN, dtype=torch.float64) if part is None else part for part in parts])

    def accept(self, request: Request, logits: torch.Tensor, num_drafts: int) -> None:
        if any(request.request_id in manager.lost() for manager in self.managers):
            return  # since its step was launched: update will not take these tokens
        self.logits.setdefault(request.request_id, {}).update(enumerate(logits, len(request.output_tokens)))
        drafts = num_drafts
        accepted = len(logits) - 1
        if self.draft is not None:  # the target's own weights: a wrong byte in its pages is a draft that is refused
            assert accepted == drafts, f"{request}: the draft model disagrees with itself"
            self.counts["drafts of a model"] += drafts
        self.counts["drafts accepted"] += accepted == drafts > 0
        self.counts["drafts rejected"] += drafts > accepted == 0
        self.counts["drafts cut"] += drafts > accepted > 0

    def prepare(self, step: Step) -> Batch:
        self.gone.update({request.request_id: "suspended" for request in step.suspended})
        self.gone.update({request.request_id: "recomputed" for request in step.recompute})
        t = self.target.manager.config.tokens_per_block
        for request, start, _, is_last in step.context:
            first = request.request_id not in self.begun or self.gone.get(request.request_id) == "recomputed"
            self.counts["partial copies"] += first and start % t > 0
            self.counts["chunks"] += not is_last
            self.counts["recomputed after output"] += first and bool(request.output_tokens)
        for request in step.requests:
            self.counts["resumed"] += self.gone.pop(request.request_id, "") == "suspended"
            self.begun.add(request.request_id)
            if request.lora_id is not None:
                self.counts[f"adapter {request.lora_id}"] += 1
            salt = salt_of(request)
            if salt is not None:
                self.counts[f"salt {salt if isinstance(salt, str) else salt.decode()}"] += 1
            for pool in self.target.manager.config.pools:
                self.counts["stale blocks"] += 0 in self.target.manager.cache(request.request_id).block_table(pool.name)
        self.counts["mixed steps"] += bool(step.context and step.generation)
        self.counts["adapters mixed"] += len({request.lora_id for request in step.requests}) > 1
        return super().prepare(step)


class Mix:
    """Everything that a seed decides."""

    def __init__(self, seed: int, counts: Counter[str]) -> None:
        self.random = r = random.Random(seed)
        self.counts = counts
        self.variant = r.choice(list(LAYERS))
        self.epoch = 0
        self.t = r.choice([1, 2, 3, 4, 5])
        families = [[r.randrange(VOCAB) for _ in range(20)] for _ in range(2)]
        lora_ids, salts = r.sample([None, *ADAPTERS], 2), r.sample([None, *SALTS], 2)
        self.pending = []
        for number in range(r.randint(3, 6)):
            tail = [r.randrange(VOCAB) for _ in range(r.choice([0, 1, 3]))]
            tokens = families[r.random() < 0.3][: r.randint(3, 18)] + tail
            self.pending.append((r.choice([0, 0, r.randint(1, 12)]), self.request(number, tokens, lora_ids, salts)))
        self.pending.sort(key=lambda one: one[0])
        self.all = {request.request_id: request for _, request in self.pending}
        chunk = r.choice([None, 1, 3, self.t, 5])
        self.config = SchedulerConfig(
            r.choice([2, 3, 6]), r.choice([32, 48, max(chunk or 32, 8)]), chunk, max_started=r.choice([None, 6])
        )
        self.movers: list[CpuMover] = []
        self.managers = [self.memory(chunk) for _ in range(2 if r.random() < 0.25 else 1)]  # the second a draft model's
        self.executor = Watched(self, self.managers)
        self.engine = Engine(Scheduler(self.managers[0], self.config, *self.managers[1:]), self.executor)
        self.drop = self.engine.scheduler.drop_lost
        self.engine.scheduler.drop_lost = self.drop_lost  # type: ignore[method-assign]
        self.depth = r.choice([1, 1, 2, 3])  # steps in flight
        self.flying: deque[tuple[Step, list[tuple[KVCacheManager, list[KVCache]]], Batch | None]] = deque()

    def request(self, number: int, tokens: list[int], lora_ids: list[int | str | None], salts: list[object]) -> Request:
        r = self.random
        lora_id = r.choice(lora_ids)
        salt = r.choice(salts)
        return Request(
            number, tokens, r.randint(1, 8), lora_id=lora_id, scope=Scope(lora_id, salt),
            draft_tokens=r.choice([0, 0, DRAFTS]), stop_token_ids=range(5) if r.random() < 0.2 else (),
        )  # fmt: skip

    def memory(self, chunk: int | None) -> KVCacheManager:
        """Room for the largest request alone and a little more; no tier below, a tiny one, or a large one."""
        r = self.random
        pools = model(self.variant, 0).config.pools(self.t)
        config = CacheConfig(
            self.t, pools, 1 << 30, max_seq_len=40, draft_tokens=DRAFTS, hash_seed=1,
            decode_reservation=r.choice(["sliding", "none"]), offload_min_priority=r.choice([0, 30]),
        )  # fmt: skip
        peaks = [peak_slots(config, request, chunk) for request in self.all.values()]
        device = {pool.name: max(peak[pool.name] for peak in peaks) + r.randint(0, 5) for pool in pools}
        tier = r.choice(["none", "tiny", "large"])
        host = {name: {"none": 0, "tiny": r.randint(1, 3), "large": 2 * n}[tier] for name, n in device.items()}
        plan = PoolPlan(dict.fromkeys(device, 1), device, host, 1 << 30)
        return self.faulty(config, plan, r.choice([0.0, 0.0, 0.1]))

    def faulty(self, config: CacheConfig, plan: PoolPlan, share: float) -> KVCacheManager:
        """A manager whose moves are delayed or reordered, and of which a share fails; the checker of orders runs."""
        order = self.random.choice([None, *ORDERS])
        seed = self.random.randrange(1 << 30)
        make = partial(CpuMover, check=True, faults=True, simulate=None if order is None else (order, seed))
        movers: list[CpuMover] = []
        manager = KVCacheManager(config, plan=plan, mover=lambda pools: movers.append(make(pools)) or movers[0])
        movers[0].fail_at_random(share, seed)
        self.movers += movers
        self.counts[f"moves {order or 'in threads'}"] += 1
        return manager

    def go(self) -> None:
        """Until all have ended, and their tokens are right."""
        passes = 0
        ended: list[Request] = []
        while self.pending or self.engine.scheduler.has_work or self.flying:
            if passes and not (self.engine.scheduler.has_work or self.flying) and self.random.random() < 0.1:
                self.take(self.engine.scheduler.update(Step(), {}), ended)  # cancelled since the last update
                self.change_weights()
            while self.pending and self.pending[0][0] <= passes:
                self.submit(self.turn(self.pending.pop(0)[1], ended))
            if self.random.random() < 0.02:
                victim = self.random.choice(list(self.all))
                in_flight = any(victim in {r.request_id for r in step.requests} for step, _, _ in self.flying)
                if self.engine.cancel(victim):
                    self.counts["cancelled"] += 1
                    self.counts["cancelled in flight"] += in_flight
            self.take(self.step(), ended)
            for manager in self.managers:
                manager.check()
            passes += 1
        self.take(self.engine.scheduler.update(Step(), {}), ended)
        assert not any(mover.findings() for mover in self.movers)
        mine = self.engine.scheduler.stats
        self.counts.update(suspended=mine.suspended, recomputed=mine.recomputed)
        for manager in self.managers:
            stats = manager.stats()
            self.counts["failed moves"] += stats.failed_moves
            for name in ("reused_tokens", "evicted", "dropped", "offloaded", "onboarded"):
                self.counts[name.partition("_")[0]] += getattr(stats, name)
            for tiers in stats.pools.values():
                books = tiers["device"]
                assert books["free"] + books["cached"] == books["slots"], f"a page is lost: {books}"
            manager.close()

    def take(self, done: list[Request], ended: list[Request]) -> None:
        """Requests that have ended."""
        for request in done:
            ended.append(request)
            self.verify(request)

    def change_weights(self) -> None:
        """While nobody runs. What is cached of the old ones must not be reused."""
        self.epoch += 1
        for manager in self.managers:
            manager.set_epoch(self.epoch)
        for one in (self.executor.target, self.executor.draft):
            if one is not None:
                one.model = model(self.variant, self.epoch)
        self.counts["epochs"] += 1

    def right_logits(self, request: Request, tokens: list[int]) -> torch.Tensor:
        """From scratch, without pages, with the weights of now."""
        return right_logits(self.variant, self.epoch, request, tokens)

    def step(self) -> list[Request]:
        """The engine's step; or launch one while others are in flight, which compute, and write, when they land."""
        scheduler = self.engine.scheduler
        if self.depth == 1:
            return self.engine.step() if scheduler.has_work else []
        step = scheduler.schedule()
        if step:
            caches = [(manager, [manager.cache(r.request_id) for r in step.requests]) for manager in self.managers]
            for manager, own in caches:
                manager.step_begin(own)
            scheduler.drop_lost(step)
            self.flying.append((step, caches, self.executor.prepare(step) if step else None))
            self.counts["overlapped"] += len(self.flying) > 1
        if not self.flying:
            return scheduler.update(step, {})
        if step and len(self.flying) < self.depth:
            return []
        step, caches, batch = self.flying.popleft()
        outputs = {} if batch is None else self.executor.run(batch)
        for manager, own in caches:
            manager.step_end(own)
        if self.random.random() < 0.01:
            self.counts["faults"] += 1
            return scheduler.fail(step, RuntimeError("planted"))
        return scheduler.update(step, outputs)

    def drop_lost(self, step: Step) -> list[Request]:
        """As the scheduler's, counted: also of a step of which nothing is left."""
        gone = self.drop(step)
        self.counts["lost"] += len(gone)
        self.executor.gone.update({request.request_id: "recomputed" for request in gone})
        return gone

    def submit(self, request: Request) -> None:
        try:
            self.engine.submit(request)
        except RequestTooLargeError:
            self.counts["refused"] += 1

    def turn(self, request: Request, ended: list[Request]) -> Request:
        """Now and then a request goes on where another one has ended."""
        if not ended or self.random.random() < 0.5:
            return request
        first = self.random.choice(ended)
        tokens = [*first.tokens, *first.output_tokens, self.random.randrange(VOCAB)]
        if len(tokens) > 24:
            return request
        self.counts["turns"] += 1
        self.all[request.request_id] = longer = Request(
            request.request_id, tokens, 3, lora_id=first.lora_id, scope=first.scope, draft_tokens=first.draft_tokens
        )
        return longer

    def verify(self, request: Request) -> None:
        """Each token is the one that the whole sequence before it gives, and its logits are those to 1e-9."""
        assert request.error is None or "planted" in str(request.error), f"{request}: {request.error}"
        self.counts[str(request.finish_reason)] += request.finish_reason in ("stop", "length")
        n, output = len(request.tokens), request.output_tokens
        if not output:
            assert request.finish_reason in ("cancelled", "error")
            return
        right = self.right_logits(request, [*request.tokens, *output[:-1]])[n - 1 :]
        assert output == [int(token) for token in right.argmax(-1)], f"{request}: wrong tokens"
        seen = torch.stack([self.executor.logits[request.request_id][i] for i in range(len(output))])
        assert bool(seen.isfinite().all()), f"{request}: read what nobody has written"
        worst = float((seen - right).abs().max())
        assert worst < 1e-9, f"{request}: logits differ by {worst}"


def run(seed: int, counts: Counter[str]) -> Mix:
    """Drive one mix to its end; a failure names the seed."""
    try:
        mix = Mix(seed, counts)
        mix.go()
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise
    return mix

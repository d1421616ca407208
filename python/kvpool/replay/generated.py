"""A seeded workload: conversations that share system prompts and grow turn by turn.

Each conversation picks a system prompt by a Zipf law; each request is a turn of one open conversation,
again picked by a Zipf law over the open ones, the most recent first. A turn's prompt is all that the
conversation said so far, the last answer included, and a new question. So prompts share heads across
conversations and grow within one, as chat traffic does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvpool.replay.traces import TraceRequest


@dataclass(frozen=True, slots=True)
class Workload:
    """Parameters of the generator. Lengths are in blocks, ranges include both ends."""

    requests: int = 3000
    system_prompts: int = 16
    system_blocks: tuple[int, int] = (1, 12)
    question_blocks: tuple[int, int] = (1, 8)
    answer_blocks: tuple[int, int] = (0, 3)
    mean_turns: float = 5.0
    open_conversations: int = 200
    zipf_exponent: float = 1.1
    mean_gap_ms: float = 300.0


def generate(workload: Workload, seed: int, tokens_per_block: int) -> list[TraceRequest]:
    """The workload's requests; equal arguments give equal requests."""
    rng = np.random.default_rng(seed)
    next_id = 0

    def fresh(blocks: tuple[int, int]) -> list[int]:
        nonlocal next_id
        first = next_id
        next_id += int(rng.integers(blocks[0], blocks[1] + 1))
        return list(range(first, next_id))

    systems = [fresh(workload.system_blocks) for _ in range(workload.system_prompts)]
    system_weights = _zipf(workload.system_prompts, workload.zipf_exponent)
    pick_weights = _zipf(workload.open_conversations, workload.zipf_exponent)
    conversations: list[list[int]] = []  # the most recently used last
    requests: list[TraceRequest] = []
    clock_ms = 0.0
    while len(requests) < workload.requests:
        rank = int(np.searchsorted(pick_weights, rng.random()))
        # A rank beyond the open ones opens a new one; so does, once per conversation on average, chance.
        if rank >= len(conversations) or rng.random() < 1.0 / workload.mean_turns:
            talk = list(systems[int(np.searchsorted(system_weights, rng.random()))])
            del conversations[: max(0, len(conversations) + 1 - workload.open_conversations)]
        else:
            talk = conversations.pop(-1 - rank)
        prompt = [*talk, *fresh(workload.question_blocks)]
        answer = fresh(workload.answer_blocks)
        conversations.append(prompt + answer)
        clock_ms += float(rng.exponential(workload.mean_gap_ms))
        requests.append(
            TraceRequest(
                line=len(requests) + 1,
                timestamp_ms=clock_ms,
                input_length=len(prompt) * tokens_per_block,
                output_length=len(answer) * tokens_per_block + 1,
                hash_ids=tuple(prompt),
            )
        )
    return requests


def _zipf(n: int, exponent: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Cumulated probabilities of ranks 0..n-1, weight (rank + 1) ** -exponent."""
    weights = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    total = np.cumsum(weights)
    total /= total[-1]
    return total

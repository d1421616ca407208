"""Guesses of the next tokens, for the executor to verify."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvpool.scheduler import Request


class Drafter(Protocol):
    """Guesses what comes next."""

    def __call__(self, request: Request, most: int) -> list[int]:
        """Up to `most` tokens behind the request's prompt and output."""
        ...


@dataclass(frozen=True, slots=True)
class NGramDrafter:
    """What followed the last earlier occurrence of the last `n` tokens (prompt lookup decoding)."""

    n: int = 2

    def __call__(self, request: Request, most: int) -> list[int]:
        """See `Drafter`."""
        tokens = [*map(int, request.tokens), *request.output_tokens]
        last = tokens[-self.n :]
        for start in range(len(tokens) - self.n - 1, -1, -1):
            if tokens[start : start + self.n] == last:
                return tokens[start + self.n : start + self.n + most]
        return []

"""Exceptions. Pressure is never one of them: calls that lack room return False or None."""


class KVPoolError(Exception):
    """Base of all errors that kvpool raises on purpose."""


class ConfigError(KVPoolError, ValueError):
    """A configuration that cannot work; names the field, its value and the remedy."""


class LogicError(KVPoolError):
    """A call that the state of its object does not allow: closed, not active, duplicate id."""


class InvariantError(KVPoolError):
    """`check()` found an equation of the books that does not hold."""


class StalledError(KVPoolError):
    """Nothing can ever run again; says who waits for what."""


class RequestTooLargeError(KVPoolError):
    """A request that would not fit even alone: `pool` (or the limit's name) has `available`, it needs `needed`."""

    def __init__(self, message: str, *, pool: str = "", needed: int = 0, available: int = 0) -> None:
        super().__init__(message)
        self.pool, self.needed, self.available = pool, needed, available

"""Reference model of the tree: windows, matching, the ends of claims, expiries. By scanning."""

from __future__ import annotations

import itertools

from model_memory import DEFAULT_PRIORITY, FOREVER, Memory, Node, Page, Retain, Use


class Tree(Memory):
    """pools: (device slots, host slots, window or None, sink_tokens) each."""

    def __init__(
        self,
        t: int,
        pools: list[tuple[int, int, int | None, int]],
        max_blocks: int,
        least: int,
        partial_reuse: bool,
        max_seq_len: int | None,
    ) -> None:
        super().__init__(t, pools, max_blocks, least)
        self.partial_reuse, self.max_seq_len = partial_reuse, max_seq_len
        self.seq = itertools.count()
        self.stamp = 0
        self.now = 0.0
        self.coming: set[Page] = set()  # pages that the running call brings up for an earlier cache

    # -- windows ------------------------------------------------------------------------------

    def stale(self, pool: int, history: int) -> range:
        window, sinks = self.windows[pool]
        if window is None:
            return range(0)
        s = min(-(-history // self.t), -(-sinks // self.t))
        return range(s, max(s, (history + 1 - window) // self.t))

    # -- matching -----------------------------------------------------------------------------

    def valid(self, m: int, path: list[Node]) -> bool:
        return all(
            i in self.stale(pool, m) or path[i].pages[pool] is not None for pool in self.pools for i in range(len(path))
        )

    def next_blocks(self, path: list[Node], root: tuple[object, int]) -> list[Node]:
        parent = path[-1] if path else None
        return [n for n in self.blocks() if n.parent is parent and n.root == root]

    def match(
        self, tokens: list[int], root: tuple[object, int], most: int | None = None
    ) -> tuple[int, list[Node], Node | None]:
        if root[1] < self.epoch:
            return 0, [], None
        for m in range(max(0, len(tokens) - 1) if most is None else most, 0, -1):
            path: list[Node] = []
            for i in range(m // self.t):
                block = tuple(tokens[i * self.t : (i + 1) * self.t])
                found = [n for n in self.next_blocks(path, root) if n.tokens == block]
                if not found:
                    break
                path.append(found[0])
            if len(path) < m // self.t:
                continue
            rest = tuple(tokens[len(path) * self.t : m])
            if not rest:
                if self.valid(m, path):
                    return m, path, None
            elif self.partial_reuse:
                siblings = self.next_blocks(path, root)
                sources = [n for n in siblings if n.tokens[: len(rest)] == rest and None not in n.pages]
                if sources and self.valid(m, path):
                    return m, path, min(sources, key=lambda n: n.seq)
        return 0, [], None

    def probe(self, tokens: list[int], scope: object, epoch: int | None) -> int:
        return self.match(tokens, (scope, self.epoch if epoch is None else epoch))[0]

    # -- release ------------------------------------------------------------------------------

    def released(self, before: list[Node], stamp: Use, path: list[Node]) -> None:
        """Blocks that were claimed before and are not any more; while a batch has claims in work, those of the released
        path whoever claims them."""
        now = self.claimed(self.settled())
        for node in {*before, *path}:
            if node not in now or (node in path and self.busy()):
                node.used = stamp
                node.expiry = None if node.duration == FOREVER else stamp[0] + node.duration

    def busy(self) -> bool:
        """Whether a batch has claims in work."""
        return any(c.in_work for c in self.caches)

    def wait(self, seconds: float) -> None:
        """Time passes: priorities end, in their order."""
        self.now += seconds
        claimed = self.claimed()
        due = [n for n in self.nodes if n not in claimed and n.expiry is not None and n.expiry <= self.now]
        for node in sorted(due, key=lambda n: n.expiry or 0):
            assert node.expiry is not None
            node.priority = min(node.priority, DEFAULT_PRIORITY)
            node.used, node.expiry = (node.expiry, 0), None

    def keep(self, node: Node, retain: Retain) -> None:
        """Reuse with retention: the maximum of each."""
        node.priority = max(node.priority, retain[0])
        node.duration = max(node.duration, retain[1])

    def claimed_nodes(self) -> list[Node]:
        return [*self.claimed(self.settled())]

    def tick(self) -> Use:
        self.stamp += 1
        return self.now, self.stamp

    def stamp_pages(self, pages: list[tuple[int, Node]], stamp: Use) -> None:
        """Live claims on these pages ended."""
        for pool, node in pages:
            page = node.pages[pool]
            claimed = self.page_claims(pool, node, self.settled()) and not self.busy()
            if page is not None and not page.stale and not claimed:
                page.used = stamp

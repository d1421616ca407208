"""How long a step of the simulated engine takes: a model, not a measurement.

Roofline (Williams, Waterman, Patterson 2009): a step is bound by arithmetic or by memory, whichever takes longer, and
both run at the data sheet's peak; moves between the tiers come on top, both directions at once:

    seconds = (max(flops / F, bytes / B) + max(offloaded, onboarded) / L) / G

    flops = 2 P n + 4 N Q d a    2 P per token in the weights; 4 Q d per layer and pair in the attention
    bytes = w P + K r            all weights once, and keys and values of the r positions that are read or written
    K     = 2 N H d v            bytes of keys and values of one token

with n tokens in the step, a pairs of a query and a key that it attends to, P parameters of w bytes, N layers, Q query
heads and H key-value heads of dimension d, values of v bytes, on G GPUs of F flops, B and L bytes per second. The flops
are the forward third of those that PaLM (Chowdhery et al. 2022, appendix B) counts for training. Sampling, launches and
communication between the GPUs cost nothing here: a real engine is slower.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepModel:
    """Constants: by default Llama 3 70B, weights in bf16, keys and values in fp8, on eight H200 that share all evenly.

    That node has room for the replay's default of 10,000 blocks of 512 tokens (839 GB of keys and values); other
    numbers of blocks change nothing here. flops_per_s (dense bf16), bytes_per_s (device memory) and link_bytes_per_s
    (to the host, per direction, PCIe 5 x16) are of one GPU.
    """

    name: str = "a roofline of a model of 70 billion parameters on eight H200"
    parameters: float = 70.6e9
    layers: int = 80
    query_heads: int = 64
    kv_heads: int = 8
    head_dim: int = 128
    weight_bytes: int = 2
    kv_value_bytes: int = 1
    gpus: int = 8
    flops_per_s: float = 989e12
    bytes_per_s: float = 4.8e12
    link_bytes_per_s: float = 64e9

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_value_bytes

    def seconds(self, tokens: int, pairs: float, read: float, offloaded: float = 0, onboarded: float = 0) -> float:
        """Of a step, by the formula above.

        tokens: n; pairs: a; read: r; offloaded, onboarded: tokens whose keys and values move. All but the first are
        means over the layers, which need not have the same window.
        """
        flops = 2 * self.parameters * tokens + 4 * self.layers * self.query_heads * self.head_dim * pairs
        compute = flops / self.flops_per_s
        kv = self.kv_bytes_per_token
        memory = (self.weight_bytes * self.parameters + kv * read) / self.bytes_per_s
        return (max(compute, memory) + max(offloaded, onboarded) * kv / self.link_bytes_per_s) / self.gpus


def attention(start: int, tokens: int, window: int | None) -> tuple[int, int]:
    """(query-key pairs, positions read or written) of the tokens [start, start + tokens) in one layer."""
    end = start + tokens
    if window is None or end <= window:
        return tokens * start + tokens * (tokens + 1) // 2, end
    grows = max(0, window - start)  # queries that do not fill the window yet
    pairs = grows * start + grows * (grows + 1) // 2 + (tokens - grows) * window
    return pairs, min(start, window - 1) + tokens

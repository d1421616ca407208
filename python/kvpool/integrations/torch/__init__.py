"""A paged executor in torch: a small decoder that reads and writes keys and values in kvpool's pages.

`pages.py` shows a pool as a tensor over the same memory, `attention.py` reads it through block tables, `decoder.py` is
the model, `executor.py` runs a scheduler's steps on it, `drafts.py` guesses tokens for it to verify. It is there to be
read and copied from; it runs on the CPU, and it is no fast kernel.
"""

from kvpool.integrations.extras import need

need("torch", "torch")

from kvpool.integrations.torch.attention import Rows, paged_attention, plain_attention  # noqa: E402
from kvpool.integrations.torch.decoder import Adapter, Decoder, DecoderConfig, DecoderLayer, greedy  # noqa: E402
from kvpool.integrations.torch.drafts import Drafter, NGramDrafter  # noqa: E402
from kvpool.integrations.torch.executor import Batch, PagedExecutor, PagedModel, Work  # noqa: E402
from kvpool.integrations.torch.pages import page_tensor  # noqa: E402

__all__ = [
    "Adapter",
    "Batch",
    "Decoder",
    "DecoderConfig",
    "DecoderLayer",
    "Drafter",
    "NGramDrafter",
    "PagedExecutor",
    "PagedModel",
    "Rows",
    "Work",
    "greedy",
    "page_tensor",
    "paged_attention",
    "plain_attention",
]

"""Loaders and batches of tiny corpora, for tests."""

from itertools import islice
from typing import Any

from tests.support.byte_tokenizer import ByteTokenizer
from titanlite.config.sections import DataConfig
from titanlite.data.loader import Batch, Loader, build_loader


def build(data: DataConfig, **kwargs: Any) -> Loader:
    """A loader of four rows of 16 tokens a step, of one rank, if not said otherwise."""
    defaults = {"seq_len": 16, "global_batch_size": 4, "seed": 0, "dp_rank": 0, "dp_degree": 1}
    return build_loader(data, kwargs.pop("tokenizer", ByteTokenizer()), **defaults | kwargs)


def batches(data: DataConfig, num_batches: int, **kwargs: Any) -> list[Batch]:
    """The first batches; fewer where the data end."""
    made = build(data, **kwargs)
    try:
        return list(islice(made, num_batches))
    finally:
        made.close()

"""Tiny LLaMAs for tests, one for each thing that the config can change, and rows of documents for them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.support.documents import EOS
from titanlite.config import ModelConfig
from titanlite.model.attention import build_documents
from titanlite.model.transformer import Llama, initial_mean_std

TINY = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=61)
SCALED = {"rope_theta": 10000.0, "rope_scaling_factor": 8.0, "rope_original_max_seq_len": 32}
VARIANTS = {
    "plain": TINY,
    "no-grouping": replace(TINY, n_kv_heads=4),
    "tied": replace(TINY, tie_embeddings=True),
    "rope-scaled": replace(TINY, **SCALED),
    "biases": replace(TINY, attention_bias=True, mlp_bias=True),
    "wide-heads": replace(TINY, head_dim=20),
}
variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def build(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Llama:
    """A model with weights so large that every part of it shows in the logits."""
    model = Llama(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        mean = initial_mean_std(name, config)[0]
        nn.init.normal_(p, mean, 0.3, generator=generator)
    return model


def tokens_with_documents(*lengths: int, low: int = 1, high: int = TINY.vocab_size) -> Tensor:
    """One row [1, sum of lengths] of random documents that end in eos."""
    generator = torch.Generator().manual_seed(len(lengths))
    row = torch.randint(low, high, (sum(lengths),), generator=generator)
    row[torch.tensor(lengths).cumsum(0) - 1] = EOS
    return row.unsqueeze(0)


def logits_of(model: Llama, tokens: Tensor, backend: str = "sdpa") -> Tensor:
    return model.output(model(tokens, build_documents(tokens, EOS, backend)))

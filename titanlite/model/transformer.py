"""LLaMA 3 as plain modules: RMSNorm, rotary grouped-query attention, SwiGLU, and numbers that follow from its shapes.

Names of modules and parameters are torchtitan's and Meta's. Parallelism, activation checkpointing, compilation and
initial weights come from outside, by module name; the model's only concession is that head counts follow from tensor
shapes, so that a rank may hold some of the heads. Refuses buffers and real work in `__init__`: it builds on meta.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanlite.config.sections import ModelConfig
from titanlite.model.attention import Documents, attend
from titanlite.model.ops.cross_entropy import OutputHead
from titanlite.model.ops.matmul import Linear
from titanlite.model.ops.norm import RMSNorm
from titanlite.model.rope import apply_rope, rope_rotations


class Attention(nn.Module):
    """Grouped-query attention within documents."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_size
        bias = config.attention_bias
        self.wq = Linear(config.dim, config.n_heads * self.head_dim, bias)
        self.wk = Linear(config.dim, config.n_kv_heads * self.head_dim, bias)
        self.wv = Linear(config.dim, config.n_kv_heads * self.head_dim, bias)
        self.wo = Linear(config.n_heads * self.head_dim, config.dim, bias)

    def forward(self, x: Tensor, rotations: Tensor, documents: Documents) -> Tensor:
        """x [B, S, dim], rotations [B, S, head_dim / 2, 2] -> [B, S, dim]."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        out = attend(apply_rope(q, rotations), apply_rope(k, rotations), v, documents)
        return self.wo(out.flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_dim, config.mlp_bias)
        self.w2 = Linear(config.ffn_dim, config.dim, config.mlp_bias)
        self.w3 = Linear(config.dim, config.ffn_dim, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Pre-norm residual block. Under sequence parallelism x is a part of S, the other arguments are not."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, rotations: Tensor, documents: Documents) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotations, documents)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """The model up to its final norm; `output` is the head, which the loss applies.

    Tied, `output.weight` is `tok_embeddings.weight`, and the state dict holds it under both names.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict({str(i): TransformerBlock(config) for i in range(config.n_layers)})
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = OutputHead(config.dim, config.vocab_size)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def forward(self, tokens: Tensor, documents: Documents) -> Tensor:
        """tokens int64 [B, S] -> hidden states [B, S, dim] after the final norm."""
        x = self.tok_embeddings(tokens)
        # bfloat16 cosines move logits by about 0.3.
        rotations = rope_rotations(documents.positions, self.config, torch.promote_types(x.dtype, torch.float32))
        for number, layer in enumerate(self.layers.values()):
            x = layer(x, rotations, documents.of_layer(number))
        return self.norm(x)


def initial_mean_std(name: str, config: ModelConfig) -> tuple[float, float]:
    """Mean and standard deviation of the normal distribution from which the named parameter is drawn.

    Norms start at one and biases at zero. Projections into the residual stream, of which there are two a layer, are
    smaller by sqrt(2 n_layers), so that its variance does not grow with depth (GPT-2, Radford et al. 2019).
    """
    *_, module, kind = name.split(".")
    if kind == "bias":
        return 0.0, 0.0
    if module.endswith("norm"):
        return 1.0, 0.0
    return 0.0, config.init_std / (2 * config.n_layers) ** 0.5 if module in ("wo", "w2") else config.init_std


def num_parameters(config: ModelConfig) -> int:
    """Number of parameters; a tied head counts once."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).parameters())


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Nominal floating-point operations of forward and backward per token, for MFU (PaLM, arXiv:2204.02311, B).

    Six for every parameter but the embedding's, whose lookup multiplies nothing (a tied matrix counts as the head),
    and 12 n_layers n_heads head_dim seq_len for attention as if every token saw the whole row: neither causality, nor
    documents, nor recomputation change the number.
    """
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.dim
    return 6 * (num_parameters(config) - lookup) + 12 * config.n_layers * config.n_heads * config.head_size * seq_len

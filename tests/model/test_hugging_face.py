"""Logits and gradients against transformers' LLaMA, which shares no line with ours."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.documents import EOS
from tests.support.llamas import build, logits_of, tokens_with_documents, variants
from titanlite.config import ModelConfig
from titanlite.model.documents import IGNORE_INDEX, labels
from titanlite.model.transformer import Llama


def rotate_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of wq or wk (or its bias): pairs (2i, 2i + 1) become pairs (i, i + head_dim / 2)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def hugging_face(model: Llama) -> tuple[nn.Module, dict[str, str]]:
    """The same model as transformers' LlamaForCausalLM, and its parameter name for each of ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    scaling: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling_factor != 1.0:
        scaling |= {
            "rope_type": "llama3",
            "factor": c.rope_scaling_factor,
            "low_freq_factor": c.rope_low_freq_factor,
            "high_freq_factor": c.rope_high_freq_factor,
            "original_max_position_embeddings": c.rope_original_max_seq_len,
        }
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.dim,
            intermediate_size=c.ffn_dim,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            head_dim=c.head_dim or c.dim // c.n_heads,
            rms_norm_eps=c.norm_eps,
            rope_parameters=scaling,
            max_position_embeddings=128,
            tie_word_embeddings=c.tie_embeddings,
            attention_bias=c.attention_bias,
            mlp_bias=c.mlp_bias,
            attn_implementation="eager",
        )
    )
    names = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    for i in range(c.n_layers):
        ours, other = f"layers.{i}.", f"model.layers.{i}."
        names |= {f"{ours}attention.w{x}": f"{other}self_attn.{x}_proj" for x in "qkvo"}
        parts = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
        names |= {f"{ours}feed_forward.{a}": f"{other}mlp.{b}" for a, b in parts.items()}
        names |= {
            f"{ours}attention_norm": f"{other}input_layernorm",
            f"{ours}ffn_norm": f"{other}post_attention_layernorm",
        }
    names = {
        f"{a}.{kind}": f"{b}.{kind}"
        for a, b in names.items()
        for kind in ("weight", "bias")
        if f"{a}.{kind}" in model.state_dict()
    }
    state = {names[name]: as_theirs(name, p, c) for name, p in model.state_dict().items()}
    theirs.load_state_dict(state, strict=True)
    return theirs.to(model.norm.weight.dtype), names


def as_theirs(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    if ".wq." in name:
        return rotate_pairs(tensor, config.n_heads)
    return rotate_pairs(tensor, config.n_kv_heads) if ".wk." in name else tensor


@variants
def test_logits_and_gradients_equal_hugging_face_on_each_document_alone(config: ModelConfig) -> None:
    ours = build(config, torch.float32)
    theirs, names = hugging_face(ours)
    lengths = (40, 1, 23)
    rows = torch.cat([tokens_with_documents(*lengths), torch.tensor([[5]])], dim=1)
    logits = logits_of(ours, rows[:, :-1])
    F.cross_entropy(logits[0], labels(rows, EOS)[0], ignore_index=IGNORE_INDEX, reduction="sum").backward()
    begin = 0
    for length in lengths:
        document = rows[:, begin : begin + length]
        wanted = theirs(document).logits
        torch.testing.assert_close(logits[:, begin : begin + length], wanted, atol=2e-4, rtol=1e-4)
        F.cross_entropy(wanted[0, :-1], document[0, 1:], reduction="sum").backward()
        begin += length
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert p.grad is not None
        wanted = gradients[names[name]].grad
        mine = as_theirs(name, p.grad, config)
        assert (mine - wanted).norm() < 2e-5 * wanted.norm(), name

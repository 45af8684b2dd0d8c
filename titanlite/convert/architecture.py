"""The same LLaMA in both worlds: config.json and ModelConfig, names of tensors, and the order of rotary pairs.

Owns which keys of a config.json are understood. Refuses every other one that says something, because it may change
what is computed; and an architecture that titanlite's model is not.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titanlite.config import ModelConfig
from titanlite.model.transformer import Llama

_SIZES = {  # theirs -> ours; without a default in either world
    "hidden_size": "dim",
    "intermediate_size": "ffn_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "vocab_size": "vocab_size",
}
_FLAGS = {"tie_word_embeddings": "tie_embeddings", "attention_bias": "attention_bias", "mlp_bias": "mlp_bias"}
_SCALING = {
    "factor": "rope_scaling_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_max_seq_len",
}
_FIXED = {  # what titanlite's model does: another value is another computation
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
}
_WITHOUT_EFFECT = {  # on logits
    *("_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "initializer_range"),
    *("_attn_implementation", "return_dict", "output_attentions", "output_hidden_states", "unsloth_version"),
}


@dataclass(frozen=True)
class Imported:
    """What a config.json says."""

    model: ModelConfig
    max_positions: int
    """Positions that the model was made for."""


def to_config_json(model: ModelConfig, dtype: torch.dtype, max_positions: int) -> dict[str, Any]:
    """config.json without the ids of special tokens, in the form that transformers 4 and 5 both read."""
    scaling = None
    if model.rope_scaling_factor != 1.0:
        scaling = {"rope_type": "llama3", **{theirs: getattr(model, ours) for theirs, ours in _SCALING.items()}}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": str(dtype).removeprefix("torch."),
        **{theirs: getattr(model, ours) for theirs, ours in (_SIZES | _FLAGS).items()},
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": max_positions,
        "initializer_range": model.init_std,
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def from_config_json(content: dict[str, Any]) -> Imported:
    """Raises ValueError with all keys that are missing, not understood or of another architecture."""
    left = {key: value for key, value in content.items() if key not in _WITHOUT_EFFECT}
    problems: list[str] = []
    values: dict[str, Any] = {}

    def take(key: str, default: Any, kind: type = int) -> Any:
        value = left.pop(key, None)
        value = default if value is None else value
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            problems.append(f"{key} = {value!r:.40}: must be {kind.__name__}" if value is not None else f"no {key}")
            return default
        return value

    if content.get("architectures") not in (None, ["LlamaForCausalLM"]):
        problems.append(f"architectures = {content['architectures']!r:.60}: titanlite's model is LlamaForCausalLM")
    if "model_type" not in content:
        problems.append("no model_type")
    for key, wanted in _FIXED.items():
        if (value := left.pop(key, None)) not in (None, wanted):
            problems.append(f"{key} = {value!r:.40}: titanlite's model has {wanted!r}")
    for theirs, ours in _SIZES.items():
        values[ours] = take(theirs, None)
    for theirs, ours in _FLAGS.items():
        values[ours] = take(theirs, False, bool)
    values["n_kv_heads"] = take("num_key_value_heads", values["n_heads"])
    values["norm_eps"] = take("rms_norm_eps", 1e-6, float)
    _take_rope(left, values, take, problems)
    head_dim = take("head_dim", 0)
    if not values["n_heads"] or head_dim * values["n_heads"] != values["dim"]:
        values["head_dim"] = head_dim
    problems += [f"{key} = {value!r:.40}: not understood" for key, value in left.items() if value is not None]
    max_positions = content.get("max_position_embeddings", 2048)
    if type(max_positions) is not int or max_positions < 1:
        problems.append(f"max_position_embeddings = {max_positions!r:.40}: must be a number of tokens")
    std = content.get("initializer_range")
    if type(std) is float and std > 0:
        values["init_std"] = std
    if problems:
        raise ValueError("; ".join(problems))
    return Imported(ModelConfig(**values), max_positions)


def _take_rope(left: dict[str, Any], values: dict[str, Any], take: Any, problems: list[str]) -> None:
    """rope_theta and rope_scaling of transformers 4, or rope_parameters of 5, which holds both."""
    theta = take("rope_theta", 10000.0, float)
    older, newer = left.pop("rope_scaling", None), left.pop("rope_parameters", None)
    rope = dict(newer or older or {}) if isinstance(newer or older or {}, dict) else {"rope_type": newer or older}
    left.update({f"rope: {key}": value for key, value in rope.items()})
    values["rope_theta"] = take("rope: rope_theta", theta, float)
    if (partial := left.pop("rope: partial_rotary_factor", None)) not in (None, 1.0):
        problems.append(f"rope: partial_rotary_factor = {partial!r:.40}: titanlite's model has 1.0")
    old_kind = left.pop("rope: type", None)
    kind = left.pop("rope: rope_type", old_kind) or "default"
    if kind not in ("default", "llama3"):
        problems.append(f"rope_type = {kind!r:.40}: titanlite knows default and llama3")
    elif kind == "llama3":
        scaling = {ours: take(f"rope: {key}", None, float) for key, ours in list(_SCALING.items())[:3]}
        scaling["rope_original_max_seq_len"] = take("rope: original_max_position_embeddings", None)
        if scaling["rope_scaling_factor"] != 1.0:  # a factor of 1 scales nothing, and then the others say nothing
            values.update(scaling)


def empty_parameters(model: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's parameters by name, on meta; a tied head once, as the embedding."""
    with torch.device("meta"):
        return {name: p.detach() for name, p in Llama(model).to(dtype).named_parameters()}


def their_name(name: str) -> str:
    """Hugging Face's name of our parameter."""
    head, kind = name.rsplit(".", 1)
    top = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    if head in top:
        return f"{top[head]}.{kind}"
    _, layer, part = head.split(".", 2)
    parts = {f"attention.w{x}": f"self_attn.{x}_proj" for x in "qkvo"}
    parts |= {"feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj"}
    parts |= {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    return f"model.layers.{layer}.{parts[part]}.{kind}"


def to_their_order(name: str, tensor: Tensor, model: ModelConfig) -> Tensor:
    """Our parameter as Hugging Face has it: rotary pairs (2i, 2i + 1) of wq and wk become (i, i + head_dim / 2)."""
    heads = _rotary_heads(name, model)
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2) if heads else tensor


def to_our_order(name: str, tensor: Tensor, model: ModelConfig) -> Tensor:
    """The inverse of `to_their_order`; `name` is ours."""
    heads = _rotary_heads(name, model)
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads else tensor


def _rotary_heads(name: str, model: ModelConfig) -> int:
    if ".wq." in name:
        return model.n_heads
    return model.n_kv_heads if ".wk." in name else 0

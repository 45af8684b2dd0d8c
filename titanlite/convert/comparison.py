"""Whether a Hugging Face folder and a checkpoint are the same model: logits of both on real text, and ids.

Owns forward passes with one layer's weights in memory. transformers, where it is installed and fits, computes the
folder's side with no line of ours; else that side is our own reading of it, which the printed line says.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from titanlite.config import ModelConfig
from titanlite.model.attention import realise
from titanlite.model.documents import document_starts_from_lengths
from titanlite.model.transformer import Llama, num_parameters
from titanlite.tokenizer import Tokenizer

_TOKENS, _ROW = 256, 128
# Of the largest logit. Order of summation and float32 angles leave about 1e-6 (a hundred layers: 1e-5); a wrong
# permutation, scaling or epsilon more than 1e-3.
_TOLERANCE = 1e-4
# Every kind of letter, digit, space and mark in a few characters, and where patterns and engines like to part.
HOSTILE = (
    "\u00e9e\u0301 1234567890 \u0661\u0662\u0663 \u00bd\u2167 \u4e2d\u6587\u3002 \U0001f642\u200d\U0001f525 don'T"
    "\u017f 'S'\u017f \ta \r\n\r\n\n x\u00a0\u3000y\x0b\x1c\x85\u2028z"
    " ==>> __init__ \U00020000\U000e0041\uffff\x00 $^ a\n$ \n"
)


@dataclass(frozen=True)
class ModelComparison:
    """Of a comparison that found no difference that matters."""

    difference: float
    largest: float
    """Of all logits."""
    num_tokens: int
    computed_by: str


def sample_tokens(tokenizer: Tokenizer | None, config: ModelConfig, max_positions: int) -> Tensor:
    """Rows of source code [B, S], int64; of random ids where there is no tokenizer."""
    row = min(_ROW, max_positions)
    num_tokens = _TOKENS // row * row
    if tokenizer is None:
        return torch.randint(config.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0)).view(-1, row)
    return torch.from_numpy(tokenizer.encode_document(_text())[:num_tokens].copy()).long().view(-1, row)


def _text() -> str:
    with open(argparse.__file__, encoding="utf-8") as file:
        return file.read()


@torch.no_grad()
def streamed_logits(config: ModelConfig, read: Callable[[str], Tensor], tokens: Tensor) -> Tensor:
    """Logits [B, S, V] in float32 of rows that are a document each, with one layer's weights in memory.

    read: a parameter by its name.
    """
    with torch.device("meta"):
        model = Llama(config)

    def fill(prefix: str, module: nn.Module, args: Any) -> None:
        module.load_state_dict({name: read(f"{prefix}.{name}").float() for name in module.state_dict()}, assign=True)

    def empty(module: nn.Module, args: Any, output: Any) -> None:
        module.to("meta")

    parts = {"tok_embeddings": model.tok_embeddings, "norm": model.norm, "output": model.output}
    parts |= {f"layers.{name}": layer for name, layer in model.layers.items()}
    for name, part in parts.items():
        part.register_forward_pre_hook(partial(fill, name))
        part.register_forward_hook(empty)
    documents = realise(document_starts_from_lengths([[tokens.shape[1]]] * len(tokens), tokens.shape[1]), "dense")
    return model.output(model(tokens, documents))


def transformers_logits(folder: str, tokens: Tensor) -> Tensor:
    from transformers import LlamaForCausalLM  # named, so that nothing in the folder chooses what runs
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True).float()
    with torch.no_grad():
        return model(tokens).logits


def compare_logits(
    config: ModelConfig,
    read_ours: Callable[[str], Tensor],
    read_theirs: Callable[[str], Tensor],
    folder: str,
    tokens: Tensor,
    how: str,
) -> ModelComparison:
    """Raise ValueError unless the checkpoint and the folder have the same logits.

    read_ours, read_theirs: a parameter by our name, from the checkpoint and from the folder. how: transformers,
    streamed, or auto: transformers if it is installed and the model takes less than half of the memory.
    """
    if how == "auto":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        fits = 4 * num_parameters(config) < memory / 2
        how = "transformers" if find_spec("transformers") and fits else "streamed"
    ours = streamed_logits(config, read_ours, tokens)
    if how == "transformers":
        import transformers

        computed_by = f"transformers {transformers.__version__}"
        theirs = transformers_logits(folder, tokens)
    else:
        computed_by = "titanlite's own reader"
        theirs = streamed_logits(config, read_theirs, tokens)
    largest = ours.abs().max().item()
    difference = theirs.sub_(ours).abs_().max().item()
    if not difference <= _TOLERANCE * max(1.0, largest):  # not a number is not less
        raise ValueError(
            f"logits of the folder, computed by {computed_by}, differ by up to {difference:.3g} from those of the"
            f" checkpoint (largest {largest:.3g}): this is not the same model"
        )
    return ModelComparison(difference, largest, tokens.numel(), computed_by)


def compare_ids(folder: str, tokenizer: Tokenizer) -> str | None:
    """Raise ValueError unless tokenizer.json in `folder` gives our ids; what was compared, or None where the tokenizers
    package is not installed."""
    if not find_spec("tokenizers"):
        return None
    import tokenizers

    theirs = tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    theirs.encode_special_tokens = True
    texts = [*_text().splitlines(keepends=True), _text(), HOSTILE, "".join(tokenizer.special_tokens)]
    for text in texts:
        ours = tokenizer.encode(text).tolist()
        if theirs.encode(text, add_special_tokens=False).ids != ours:
            raise ValueError(
                f"tokenizers {tokenizers.__version__} gives other ids for {text!r:.60}: wrong tokenizer.json"
            )
    return f"tokenizers {tokenizers.__version__} gives titanlite's ids for {len(texts):,} texts"

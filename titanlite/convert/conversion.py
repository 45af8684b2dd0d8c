"""A checkpoint becomes a Hugging Face folder, and a folder a checkpoint: tensor by tensor, checked before it counts.

The result is built under a temporary name beside its own, reopened and compared, and only then gets its name: what is
there is complete. Refuses an existing target, and to guess: all that does not fit is named at once.
"""

import os
import platform
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor
from tqdm import tqdm

from titanlite.checkpoint import CheckpointReader, Meta, write_checkpoint
from titanlite.config import Config, ModelConfig
from titanlite.config.checks import check
from titanlite.config.dump import toml_value
from titanlite.config.sections import TokenizerConfig, TrainingConfig
from titanlite.convert import safetensors
from titanlite.convert.architecture import (
    Imported,
    empty_parameters,
    from_config_json,
    their_name,
    to_config_json,
    to_our_order,
    to_their_order,
)
from titanlite.convert.comparison import ModelComparison, compare_ids, compare_logits, sample_tokens
from titanlite.convert.tokenizer_files import import_tokenizer, read_json, write_json, write_tokenizer
from titanlite.loading import config_of, find_checkpoint, tokenizer_of, weights_prefix
from titanlite.tokenizer import Tokenizer

Read = Callable[[str], Tensor]


@contextmanager
def new_folder(out: str, needed: int) -> Iterator[str]:
    """A temporary folder beside `out`, which becomes `out` when the block ends; after an error it is gone."""
    out = os.path.abspath(out)
    parent, name = os.path.split(out)
    if os.path.lexists(out):
        raise ValueError(f"{out}: exists already: name another folder, or move it away")
    if not os.path.isdir(parent):
        raise ValueError(f"{parent}: no such folder: make it, or write somewhere else")
    if (free := shutil.disk_usage(parent).free) < needed:
        raise ValueError(f"{parent}: {needed / 1e9:,.2f} GB are needed, and the disk has {free / 1e9:,.2f} GB left")
    temporary = os.path.join(parent, f".{name}.tmp-{uuid.uuid4().hex[:8]}")
    os.mkdir(temporary)
    try:
        yield temporary
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def to_hf(
    checkpoint: str,
    out: str,
    dtype: torch.dtype,
    shard_bytes: int,
    tokenizer_path: str | None,
    how: str,
    *,
    use_ema: bool = False,
) -> list[str]:
    """Write the model of a checkpoint as Hugging Face folder `out`; lines about what was done.

    use_ema: with the average of the weights in their place.
    Raises ValueError or OSError, one line; there is no `out` then.
    """
    found = find_checkpoint(checkpoint, {})
    path, config = found.path, config_of(found)
    tokenizer = tokenizer_of(found, config, tokenizer_path)
    prefix = weights_prefix(found, use_ema)
    model = config.model
    saved = empty_parameters(model, getattr(torch, config.training.dtype))
    shapes = empty_parameters(model, dtype)
    ours = {their_name(name): name for name in shapes}
    size = sum(tensor.nbytes for tensor in shapes.values())
    with new_folder(out, size) as folder, _progress() as bar:
        reader = CheckpointReader(path, bar("checking", 0))
        reader.compare({f"{prefix}{name}": tensor for name, tensor in saved.items()}, prefix)

        def rounded(name: str) -> Tensor:
            return reader.read(f"{prefix}{_stored(name, model)}").to(dtype)

        def load(their: str) -> Tensor:
            return to_their_order(ours[their], rounded(ours[their]), model)

        named = {their: shapes[name] for their, name in ours.items()}
        files = safetensors.write_folder(folder, named, load, shard_bytes, bar("writing", size))
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        max_positions = config.training.seq_len
        write_json(folder, "config.json", to_config_json(model, dtype, max_positions) | ids)
        # Rows beyond the vocabulary were never trained: titanlite.generate does not choose them either.
        unused = [*tokenizer.unused_ids(), *range(tokenizer.vocab_size, model.vocab_size)]
        suppressed = {"suppress_tokens": unused} if unused else {}
        write_json(folder, "generation_config.json", {"do_sample": False, **ids, **suppressed})
        write_tokenizer(folder, tokenizer, max_positions)
        texts = compare_ids(folder, tokenizer)
        entries = _checked(safetensors.read_folder(folder), model, folder)
        tokens = sample_tokens(tokenizer, model, max_positions)
        verdict = compare_logits(model, rounded, _reader(entries, model, dtype), folder, tokens, how)
    num_files = len(files) - (len(files) > 1)
    name = str(dtype).removeprefix("torch.")
    num_parameters = sum(tensor.numel() for tensor in shapes.values())
    kind = "parameters" + ", averaged (--ema)," * use_ema
    return [
        f"{out}: {num_parameters:,} {kind} of {path} in {name}, {num_files} weight file(s)",
        _told(verdict, "" if dtype == getattr(torch, config.training.dtype) else f", both rounded to {name}"),
        texts or "the tokenizers package is not installed, so tokenizer.json was not tried",
    ]


def from_hf(source: str, out: str, how: str) -> list[str]:
    """Write the model in Hugging Face folder `source` as `out`: step-00000000, tokenizer, config.toml; lines about it.

    Raises ValueError or OSError, one line; there is no `out` then.
    """
    imported, entries = _read_source(source)
    model, final = imported.model, os.path.abspath(out)
    wide = any(entry.dtype is torch.float64 for entry in entries.values())
    dtype = torch.float64 if wide else torch.float32
    shapes = {f"model.{name}": tensor for name, tensor in empty_parameters(model, dtype).items()}
    size = sum(tensor.nbytes for tensor in shapes.values())
    theirs = _reader(entries, model, dtype)
    with new_folder(out, size) as folder, _progress() as bar:
        tokenizer, told = _tokenizer(source, os.path.join(folder, "tokenizer"))
        if tokenizer and tokenizer.vocab_size > model.vocab_size:
            raise ValueError(f"{source}: {model.vocab_size} rows for {tokenizer.vocab_size} ids of its tokenizer")
        config = Config(
            model=model,
            tokenizer=TokenizerConfig(os.path.join(final, "tokenizer")) if tokenizer else TokenizerConfig(),
            training=TrainingConfig(dtype="float64" if wide else "float32", seq_len=imported.max_positions),
        )
        fingerprint = tokenizer.fingerprint if tokenizer else ""
        meta = Meta(0, asdict(config), fingerprint, imported="from a Hugging Face folder")
        advance = bar("writing", size)

        def load(key: str) -> Tensor:
            tensor = theirs(key.removeprefix("model."))
            advance(tensor.nbytes)
            return tensor

        versions = {"torch": str(torch.__version__), "python": platform.python_version()}
        path = write_checkpoint(folder, 0, shapes, load, meta.to_json(), versions)
        reader = CheckpointReader(path)
        tokens = sample_tokens(tokenizer, model, imported.max_positions)
        verdict = compare_logits(
            model, lambda name: reader.read(f"model.{_stored(name, model)}"), theirs, source, tokens, how
        )
        toml = _toml(config, os.path.join(final, os.path.basename(path)))
        with open(os.path.join(folder, "config.toml"), "x", encoding="utf-8") as file:
            file.write(toml)
    return [
        f"{out}: {sum(tensor.numel() for tensor in shapes.values()):,} parameters of {source}",
        _told(verdict, ""),
        told,
        f"To train from it, put this ({os.path.join(out, 'config.toml')}) into a config:\n\n{toml}",
    ]


def _read_source(source: str) -> tuple[Imported, dict[str, safetensors.Entry]]:
    """What a Hugging Face folder says that it holds, found to fit together. Raises ValueError."""
    if not os.path.isdir(source):
        raise ValueError(f"{source}: no such folder: give one with config.json and safetensors files")
    content = read_json(source, "config.json")
    try:
        imported = from_config_json(content)
        if problems := [problem for problem in check(Config(model=imported.model), None) if "model." in problem]:
            raise ValueError("; ".join(problems))
    except ValueError as error:
        raise ValueError(f"{os.path.join(source, 'config.json')}: {error}") from None
    if os.path.exists(os.path.join(source, "adapter_config.json")):
        raise ValueError(f"{source}: holds an adapter, which is a part of a model: merge it into its base first")
    return imported, _checked(safetensors.read_folder(source), imported.model, source)


def _told(verdict: ModelComparison, rounded: str) -> str:
    return (
        f"logits of the two{rounded}: at most {verdict.difference:.2g} apart on {verdict.num_tokens} tokens, the"
        f" largest being {verdict.largest:.3g} (the folder's computed by {verdict.computed_by})"
    )


@contextmanager
def _progress() -> Iterator[Callable[[str, int], Callable[[int], object]]]:
    """Makes a bar of bytes; the one before is closed."""
    bars: list[tqdm] = []

    def begin(what: str, total: int) -> Callable[[int], object]:
        bars.append(tqdm(total=total or None, desc=what, unit="B", unit_scale=True, disable=None, leave=False))
        return bars[-1].update

    try:
        yield begin
    finally:
        for bar in bars:
            bar.close()


def _stored(name: str, model: ModelConfig) -> str:
    """Where the parameter is: a tied head is the embedding."""
    return "tok_embeddings.weight" if model.tie_embeddings and name == "output.weight" else name


def _reader(entries: Mapping[str, safetensors.Entry], model: ModelConfig, dtype: torch.dtype) -> Read:
    """Reads a parameter by our name from a Hugging Face folder."""

    def read(name: str) -> Tensor:
        tensor = safetensors.read_tensor(entries[their_name(_stored(name, model))])
        return to_our_order(name, tensor, model).to(dtype)

    return read


def _checked(entries: dict[str, safetensors.Entry], model: ModelConfig, folder: str) -> dict[str, safetensors.Entry]:
    """The entries of the model's parameters. Raises ValueError with all that are missing, too many or misshapen."""
    shapes = {their_name(name): tuple(t.shape) for name, t in empty_parameters(model, torch.float32).items()}
    extra = {name for name in entries.keys() - shapes.keys() if not name.endswith(".rotary_emb.inv_freq")}
    problems = [f"{name} is missing" for name in shapes.keys() - entries.keys()]
    if model.tie_embeddings and "lm_head.weight" in extra:  # written all the same by some
        extra.remove("lm_head.weight")
        pair = [safetensors.read_tensor(entries[name]) for name in ("lm_head.weight", "model.embed_tokens.weight")]
        if not torch.equal(*pair):
            problems.append("lm_head.weight is not model.embed_tokens.weight, and config.json ties them")
    problems += [f"{name} is not expected" for name in extra]
    problems += [
        f"{name} has shape {list(entries[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in entries and entries[name].shape != shape
    ]
    if problems:
        raise ValueError(f"{folder}: its tensors are not those of its config.json: {'; '.join(sorted(problems))}")
    return {name: entries[name] for name in shapes}


def _tokenizer(source: str, target: str) -> tuple[Tokenizer | None, str]:
    """titanlite's tokenizer, if the folder's is one that it can be, and a line about it."""
    try:
        tokenizer = import_tokenizer(source, target)
    except ValueError as error:
        shutil.rmtree(target, ignore_errors=True)
        return None, f"no tokenizer: {error}. Give the run one of its own in tokenizer.path"
    compared = compare_ids(source, tokenizer)
    return tokenizer, compared or "the tokenizers package is not installed, so the tokenizer was not compared"


def _toml(config: Config, init_from: str) -> str:
    lines = ["[model]", *(f"{key} = {toml_value(value)}" for key, value in asdict(config.model).items())]
    lines += ["", "[tokenizer]", f"path = {toml_value(config.tokenizer.path)}"]
    lines += ["", "[checkpoint]", f"init_from = {toml_value(init_from)}"]
    return "\n".join(lines) + "\n"

"""A trained model from a distributed checkpoint of any layout, for those who use it and do not train it on.

Owns which checkpoint is meant, and its config and tokenizer, which the checkpoint itself names. Reads the weights, and
no optimiser state, through `titanlite.checkpoint`. Refuses to change the run's folder: what is damaged is passed over,
not set aside. Parallel by tensor parallelism alone: each step of generation is too short to gather weights for.
"""

import math
import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from titanlite.checkpoint import (
    Checkpointer,
    CheckpointError,
    DamagedCheckpoint,
    list_steps,
    read_manifest,
    weights_prefix,
)
from titanlite.config import Config, ModelConfig
from titanlite.config.degrees import divisors, listed
from titanlite.config.schema import SCHEMA, from_tables, from_toml, schema_name, to_tables
from titanlite.log import logger
from titanlite.model import Llama
from titanlite.parallel.apply import apply_tp
from titanlite.parallel.mesh import Mesh
from titanlite.runtime import agreed
from titanlite.tokenizer import Tokenizer
from titanlite.trainer import param_dtype


class Pretrained(NamedTuple):
    model: Llama
    """Without gradients, in the asked type on the mesh's device; over its tp axis where that has several ranks."""
    config: Config
    """Of the run that saved it."""
    tokenizer: Tokenizer
    path: str
    """The checkpoint's folder."""


def load_model(
    checkpoint: str,
    mesh: Mesh,
    dtype: torch.dtype | None = None,
    tokenizer_path: str | None = None,
    *,
    use_ema: bool = False,
) -> Pretrained:
    """The model of a checkpoint folder (.../step-N), or of the newest valid one in a run's folder. Collective.

    dtype: of weights and activations; None is that of training's forward pass on this device. tokenizer_path: in place
    of the config's, whose fingerprint it must have. use_ema: with the average of the weights in their place. Raises
    RunFailed or CheckpointError, the same on all ranks, in one line that names file or folder and fix.
    """
    assert mesh.dp_degree == 1, mesh.describe
    checkpointer = Checkpointer(checkpoint, keep_latest_k=0, async_save=False)
    refused: dict[str, str] = {}
    while True:
        found: list[Any] = [None]
        with agreed():
            if dist.get_rank() == 0:
                found = [newest_checkpoint(checkpoint, refused)]
        dist.broadcast_object_list(found, src=0)
        path, meta = found[0]
        with agreed():
            config = config_of(path, meta)
            tokenizer = tokenizer_of(path, meta, config, tokenizer_path)
            prefix = weights_prefix(path, meta, use_ema)
            model = empty_model(config, mesh)
        weights = {f"{prefix}{name}": p.detach() for name, p in model.named_parameters()}
        try:
            checkpointer.load(path, weights, prefix=prefix)
        except DamagedCheckpoint as error:
            _refuse(path, str(error), refused)
            continue
        model.to(dtype or param_dtype(config, mesh.device.type))
        return Pretrained(model.requires_grad_(False), config, tokenizer, path)


def newest_checkpoint(checkpoint: str, refused: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """The newest checkpoint that is meant and not refused, and its manifest's meta."""
    if not os.path.isdir(checkpoint):
        raise CheckpointError(f"{checkpoint}: no such folder: name a checkpoint (RUN/checkpoint/step-N) or a run")
    steps = list_steps(checkpoint) or list_steps(os.path.join(checkpoint, "checkpoint"))
    paths = list(steps.values()) or [checkpoint]
    for path in reversed(paths):
        if path not in refused:
            try:
                return path, read_manifest(path)["meta"]
            except DamagedCheckpoint as error:
                _refuse(path, str(error), refused)
    raise CheckpointError(f"{checkpoint}: no valid checkpoint: {'; '.join(refused.values())}")


def _refuse(path: str, reason: str, refused: dict[str, str]) -> None:
    refused[path] = reason
    logger.warning("checkpoint %s is damaged and passed over: %s", path, reason)


def config_of(path: str, meta: dict[str, Any]) -> Config:
    """The config in a checkpoint's meta. Keys that this version does not know are left out, but not of the model."""
    tables: dict[str, dict[str, Any]] = {}
    try:
        unknown = sorted(meta["config"]["model"].keys() - SCHEMA["model"].keys())
        for table, values in to_tables(meta["config"]).items():
            if schema := SCHEMA.get(schema_name(table)):
                tables[table] = {key: from_toml(schema[key], value) for key, value in values.items() if key in schema}
    except (KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: its manifest holds no usable config: {error!r}") from error
    if unknown:
        raise CheckpointError(f"{path}: its config has model.{unknown[0]}, which this titanlite does not know")
    return from_tables(tables)


def tokenizer_of(path: str, meta: dict[str, Any], config: Config, tokenizer_path: str | None) -> Tokenizer:
    """That of the config, or in `tokenizer_path`. Raises ValueError where it is not the one of the training."""
    try:
        tokenizer = Tokenizer.load(tokenizer_path or config.tokenizer.path)
    except ValueError as error:
        raise ValueError(f"{error}; or name the folder of the run's tokenizer with --tokenizer") from error
    saved = meta.get("corpus", {}).get("tokenizer")
    if saved is not None and saved != tokenizer.fingerprint[: len(saved)]:
        raise ValueError(
            f"the tokenizer in {tokenizer_path or config.tokenizer.path!r} (fingerprint {tokenizer.fingerprint[:12]})"
            f" is not the one that {path} was trained with ({saved[:12]}): name that one's folder with --tokenizer"
        )
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(f"{path}: {config.model.vocab_size} rows for {tokenizer.vocab_size} ids of the tokenizer")
    return tokenizer


def empty_model(config: Config, mesh: Mesh) -> Llama:
    """A model to generate with, without weights: on the mesh's device, over its tp axis, in the checkpoint's type."""
    tp = mesh.tp.size()
    _check_divisible(config.model, tp)
    with torch.device("meta"):
        model = Llama(config.model).to(getattr(torch, config.training.dtype))
    if tp > 1:
        apply_tp(model, mesh, split_sequence=False)
    model.to_empty(device=mesh.device)
    if config.model.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight  # to_empty gives each place a matrix of its own
    return model


def _check_divisible(model: ModelConfig, tp: int) -> None:
    sizes = {key: getattr(model, key) for key in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size")}
    for key, size in sizes.items():
        if size % tp:
            raise ValueError(
                f"{tp} ranks do not divide model.{key} = {size}, and every rank is a tensor-parallel peer: start"
                f" {listed(divisors(math.gcd(*sizes.values())))}"
            )

"""Which checkpoint is meant, and what it is of: its meta, config, tokenizer and weights.

The one owner of these decisions, for resuming, for runs that start from given weights, for validation, generation and
conversion. Only a resume may change a run's folder (it sets damaged checkpoints aside); all others pass over what is
damaged. A model that is loaded to be used, not trained, is parallel by tensor parallelism alone: each step of
generation is too short to gather weights for.
"""

import math
import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from titanlite.checkpoint import Checkpointer, CheckpointError, DamagedCheckpoint, Meta, list_steps, read_manifest
from titanlite.config import Config, ModelConfig
from titanlite.config.degrees import divisors, listed
from titanlite.config.schema import SCHEMA, from_tables, from_toml, schema_name, to_tables
from titanlite.log import logger
from titanlite.model.transformer import Llama
from titanlite.parallel.apply import apply_tp
from titanlite.parallel.mesh import Mesh
from titanlite.run.agreement import agreed
from titanlite.tokenizer import Tokenizer
from titanlite.trainer import param_dtype


class Found(NamedTuple):
    """A checkpoint."""

    path: str
    """Its folder."""
    meta: Meta


def decide_start(config: Config, checkpointer: Checkpointer) -> Found | None:
    """The checkpoint to resume from, None for a new run; logs which and why. Collective.

    Raises CheckpointError, on all ranks, where the config asks for what is not there, or has other state to fill.
    """
    folder, asked = checkpointer.folder, config.checkpoint
    if not asked.enable or asked.resume == "never":
        why = 'checkpoint.resume = "never"' if asked.enable else "checkpoint.enable = false"
        if list_steps(folder):  # a run from step 0 would also replace the logs of theirs
            raise CheckpointError(
                f'{why}, and {folder} holds checkpoints: name another job.dump_folder, or resume with "auto"'
            )
    else:
        if path := checkpointer.newest(asked.load_step):
            which = "the newest valid one" if asked.load_step < 0 else "checkpoint.load_step"
            logger.info('resuming from %s: checkpoint.resume = "%s", and it is %s', path, asked.resume, which)
            found = Found(path, read_meta(path))
            _check_state(found, config)
            return found
        if asked.resume == "must":
            raise CheckpointError(f'checkpoint.resume = "must", and there is no valid checkpoint in {folder}')
        if damaged := checkpointer.damaged():  # their run may have cost weeks: beginning anew is not ours to decide
            raise CheckpointError(
                f"{folder}: no valid checkpoint, and damaged ones that were set aside ({', '.join(damaged)}): put a"
                " copy of one in its place, or delete them to train anew"
            )
        why = f"no valid checkpoint in {folder}"
    weights = f"weights of {asked.init_from}" if asked.init_from else "newly drawn weights"
    logger.info("new run with %s: %s", weights, why)
    return None


def _check_state(found: Found, config: Config) -> None:
    """Raise CheckpointError where the run that saved it had another optimiser, or where only one of the two has an
    average of the weights."""
    before = found.meta.config["optimizer"].get("name", "adamw")
    anew = "begin a new run, in another job.dump_folder, from these weights (checkpoint.init_from)"
    if before != config.optimizer.name:
        raise CheckpointError(
            f'{found.path} was saved by optimizer.name = "{before}" and this run has "{config.optimizer.name}": set it'
            f" as it was, or {anew}"
        )
    decay = found.meta.config["training"].get("ema_decay", 0.0)
    if bool(decay) != bool(config.training.ema_decay):
        raise CheckpointError(
            f"{found.path} was saved with training.ema_decay = {decay}, so it has {'an' if decay else 'no'} average of"
            f" the weights, and this run has {config.training.ema_decay}: set it to {decay}, or {anew}"
        )


def read_meta(path: str) -> Meta:
    """Of checkpoint folder `path`. Raises DamagedCheckpoint or CheckpointError."""
    return Meta.from_json(path, read_manifest(path)["meta"])


def find_checkpoint(checkpoint: str, refused: dict[str, str], step: int = -1) -> Found:
    """The newest checkpoint, or that of `step`, that is not refused: `checkpoint` itself, or one in this folder, or in
    the run's folder that it is. refused: why, by path; what turns out to be damaged is added, with a warning.

    Raises CheckpointError where there is none.
    """
    if not os.path.isdir(checkpoint):
        raise CheckpointError(f"{checkpoint}: no such folder: name a checkpoint (RUN/checkpoint/step-N) or a run")
    steps = list_steps(checkpoint) or list_steps(os.path.join(checkpoint, "checkpoint"))
    paths = [path for number, path in steps.items() if step in (-1, number)] if steps else [checkpoint]
    for path in reversed(paths):
        if path not in refused:
            try:
                return Found(path, read_meta(path))
            except DamagedCheckpoint as error:
                _refuse(path, error, refused)
    of_step = f" of step {step} (there are: {sorted(steps)})" if steps and not paths else ""
    raise CheckpointError(f"{checkpoint}: no valid checkpoint{of_step or ': ' + '; '.join(refused.values())}")


def _refuse(path: str, error: DamagedCheckpoint, refused: dict[str, str]) -> None:
    refused[path] = str(error)
    logger.warning("checkpoint %s is damaged and passed over: %s", path, error)


def find_together(checkpoint: str, refused: dict[str, str], step: int = -1) -> Found:
    """`find_checkpoint` by rank 0, for all ranks. Collective; raises RunFailed."""
    found: list[Any] = [None]
    with agreed():
        if dist.get_rank() == 0:
            found = [find_checkpoint(checkpoint, refused, step)]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def load_weights(
    checkpointer: Checkpointer, found: Found, model: Llama, refused: dict[str, str], *, use_ema: bool
) -> bool:
    """Fill the model; False where the checkpoint is damaged, which is then refused. Collective.

    use_ema: with the average of the weights in their place. Raises CheckpointError, the same on all ranks.
    """
    prefix = weights_prefix(found, use_ema)
    try:
        checkpointer.load(found.path, {f"{prefix}{n}": p.detach() for n, p in model.named_parameters()}, prefix=prefix)
    except DamagedCheckpoint as error:
        _refuse(found.path, error, refused)
        return False
    return True


def weights_prefix(found: Found, use_ema: bool) -> str:
    """What the names of its weights begin with. Raises CheckpointError where there is no average that is wanted."""
    if use_ema and not found.meta.config.get("training", {}).get("ema_decay"):
        raise CheckpointError(
            f"{found.path} has no average of the weights, because training.ema_decay was 0: take the weights"
            " themselves, or train with an ema_decay above 0"
        )
    return "ema." if use_ema else "model."


def config_of(found: Found) -> Config:
    """The config of the run that saved it. Keys that this version does not know are left out, but not of the model."""
    tables: dict[str, dict[str, Any]] = {}
    try:
        unknown = sorted(found.meta.config["model"].keys() - SCHEMA["model"].keys())
        for table, values in to_tables(found.meta.config).items():
            if schema := SCHEMA.get(schema_name(table)):
                tables[table] = {key: from_toml(schema[key], value) for key, value in values.items() if key in schema}
    except (KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{found.path}: its manifest holds no usable config: {error!r}") from error
    if unknown:
        raise CheckpointError(f"{found.path}: its config has model.{unknown[0]}, which this titanlite does not know")
    return from_tables(tables)


def load_tokenizer(config: Config, path: str | None = None) -> Tokenizer:
    """That of the config, or in `path`. Raises ValueError where the model has no row for some id."""
    tokenizer = Tokenizer.load(path or config.tokenizer.path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size = {config.model.vocab_size} is less than the {tokenizer.vocab_size} ids of the"
            f" tokenizer in tokenizer.path = {path or config.tokenizer.path!r}: raise model.vocab_size"
        )
    return tokenizer


def tokenizer_of(found: Found, config: Config, path: str | None) -> Tokenizer:
    """`load_tokenizer`, for a checkpoint. Raises ValueError where it is not the one of the training."""
    try:
        tokenizer = load_tokenizer(config, path)
    except ValueError as error:
        raise ValueError(f"{error}; or name the folder of the run's tokenizer with --tokenizer") from error
    check_tokenizer(found, tokenizer, path or config.tokenizer.path, "name that one's folder with --tokenizer")
    return tokenizer


def check_tokenizer(found: Found, tokenizer: Tokenizer, path: str, fix: str) -> None:
    """Raise ValueError where the tokenizer, which was read from `path`, is not that of the training."""
    saved = found.meta.tokenizer
    if not tokenizer.fingerprint.startswith(saved):
        raise ValueError(
            f"the tokenizer in {path!r} (fingerprint {tokenizer.fingerprint[:12]}) is not the one that {found.path} was"
            f" trained with ({saved[:12]}): {fix}"
        )


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
    """The model of a checkpoint, for those who use it and do not train it on. Collective.

    checkpoint: see `find_checkpoint`; what is damaged is passed over. dtype: of weights and activations; None is that
    of training's forward pass on this device. tokenizer_path: in place of the config's, whose fingerprint it must have.
    use_ema: see `load_weights`. Raises RunFailed or CheckpointError, the same on all ranks, in one line that names file
    or folder and fix.
    """
    assert mesh.dp_degree == 1, mesh.describe
    checkpointer = Checkpointer(checkpoint, keep_latest_k=0, async_save=False)
    refused: dict[str, str] = {}
    while True:
        found = find_together(checkpoint, refused)
        with agreed():
            config = config_of(found)
            tokenizer = tokenizer_of(found, config, tokenizer_path)
            model = empty_model(config, mesh)
        if load_weights(checkpointer, found, model, refused, use_ema=use_ema):
            model.to(dtype or param_dtype(config, mesh.device.type))
            return Pretrained(model.requires_grad_(False), config, tokenizer, found.path)


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

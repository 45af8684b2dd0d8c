"""Where a run starts: the decision between a checkpoint, given weights and new ones, told in one line."""

from collections.abc import Mapping
from typing import Any

from titanlite.checkpoint.checkpointer import Checkpointer
from titanlite.checkpoint.folder import CheckpointError, list_steps
from titanlite.config.sections import CheckpointConfig, OptimizerConfig, TrainingConfig
from titanlite.log import logger


def decide_start(
    config: CheckpointConfig, optimizer: OptimizerConfig, training: TrainingConfig, checkpointer: Checkpointer
) -> tuple[str | None, dict[str, Any]]:
    """The checkpoint to resume from and its meta, or None and none for a new run; logs which and why. Collective.

    Raises CheckpointError, on all ranks, where the config asks for what is not there, or has other state to fill.
    """
    folder = checkpointer.folder
    if not config.enable or config.resume == "never":
        why = 'checkpoint.resume = "never"' if config.enable else "checkpoint.enable = false"
        if list_steps(folder):  # a run from step 0 would also replace the logs of theirs
            raise CheckpointError(
                f'{why}, and {folder} holds checkpoints: name another job.dump_folder, or resume with "auto"'
            )
    else:
        if path := checkpointer.newest(config.load_step):
            which = "the newest valid one" if config.load_step < 0 else "checkpoint.load_step"
            logger.info('resuming from %s: checkpoint.resume = "%s", and it is %s', path, config.resume, which)
            meta = checkpointer.read_meta(path)
            _check_state(path, meta["config"], optimizer, training)
            return path, meta
        if config.resume == "must":
            raise CheckpointError(f'checkpoint.resume = "must", and there is no valid checkpoint in {folder}')
        if damaged := checkpointer.damaged():  # their run may have cost weeks: beginning anew is not ours to decide
            raise CheckpointError(
                f"{folder}: no valid checkpoint, and damaged ones that were set aside ({', '.join(damaged)}): put a"
                " copy of one in its place, or delete them to train anew"
            )
        why = f"no valid checkpoint in {folder}"
    weights = f"weights of {config.init_from}" if config.init_from else "newly drawn weights"
    logger.info("new run with %s: %s", weights, why)
    return None, {}


def weights_prefix(path: str, meta: Mapping[str, Any], use_ema: bool) -> str:
    """What the names of the weights in checkpoint `path` with this `meta` begin with.

    Raises CheckpointError where their average is wanted, and there is none.
    """
    if use_ema and not meta.get("config", {}).get("training", {}).get("ema_decay"):
        raise CheckpointError(
            f"{path} has no average of the weights, because training.ema_decay was 0: take the weights themselves, or"
            " train with an ema_decay above 0"
        )
    return "ema." if use_ema else "model."


def _check_state(
    path: str, saved: Mapping[str, Mapping[str, Any]], optimizer: OptimizerConfig, training: TrainingConfig
) -> None:
    """Raise CheckpointError where the run that saved checkpoint `path`, with config `saved`, had another optimiser, or
    an average of the weights and this one has none, or the other way round."""
    before = saved["optimizer"].get("name", "adamw")
    anew = "begin a new run, in another job.dump_folder, from these weights (checkpoint.init_from)"
    if before != optimizer.name:
        raise CheckpointError(
            f'{path} was saved by optimizer.name = "{before}" and this run has "{optimizer.name}": set it as it was, or'
            f" {anew}"
        )
    decay = saved["training"].get("ema_decay", 0.0)
    if bool(decay) != bool(training.ema_decay):
        raise CheckpointError(
            f"{path} was saved with training.ema_decay = {decay}, so it has {'an' if decay else 'no'} average of the"
            f" weights, and this run has {training.ema_decay}: set it to {decay}, or {anew}"
        )

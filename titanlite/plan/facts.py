"""The numbers of a plan, from a config and a number of ranks, as plain values under the names that --json prints."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_type_hints

from titanlite.config import Config, resolve_degrees
from titanlite.config.sections import ActivationCheckpointConfig
from titanlite.data.cache.writer import WritingStopped
from titanlite.data.corpus import open_corpus
from titanlite.model.transformer import flops_per_token, num_parameters
from titanlite.plan.step import SHALLOW, Footprint, fake_ranks, fake_step, footprint
from titanlite.tokenizer import Tokenizer
from titanlite.trainer import param_dtype

MODES = get_type_hints(ActivationCheckpointConfig)["mode"].__args__


def plan_facts(
    config: Config,
    world_size: int,
    *,
    device: str,
    peak_flops: float | None,
    mfu: float,
    exact: bool,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """All sections of a plan, sizes in bytes and times in seconds.

    Raises ValueError for what cannot run, or cannot be planned.
    """
    target = "cpu" if device == "cpu" else "cuda"
    degrees = resolve_degrees(config.parallelism, world_size)
    memory: dict[str, Any] = {}
    footprints: dict[str, Footprint] = {}
    with fake_ranks(*degrees) as mesh:

        def trace(shallow: Config) -> Footprint:
            traced = fake_step(shallow, mesh, target)
            progress()
            return traced

        for mode in MODES:
            checkpointed = replace(config, activation_checkpoint=ActivationCheckpointConfig(mode))
            footprints[mode] = found = footprint(checkpointed, trace, exact)
            phases: dict[str, int] = {}
            for moment, peak in found.peaks.items():
                phases[moment.phase] = max(peak, phases.get(moment.phase, 0))
            memory[mode] = {"activations": found.activations, "peak": max(phases.values()), "peaks": phases}
    configured = footprints[config.activation_checkpoint.mode]
    training, model, dp_degree = config.training, config.model, degrees[0] * degrees[1]
    return {
        "model": {
            "parameters": num_parameters(model),
            "parameters_without_embedding": num_parameters(model) - model.vocab_size * model.dim,
            "flops_per_token": flops_per_token(model, training.seq_len),
        },
        "layout": {
            "world_size": world_size,
            **dict(zip(("dp_replicate", "dp_shard", "tp"), degrees, strict=True)),
            "rows_per_rank": training.global_batch_size // dp_degree,
            "micro_batches": -(-training.global_batch_size // dp_degree // training.local_batch_size),
            "activation_checkpoint": config.activation_checkpoint.mode,
            "optimizer": config.optimizer.name,
            "computes_in": str(param_dtype(config, target)).removeprefix("torch."),
            "traced_layers": [model.n_layers] if exact or model.n_layers <= SHALLOW[-1] else list(SHALLOW),
        },
        "bytes_per_rank": {
            "parameters": configured.parameters,
            "gradients": configured.gradients,
            "optimizer": configured.optimizer,
            "average": configured.average,
            "by_activation_checkpoint": memory,
        },
        "checkpoint": {"bytes": configured.checkpoint, "kept": config.checkpoint.keep_latest_k},
        "run": _run(config, world_size, device, peak_flops, mfu),
        "data": data_facts(config),
    }


def _run(config: Config, world_size: int, device: str, peak_flops: float | None, mfu: float) -> dict[str, Any]:
    training = config.training
    tokens_per_step = training.global_batch_size * training.seq_len
    facts: dict[str, Any] = {
        "steps": training.steps,
        "tokens_per_step": tokens_per_step,
        "tokens": training.steps * tokens_per_step,
        "device": device,
        "mfu": mfu,
        "peak_flops": peak_flops,
        "step_seconds": None,
        "seconds": None,
    }
    if peak_flops is not None:
        flops_per_step = tokens_per_step * flops_per_token(config.model, training.seq_len)
        facts["step_seconds"] = flops_per_step / (world_size * peak_flops * mfu)
        facts["seconds"] = training.steps * facts["step_seconds"]
    return facts


def data_facts(config: Config) -> dict[str, Any]:
    """What the run reads of each source, or why that is not known."""
    training, data = config.training, replace(config.data, reader="auto")
    try:
        tokenizer = Tokenizer.load(config.tokenizer.path)
        # A cache that is not there is not written: it may take hours.
        corpus = open_corpus(data, tokenizer, seq_len=training.seq_len, seed=training.seed, stop=lambda: True)
    except WritingStopped:
        return {"unknown": "no token cache yet, which these files need: python -m titanlite.cache writes it"}
    except (ValueError, OSError) as error:
        return {"unknown": f"{error}"}
    dealt = corpus.deck.dealt(training.steps * training.global_batch_size).tolist()
    sources = {}
    for (name, manifest), rows in zip(corpus.manifest["sources"].items(), dealt, strict=True):
        epochs = rows * training.seq_len / manifest["num_tokens"]
        sources[name] = {
            "files": manifest["num_files"],
            "documents": manifest["num_documents"],
            "tokens": manifest["num_tokens"],
            "tokens_are_estimated": manifest["reader"] != "cached",
            "trained_tokens": rows * training.seq_len,
            "epochs": epochs,
            "trained_documents": round(epochs * manifest["num_documents"]),
        }
    return {"sources": sources}

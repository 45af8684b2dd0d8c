"""A plan as tables for people."""

from typing import Any

from titanlite.inspection.transcript import aligned

PHASES = ("init", "forward", "loss", "backward", "optimizer")
NOT_MODELLED = """\
not modelled: fragmentation of the allocator, buffers of NCCL, the CUDA context (about 0.5 GiB), temporary buffers
inside kernels, and compile.enable, with which blocks keep less. Collectives are counted as FSDP2 starts them, on rank
0, whose shards are the largest; each tensor is rounded up to 512 bytes. The memory of flex is that of its inputs, its
output and the log-sum-exp; of dense, that of a fused kernel with an S x S mask. Time: model FLOPs at the assumed MFU;
no saves, no start, no failures."""
MUON = """
Muon spreads the matrices of all blocks over the ranks otherwise than those of two or three: for its peak in the
optimizer, give --exact."""


def tables(facts: dict[str, Any]) -> str:
    """All sections, in the order of --json."""
    sections = [_model(facts), _memory(facts), _checkpoint(facts["checkpoint"]), _run(facts), _data(facts["data"])]
    return "\n\n".join([*sections, NOT_MODELLED])


def _model(facts: dict[str, Any]) -> str:
    model, layout = facts["model"], facts["layout"]
    return _pairs(
        "model and layout",
        {
            "parameters": f"{model['parameters']:,}",
            "without the embedding": f"{model['parameters_without_embedding']:,}",
            "FLOPs per token": f"{model['flops_per_token']:.4g} (nominal, forward and backward)",
            "ranks": f"{layout['world_size']:,} = dp_replicate {layout['dp_replicate']} x dp_shard"
            f" {layout['dp_shard']} x tp {layout['tp']}",
            "rows of a step": f"{layout['rows_per_rank']:,} on each data-parallel rank, in"
            f" {layout['micro_batches']:,} micro-batches",
            "computes in": layout["computes_in"],
            "traced": f"one step of {' and '.join(map(str, layout['traced_layers']))} layers on fake ranks"
            + (", extended linearly" if len(layout["traced_layers"]) > 1 else ""),
        },
    )


def _memory(facts: dict[str, Any]) -> str:
    memory, configured = facts["bytes_per_rank"], facts["layout"]["activation_checkpoint"]
    state = {key: _gib(memory[key]) for key in ("parameters", "gradients")}
    state[f"optimizer ({facts['layout']['optimizer']})"] = _gib(memory["optimizer"])
    if memory["average"]:
        state["average of the weights"] = _gib(memory["average"])
    lines = [["activation checkpoint", "activations", *(f"in {phase}" for phase in PHASES), "peak"]]
    for mode, its in memory["by_activation_checkpoint"].items():
        mark = " (configured)" if mode == configured else ""
        peaks = [_gib(its["peaks"][phase]) for phase in PHASES]
        lines.append([mode + mark, _gib(its["activations"]), *peaks, _gib(its["peak"])])
    activations = "activations: kept by a micro-batch's forward pass for its backward pass. in ...: largest sum of all"
    extended_muon = facts["layout"]["optimizer"] == "muon" and len(facts["layout"]["traced_layers"]) > 1
    notes = f"{activations} tensors then{MUON * extended_muon}"
    return f"{_pairs('GiB per rank', state)}\n\n{aligned(lines)}\n{notes}"


def _checkpoint(checkpoint: dict[str, Any]) -> str:
    size, kept = checkpoint["bytes"], checkpoint["kept"]
    all_kept = f"{_gib(kept * size)} GiB for the {kept} that are kept" if kept else "all are kept"
    return _pairs("checkpoint", {"size": f"{_gib(size)} GiB; {all_kept}"})


def _run(facts: dict[str, Any]) -> str:
    run, world_size = facts["run"], facts["layout"]["world_size"]
    pairs = {
        "steps": f"{run['steps']:,} of {run['tokens_per_step']:,} tokens",
        "tokens": f"{run['tokens']:,}, {run['tokens'] / facts['model']['parameters']:.1f} per parameter",
    }
    if run["seconds"] is None:
        pairs["time"] = f"not known: the peak of {run['device']} is not; give --peak_tflops"
    else:
        hours = run["seconds"] / 3600
        pairs["assumed"] = f"{run['device']}, {run['peak_flops'] / 1e12:,.4g} TFLOP/s each, MFU {run['mfu']:.0%}"
        pairs["time of a step"] = f"{run['step_seconds']:,.3g} s, {run['tokens_per_step'] / run['step_seconds']:,.0f}"
        pairs["time of a step"] += " tokens/s"
        pairs["time"] = f"{hours / 24:,.1f} days ({hours:,.1f} h), {hours * world_size:,.0f} device hours"
    return _pairs("run", pairs)


def _data(data: dict[str, Any]) -> str:
    if "unknown" in data:
        return _pairs("data", {"documents and epochs": f"not known: {data['unknown']}"})
    lines = [["source", "files", "documents", "tokens", "trained tokens", "trained documents", "epochs"]]
    for name, source in data["sources"].items():
        about = "~" if source["tokens_are_estimated"] else ""
        lines.append(
            [
                name,
                f"{source['files']:,}",
                f"{source['documents']:,}",
                f"{about}{source['tokens']:,}",
                f"{source['trained_tokens']:,}",
                f"{about}{source['trained_documents']:,}",
                f"{about}{source['epochs']:.3g}",
            ]
        )
    return f"data\n{aligned(lines)}"


def _pairs(title: str, pairs: dict[str, str]) -> str:
    width = max(map(len, pairs))
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in pairs.items())])


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"

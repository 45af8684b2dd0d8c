"""Show that a promise holds: python -m titanlite.verify checkpoint DIR
python -m titanlite.verify isolation --job.config_file FILE [--section.key VALUE ...]
python -m titanlite.verify data --job.config_file FILE [--steps N] [--section.key VALUE ...]
"""

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from titanlite.command import exit_code
from titanlite.config import load_config, take_number

if TYPE_CHECKING:
    from titanlite.checkpoint import Meta

USAGE = """\
usage: python -m titanlite.verify checkpoint DIR
       python -m titanlite.verify isolation --job.config_file FILE [--section.key VALUE ...]
       python -m titanlite.verify data --job.config_file FILE [--steps N] [--section.key VALUE ...]

checkpoint   Read every byte and every tensor of the checkpoints in DIR (a step's folder, a folder of checkpoints or a
             run's folder) and name each file that is damaged, missing or unknown. Needs no GPU, no model and no run.
isolation    On the data and the model of a run, put noise in the place of every document but one (then of every second
             one) and show that no bit of what stays is another: positions, logits, loss terms and gradients, in
             training with every attention backend that can run here, in validation where that is enabled, and in
             generation, where prompts of different lengths share a batch with a KV cache. Takes the options of
             titanlite.train.
data         Read every document of a run's data once and print what there is, what an epoch and the training make of
             it (a ledger of every token), and bad records by file and line. Then make N steps (default: 8; the first,
             the last, one in each epoch, random ones) again document by document, from text and token cache, and show
             that rows, fingerprints, cursors and ledgers of the training stream, and those that a run in
             job.dump_folder logged, are the same. Needs no GPU and no model. Takes the options of titanlite.train.

Exit code: 0 if all is well, 1 if not, with the first thing wrong named.
"""


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 all is well, 1 not, or a mistake told in one line."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if command in ("--help", "-h") or (command == "checkpoint" and set(rest) & {"--help", "-h"}):
        print(USAGE, end="")
        return 0
    commands: dict[str, Callable[[list[str]], bool]] = {"checkpoint": checkpoint, "isolation": isolation, "data": data}

    def work() -> bool:
        if command not in commands:
            raise ValueError(f"{command!r} is nothing to verify: name one of {', '.join(commands)}, or --help")
        return commands[command](rest)

    return exit_code(work)


def checkpoint(argv: list[str]) -> bool:
    """Check every checkpoint in the folder that `argv` names, oldest first; true if none has a fault."""
    if len(argv) != 1:
        raise ValueError(f"verify checkpoint takes one folder, not {len(argv)} arguments")
    folder = argv[0]
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: no such folder")
    # From here on torch is imported, which takes seconds: a mistake in the command line should not.
    from tqdm import tqdm

    from titanlite.checkpoint import Meta, audit_checkpoint, list_steps

    steps = list_steps(folder) or list_steps(os.path.join(folder, "checkpoint"))
    paths = list(steps.values()) or [folder]
    num_bad = 0
    for path in paths:
        with tqdm(total=2 * _size(path), desc=path, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            audit = audit_checkpoint(path, bar.update)
        print(path)
        if audit.manifest:
            meta = Meta.from_json(path, {"config": {}, **audit.manifest["meta"], "step": audit.manifest["step"]})
            for name, value in _describe(meta, audit.manifest).items():
                print(f"  {name:<8} {value}")
            size = f"{audit.num_bytes / 1e6:,.1f} MB"
            print(f"  {'holds':<8} {audit.num_tensors:,} tensors in {len(audit.manifest['files']):,} files, {size}")
        for problem in audit.problems:
            print(f"  {'WRONG':<8} {problem}")
        if not audit.problems:
            print(f"  {'right':<8} every file has its size and checksum, every tensor was read, nothing else is here")
        num_bad += bool(audit.problems)
    counted = f"{len(paths)} checkpoint{'s' * (len(paths) > 1)}"
    print(f"{counted}: {num_bad} DAMAGED" if num_bad else f"{counted}: all right")
    return num_bad == 0


def _size(path: str) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())


def _describe(meta: "Meta", manifest: dict[str, Any]) -> dict[str, str]:
    """What a checkpoint is of, as far as its manifest tells."""
    job = meta.config.get("job", {})
    return {
        "run": meta.imported or " ".join(filter(None, (job.get("dump_folder", "unknown"), job.get("description")))),
        "step": f"{meta.step:,}, {meta.trained_targets:,} target tokens trained",
        "saved": f"{manifest.get('created')} on {meta.layout}",
        "by": f"format {manifest['format_version']}, torch {manifest.get('torch')}, python {manifest.get('python')}",
    }


def isolation(argv: list[str]) -> bool:
    """Compare on every path and backend that can run here; true if no bit differs."""
    if set(argv) & {"--help", "-h"}:
        print(USAGE)
    config = load_config(argv)
    import torch

    from titanlite.log import init_logging
    from titanlite.verify.isolation import compare

    init_logging()
    table = "{:<10} {:<15} {:<9} {:>9} {:>7} {:>9}  {:<9}  {:<6}  {:<6}  {:<9}"
    kinds = ("positions", "logits", "loss", "gradients")
    faults, last = [], None
    for batch, found in compare(config, torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        if batch is not last:
            print(f"{found.path}: {batch.origin}")
            print(*(f"  {kept.name}" for kept in batch.comparisons), sep="\n")
            print(table.format("path", "backend", "dtype", "documents", "tokens", "replaced", *kinds))
            last = batch
        backend, dtype = found.backend + ", compiled" * found.compiled, str(found.dtype).removeprefix("torch.")
        if found.not_run:
            print(f"{found.path:<10} {backend:<15} {dtype:<9} not run: {found.not_run}", flush=True)
            continue
        counts = (f"{n:,}" for n in (found.num_documents, found.num_tokens, found.num_replaced))
        missing = "not compared: no backward pass here" if batch.trains else "-"
        said = {True: "same", False: "DIFFER", None: missing}
        verdicts = (said[found.identical.get(kind)] for kind in kinds)
        print(table.format(found.path, backend, dtype, *counts, *verdicts).rstrip(), flush=True)
        if found.difference:
            faults.append(f"NOT ISOLATED: {found.path}, {backend}: {found.difference}")
    print("\n".join(faults) or "isolated: no bit differs")
    return not faults


def data(argv: list[str]) -> bool:
    """Count and prove the data of a config; true, as the first thing that is not right is raised."""
    if set(argv) & {"--help", "-h"}:
        print(USAGE)
    steps, arguments = take_number(argv, "--steps", 8, 2, "steps to prove")
    config = load_config(arguments)
    from titanlite.log import init_logging
    from titanlite.verify.accounts import audit

    init_logging()
    try:
        audit(config, steps)
    except RuntimeError as error:  # a bug of the tokenizer, with the document's place
        raise ValueError(error) from error
    return True


if __name__ == "__main__":
    sys.exit(main())

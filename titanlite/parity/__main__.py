"""Does training depend on the layout? python -m titanlite.parity --job.config_file FILE --layouts 1x1,2x1,1x2

Runs one config under several layouts and compares every tensor of every step with the first. `--help` explains it.
"""

import argparse
import math
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from titanlite.parity.layouts import SYNTAX, Layout, read_layouts

if TYPE_CHECKING:
    from titanlite.parity.comparison import Difference, Records

DESCRIPTION = """\
Run the first steps of a config under each layout, on ranks that this command starts itself, and compare them with the
first layout, on every rank and in the order of computation: initial weights; then at each step the batch, document
starts, positions, hidden states, loss, every gradient, gradient norm and every weight. Then, with the last weights:
  validation  The set's documents, targets and bytes, and the loss summed over as many of its rows as a step has. It is
              [validation]'s set, but at most 100 documents of each source; without validation.enable, of the corpus.
  generation  Pieces of a row as prompts of different length, continued in one batch with a KV cache: the logits of 4
              tokens behind each. The weights are gathered into a second model, as generation has it: tensor-parallel
              as the layout, not compiled.
The table shows the largest relative difference of each: the norm of a tensor's difference over the norm of the tensor,
estimated from 8 random projections. Where something differs by more than the bound, the first such tensor is named.

Nothing is written into the run folder, and no checkpoint is read but checkpoint.init_from.
Exit code 0: all layouts agree within the bound. 1: one differs, fails or hangs, and a line says which.
"""


@dataclass(frozen=True)
class Outcome:
    """What came of a layout."""

    layout: Layout
    seconds: float = 0.0
    differences: "tuple[Difference, ...]" = ()
    """Of every quantity, in the order of computation. Empty where the layout failed."""
    problem: str = ""
    """Why the layouts do not agree, in one line; empty where they do."""


def main(argv: list[str] | None = None) -> int:
    options, arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory(prefix="titanlite-parity-") as folder:
        try:
            if options.steps < 1:
                raise ValueError(f"--steps {options.steps}: must be 1 or more")
            float64 = options.dtype == "float64"
            layouts = read_layouts(options.layouts, arguments, Path(folder), float64=float64)
            layouts, device = place(layouts, options.device)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind: no rank and no folder stays behind
        training = layouts[0].config.training
        print(
            f"{options.steps} steps of {training.global_batch_size} rows of {training.seq_len} tokens on {device},"
            f" weights in {training.dtype}; attention = {layouts[0].config.model.attention}; bound {options.bound:g}",
            file=sys.stderr,
        )
        try:
            outcomes, reference = run_layouts(layouts, device, options)
        except KeyboardInterrupt:
            print("titanlite: interrupted", file=sys.stderr)
            return 130
    if reference:
        print(table(outcomes, reference))
    problems = [outcome.problem for outcome in outcomes if outcome.problem]
    for problem in problems:
        print(f"titanlite: {problem}", file=sys.stderr)
    if reference and not problems:
        steps = f"all {len(reference[0].steps)} steps, validation and generation"
        print(f"all {len(outcomes)} layouts agree within {options.bound:g} in {steps}")
    return 1 if problems else 0


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The verb's own options, and the config's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m titanlite.parity",
        usage="%(prog)s --job.config_file FILE --layouts LAYOUT,LAYOUT,... [options] [--section.key VALUE ...]",
        description=DESCRIPTION,
        epilog=SYNTAX,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--layouts", required=True, help="what to compare, see below")
    add("--steps", type=int, default=20, help="steps to run under each layout (default: 20)")
    add("--bound", type=float, default=1e-9, help="largest relative difference that passes (default: 1e-9)")
    add(
        "--dtype",
        choices=("float64", "config"),
        default="float64",
        help="float64 (default): weights, activations and reductions in float64. config: in the config's own types,"
        " which need another bound",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto (default): the GPUs where there are enough for every layout, else the CPU",
    )
    add(
        "--timeout", type=float, default=600, help="seconds without a step until a layout counts as hung (default: 600)"
    )
    return parser.parse_known_args(argv)


def place(layouts: list[Layout], device: str) -> tuple[list[Layout], str]:
    """The device type to run on, and the layouts as they can run there. Raises ValueError where GPUs are missing."""
    import torch

    needed = max(layouts, key=lambda layout: layout.world_size)
    num_gpus = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and num_gpus == 0):
        return layouts, "cpu"
    if num_gpus < needed.world_size:
        message = f"layout {needed.text} needs {needed.world_size} GPUs and this machine has {num_gpus}"
        if device == "cuda":
            raise ValueError(f"{message}: leave it out, or use --device cpu")
        print(f"{message}: running on the CPU", file=sys.stderr)
        return layouts, "cpu"
    for i, layout in enumerate(layouts):  # what auto means there has no float64 kernel
        config = layout.config
        if config.model.attention == "auto" and config.training.mixed_precision_param == "float64":
            layouts[i] = replace(layout, config=replace(config, model=replace(config.model, attention="dense")))
    return layouts, "cuda"


def run_layouts(
    layouts: list[Layout], device: str, options: argparse.Namespace
) -> tuple[list[Outcome], "Records | None"]:
    """What came of each layout, and what the first one's ranks recorded; without that no other is run."""
    from titanlite.parity.comparison import compare
    from titanlite.parity.launch import RanksFailed, run_ranks
    from titanlite.parity.recording import record

    outcomes: list[Outcome] = []
    reference: Records | None = None
    for number, layout in enumerate(layouts, 1):
        progress = LayoutProgress(f"{number} of {len(layouts)}: {layout.text}", options.steps)
        try:
            run = run_ranks(
                layout.world_size,
                record,
                layout.config,
                options.steps,
                environment={"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {},
                timeout_seconds=options.timeout,
                progress=progress.step,
            )
        except RanksFailed as error:
            moment = f", after step {progress.last}" if progress.last else ""
            outcomes.append(Outcome(layout, problem=f"layout {layout.text}{moment}: {error}"))
            progress.end("failed")
            if reference is None:
                break
            continue
        reference = reference or run
        differences = tuple(compare(reference, run, options.bound))
        first = next((d for d in differences if d.size > options.bound), None)
        who = f"layout {layout.text} differs from {layouts[0].text}" if number > 1 else f"ranks of {layout.text} differ"
        problem = f"{who}, first {first}" if first else ""
        outcomes.append(Outcome(layout, progress.seconds, differences, problem))
        progress.end(f"largest difference {max(d.size for d in differences):.1e}" if number > 1 else "the reference")
    return outcomes, reference


class LayoutProgress:
    """Says on stderr how far a layout has come, in one line where someone watches, else now and then."""

    def __init__(self, title: str, steps: int) -> None:
        self.title, self.steps, self.last = title, steps, 0
        self._start = time.monotonic()
        self._said = -math.inf
        self._say("starting", self._start)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def step(self, number: int) -> None:
        self.last = number
        self._say(f"step {number} of {self.steps}", time.monotonic())

    def end(self, text: str) -> None:
        self._say(f"{text} ({self.seconds:.0f} s)", math.inf)
        if sys.stderr.isatty():
            print(file=sys.stderr)

    def _say(self, text: str, now: float) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{self.title}: {text}", end="", file=sys.stderr, flush=True)
        elif now - self._said >= 30:
            self._said = now
            print(f"{self.title}: {text}", file=sys.stderr, flush=True)


def table(outcomes: list[Outcome], reference: "Records") -> str:
    """All layouts, then all steps: the reference's numbers and each layout's largest difference from them."""
    from titanlite.parity.comparison import digest

    weights = digest(reference[0])
    width = max(len(outcome.layout.text) for outcome in outcomes)
    lines = [f"     {'layout':{width}}  ranks  seconds  initial weights   batches  largest difference"]
    for number, outcome in enumerate(outcomes, 1):
        lead = f"{number:3}  {outcome.layout.text:{width}}  {outcome.layout.world_size:5}  {outcome.seconds:7.0f}  "
        if not outcome.differences:
            lines.append(lead + "failed")
            continue
        largest = max(outcome.differences, key=lambda d: d.size)
        same_weights = all(d.size == 0 for d in outcome.differences if d.step == 0)
        batches = [d.size == 0 for d in outcome.differences if d.what == "batch"]
        lead += f"{weights if same_weights else 'differ':16}  {f'{sum(batches)}/{len(batches)}':7}  "
        lines.append(lead + (f"{largest.size:.1e} {largest.place}" if largest.size else "none"))
    columns = "".join(f"{number:9}" for number in range(1, len(outcomes) + 1))
    lines += ["", f"step  batch             {'loss':16}  {'gradient norm':16}{columns}"]
    rows: list[tuple[int | str, str]] = [
        (step, f"{step:4}  {expected.fingerprint}  {expected.loss:<16.13g}  {expected.grad_norm:<16.13g}")
        for step, expected in enumerate(reference[0].steps, 1)
    ]
    end = reference[0].end
    prompts = f"{len(end.lengths)} prompts of {min(end.lengths):,} to {max(end.lengths):,}"
    rows += [
        ("validation", f"validation: loss {end.loss:.13g}, summed over {end.num_rows:,} rows"),
        ("generation", f"generation: {len(end.logits)} tokens behind {prompts}"),
    ]
    for step, text in rows:
        sizes = [max((d.size for d in o.differences if d.step == step), default=None) for o in outcomes]
        shown = "".join(f"{'-' if size is None else f'{size:.1e}' if size else '0':>9}" for size in sizes)
        lines.append(f"{text:<58}{shown}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

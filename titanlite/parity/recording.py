"""What a rank notes of a run, so that runs on different layouts can be compared: sketches of tensors, and digests.

The real job runs, of which nothing is replaced. Hooks keep references inside a block and compute outside of it, where
neither activation checkpointing nor a compiler looks.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titanlite.config import Config, ValidationConfig
from titanlite.model.attention import Documents
from titanlite.parity.ending import EndRecord, note_end
from titanlite.parity.sketches import Sketches, random_tensor, sketch, sketch_parameter, whole_tensor
from titanlite.run.agreement import RunFailed
from titanlite.train.run import Run, Step
from titanlite.trainer import StepResult, Trainer

IN_BLOCK = ("attention_norm", "attention", "ffn_norm", "feed_forward")
PARTS = (*IN_BLOCK[:3], "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")  # IN_BLOCK, as it is computed


@dataclass(frozen=True)
class StepRecord:
    """What one rank saw of one step. Sketches [B, ...] are of each of its B rows."""

    fingerprint: str
    row_digests: np.ndarray
    """uint64 [B], as the loader gave them."""
    inputs: Sketches
    """[B, ...]: facts about documents and the rotary tables, which tensor-parallel peers hold alike."""
    activations: Sketches
    """[B, ...]: hidden states. Each tensor-parallel peer holds a part of the sequence: their sketches add up."""
    loss: float
    gradients: Sketches
    """Before clipping."""
    grad_norm: float
    weights: Sketches
    """After the update; and of their average, where there is one."""


@dataclass(frozen=True)
class RankRecord:
    dp_rank: int
    tp_rank: int
    initial: dict[str, str]
    """A digest of the bits of every parameter, whole, before the first step; in the order of computation."""
    steps: list[StepRecord]
    end: EndRecord


def record(config: Config, steps: int, progress: Callable[[int], None] = lambda step: None) -> RankRecord:
    """Run the first `steps` steps of a job on this rank, fewer where the data end, then validate and generate.

    Collective. `progress` hears of each step. Raises RunFailed as a job does, and when it was asked to stop.
    """
    made: list[StepRecord] = []
    with Run(replace(config, validation=ValidationConfig())) as run:
        recorder = Recorder(run.trainer, config)
        initial = recorder.digests()
        progress(0)
        while run.trainer.step < steps:
            step = run.next_step()
            if step is None:
                if asked := run.watchdog.stop_asked:
                    raise RunFailed(f"stopped by {asked}")
                if not made:
                    raise RunFailed("the data end before the first step")
                break
            outcome = run.trainer.train_step(step.batch, step.num_targets)
            made.append(recorder.step(step, outcome))
            run.finish_step(step, outcome)
            progress(run.trainer.step)
            rows = step.batch.rows
        end = note_end(run, config, rows)
        return RankRecord(run.mesh.dp_rank, run.mesh.tp.get_local_rank(), initial, made, end)


class Recorder:
    """Watches a trainer's steps."""

    def __init__(self, trainer: Trainer, config: Config) -> None:
        self._trainer = trainer
        self._seq_len = config.training.seq_len
        self._first_position = trainer.mesh.tp.get_local_rank() * (self._seq_len // trainer.mesh.tp.size())
        self._inputs: dict[str, list[Tensor]] = {}
        self._activations: dict[str, list[Tensor]] = {}
        self._gradients: Sketches = {}
        self._in_block: list[tuple[str, Tensor]] | None = None  # what the block at work has computed by now
        trainer.on_gradients = self._note_gradients
        model = trainer.model
        model.register_forward_pre_hook(self._note_documents)
        model.layers["0"].register_forward_pre_hook(self._note_rotary_tables)
        for name in ("tok_embeddings", "norm"):
            model.get_submodule(name).register_forward_hook(functools.partial(self._note_hidden, name))
        for number, block in model.layers.items():
            block.register_forward_pre_hook(self._enter_block)
            if not config.compile.enable:  # a compiler would take the hooks for a part of the block
                for name in IN_BLOCK:
                    hook = functools.partial(self._keep, f"layers.{number}.{name}")
                    block.get_submodule(name).register_forward_hook(hook)
            block.register_forward_hook(functools.partial(self._leave_block, f"layers.{number}"))

    def digests(self) -> dict[str, str]:
        return {
            name: hashlib.blake2b(whole_tensor(p).cpu().contiguous().numpy().tobytes(), digest_size=8).hexdigest()
            for name, p in self._parameters()
        }

    def step(self, step: Step, result: StepResult) -> StepRecord:
        """The record of the step that was just made. Collective."""
        inputs, self._inputs = self._inputs, {}
        activations, self._activations = self._activations, {}
        gradients, self._gradients = self._gradients, {}
        averaged = self._trainer.average.tensors if self._trainer.average else {}
        averages = {f"ema.{name}": sketch_parameter(tensor) for name, tensor in averaged.items()}
        return StepRecord(
            fingerprint=step.fingerprint,
            row_digests=step.batch.row_digest,
            inputs={name: torch.cat(parts).cpu().numpy() for name, parts in inputs.items()},
            activations={name: torch.cat(parts).cpu().numpy() for name, parts in activations.items()},
            loss=result.loss.item(),
            gradients=gradients,
            grad_norm=result.grad_norm.item(),
            weights={name: sketch_parameter(p) for name, p in self._parameters()} | averages,
        )

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        """All parameters, in the order of computation."""
        model = self._trainer.model
        modules = ["tok_embeddings", *(f"layers.{number}.{name}" for number in model.layers for name in PARTS), "norm"]
        modules += [] if model.config.tie_embeddings else ["output"]
        found = [(f"{name}.{key}", p) for name in modules for key, p in model.get_submodule(name).named_parameters()]
        assert {name for name, _ in found} == {name for name, _ in model.named_parameters()}, "a parameter is left out"
        return found

    @torch.no_grad()
    def _note_gradients(self) -> None:
        for name, p in reversed(self._parameters()):  # None: nothing reached it
            self._gradients[name] = sketch_parameter(torch.zeros_like(p) if p.grad is None else p.grad)

    @torch.no_grad()
    def _note_documents(self, model: nn.Module, arguments: tuple[Tensor, Documents]) -> None:
        documents = arguments[1]
        self._note(self._inputs, "document starts", documents.starts.unsqueeze(-1))
        self._note(self._inputs, "positions", documents.positions.unsqueeze(-1))

    @torch.no_grad()
    def _note_rotary_tables(self, block: nn.Module, arguments: tuple[Tensor, Tensor, Documents]) -> None:
        cosines, sines = arguments[1].unbind(-1)
        self._note(self._inputs, "rotary cosines", cosines)
        self._note(self._inputs, "rotary sines", sines)

    @torch.no_grad()
    def _note_hidden(self, name: str, module: nn.Module, arguments: object, output: Tensor) -> None:
        local = output.to_local() if isinstance(output, DTensor) else output
        self._note(self._activations, name, local, self._first_position)

    def _enter_block(self, block: nn.Module, arguments: object) -> None:
        self._in_block = []

    def _keep(self, name: str, module: nn.Module, arguments: object, output: Tensor) -> None:
        if self._in_block is not None:  # else it is recomputed, in the backward pass
            self._in_block.append((name, output))

    def _leave_block(self, name: str, block: nn.Module, arguments: object, output: Tensor) -> None:
        kept, self._in_block = self._in_block or [], None
        for inner, tensor in [*kept, (name, output)]:
            self._note_hidden(inner, block, arguments, tensor)

    def _note(self, notes: dict[str, list[Tensor]], name: str, x: Tensor, first: int = 0) -> None:
        """Sketch each row of x [B, S, D]; of a part of the sequence, with the position where it begins."""
        rows = random_tensor(self._seq_len, "rows", x.device)[first : first + x.shape[1]]
        notes.setdefault(name, []).append(sketch(x.detach(), rows))

"""What the weights are worth once the last step is made: their validation, and what they generate.

Through the rooms of validation and generation as they are. Refuses to change training: nothing is done before it ends.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from titanlite.config import Config, ValidationConfig
from titanlite.data.order import HeldOut
from titanlite.loading import empty_model
from titanlite.model.decode import generate
from titanlite.parity.sketches import random_tensor, sketch, whole_tensor
from titanlite.run.agreement import RunFailed
from titanlite.run.joining import SAVING_SECONDS
from titanlite.train.run import Run
from titanlite.trainer import param_dtype
from titanlite.validation import Polling, open_validation_set, sum_of_losses

NUM_DOCUMENTS = 100
"""Documents of each source in the validation set, at most."""
NUM_PROMPTS, NUM_GENERATED = 4, 4


@dataclass(frozen=True)
class EndRecord:
    """What one rank made of the weights as the last step left them."""

    validation_set: str
    """Its documents, targets, bytes, rows and digest."""
    num_rows: int
    loss: float
    """Summed over all targets of the first `num_rows` rows of the set."""
    lengths: list[int]
    """Tokens of each prompt."""
    logits: np.ndarray
    """[NUM_GENERATED, prompts, NUM_PROJECTIONS + 1]: sketches of the logits of each token behind each prompt."""


def note_end(run: Run, config: Config, rows: Tensor) -> EndRecord:
    """rows: this rank's, of the last step. Collective. Raises RunFailed."""
    return EndRecord(*_validate(run, config), *_generate(run, rows))


def _validate(run: Run, config: Config) -> tuple[str, int, float]:
    """The set, the number of rows that are taken of it, as many as a step has, and their loss; see EndRecord.

    Of the config's validation set the first documents; where it has none, of the corpus. Collective.
    """
    wanted, corpus, trainer = config.validation, run.loader.opened, run.trainer
    if not wanted.enable:
        everything = math.nextafter(1.0, 0.0)
        held = {name: HeldOut(name, [file.name for file in of.files], everything) for name, of in corpus.texts.items()}
        sources = {name: replace(source, held_out=held[name]) for name, source in corpus.sources.items()}
        wanted, corpus = ValidationConfig(), replace(corpus, sources=sources)
    wanted = replace(wanted, max_documents=min(wanted.max_documents or NUM_DOCUMENTS, NUM_DOCUMENTS))
    run.watchdog.mark("opening the validation set", at_least=SAVING_SECONDS)
    found = open_validation_set(replace(config, validation=wanted), run.mesh, run.tokenizer, corpus, run.watchdog)
    num_rows = config.training.global_batch_size
    passes = torch.from_numpy(found.rows[: num_rows // (run.mesh.dp_degree * found.rows.shape[1])])
    goes_on = Polling(run.watchdog)
    nats = sum_of_losses(trainer.model, passes, run.mesh, run.tokenizer.eos_id, trainer.backend, goes_on)
    if nats is None:
        raise RunFailed(f"stopped by {run.watchdog.stop_asked or 'a signal to another rank'}")
    return str(found), min(num_rows, found.num_rows), nats


@torch.no_grad()
def _generate(run: Run, rows: Tensor) -> tuple[list[int], np.ndarray]:
    """Lengths of prompts, and sketches of the logits behind them; see EndRecord. Collective.

    Pieces of the global batch's first row, of different length, go through a cache as one batch, each with what follows
    in the row: which token is most probable may hang on a last bit. The weights are gathered into a model as generation
    has it, tensor-parallel as the layout; every data-parallel rank has one and does the same.
    """
    shared = [rows[0].tolist()]
    dist.broadcast_object_list(shared, src=0)
    (row,) = shared
    lengths = [max(1, len(row) >> n) for n in range(1, NUM_PROMPTS + 1)]
    texts = [(row[n:] + row * NUM_GENERATED)[: n + NUM_GENERATED] for n in lengths]
    run.watchdog.mark("generating", at_least=SAVING_SECONDS)
    model, trained = empty_model(run.config, run.mesh), dict(run.trainer.model.named_parameters())
    for name, p in model.named_parameters():
        whole = whole_tensor(trained[name]).to(run.mesh.device)
        if isinstance(p, DTensor):
            whole = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
        p.copy_(whole)
    model.to(param_dtype(run.config, run.mesh.device.type))
    sketches: list[np.ndarray] = []

    def choose(logits: Tensor) -> list[int]:
        sketches.append(sketch(logits.unsqueeze(1), random_tensor(1, "rows", logits.device)).cpu().numpy())
        return [text[n + len(sketches) - 1] for text, n in zip(texts, lengths, strict=True)]

    prompts = [text[:n] for text, n in zip(texts, lengths, strict=True)]
    for _ in generate(model, prompts, max_new_tokens=NUM_GENERATED, eos_id=-1, choose=choose, device=run.mesh.device):
        pass
    return lengths, np.stack(sketches)

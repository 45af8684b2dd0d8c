"""titanlite, and the loop that one would write by hand around the same model."""

from torch import Tensor

from benchmarks.step_overhead import BareLoop
from benchmarks.throughput.work import BETAS, EOS, LR, MAX_NORM, WEIGHT_DECAY, Case
from titanlite.config import (
    ActivationCheckpointConfig,
    CompileConfig,
    Config,
    LrSchedulerConfig,
    OptimizerConfig,
    TrainingConfig,
)
from titanlite.model.documents import Examples
from titanlite.parallel.mesh import build_mesh
from titanlite.trainer import Trainer


def config_of(case: Case) -> Config:
    return Config(
        model=case.model,
        training=TrainingConfig(
            steps=1_000_000,
            seq_len=case.seq_len,
            local_batch_size=case.rows,
            global_batch_size=case.rows * case.processes,
            max_norm=MAX_NORM,
            mixed_precision_param="bfloat16" if case.dtype == "bfloat16" else "float32",
        ),
        optimizer=OptimizerConfig(lr=LR, beta1=BETAS[0], beta2=BETAS[1], weight_decay=WEIGHT_DECAY),
        lr_scheduler=LrSchedulerConfig(decay_ratio=0.0),
        activation_checkpoint=ActivationCheckpointConfig(mode=case.activation_checkpoint),
        compile=CompileConfig(enable=case.compiled),
    )


class Titanlite:
    def __init__(self, case: Case) -> None:
        self.case = case
        self.trainer = Trainer(config_of(case), build_mesh(case.device, 1, case.processes, 1))

    def step(self, rows: Tensor) -> Tensor:
        examples = Examples.by_eos(rows, EOS)
        num_targets = int((examples.labels >= 0).sum()) * self.case.processes
        return self.trainer.train_step(examples, num_targets).loss

    def weights(self) -> dict[str, Tensor]:
        """Full weights by titanlite's names, a tied one under both, for the others to start from. Collective."""
        parameters = self.trainer.model.named_parameters(remove_duplicate=False)
        return {name: p.detach().full_tensor().cpu().clone() for name, p in parameters}  # type: ignore[attr-defined]


class Bare:
    """One document per row is where it does the same work: its attention is titanlite's."""

    def __init__(self, case: Case) -> None:
        ours = Titanlite(case)
        self.loop = BareLoop(config_of(case), ours.trainer.model, EOS, ours.trainer.backend)

    def step(self, rows: Tensor) -> Tensor:
        return self.loop.step(rows)

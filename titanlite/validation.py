"""Validation: the loss on documents that are not trained on, and what the model makes of some prompts meanwhile.

Owns when it is due, the pass over the set, the definition of its numbers, and `--validation.only`. The set, the same
each time and on every layout, is data/validation_set.py's; mask, backend and model are training's. Touches neither the
training stream nor a random generator, and leaves the model as it was: training with it is training without it, bit by
bit.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from titanlite.checkpoint import Checkpointer, list_steps
from titanlite.config import Config, resolve_degrees
from titanlite.data.corpus import Corpus, open_corpus
from titanlite.data.index import WritingStopped
from titanlite.data.validation_set import ValidationSet, build_validation_set, validation_sources
from titanlite.loading import Found, check_tokenizer, find_together, load_tokenizer, load_weights
from titanlite.log import logger
from titanlite.model.attention import build_documents, resolve_backend
from titanlite.model.decode import generate
from titanlite.model.documents import labels
from titanlite.model.selfcheck import check_backend
from titanlite.model.transformer import Llama
from titanlite.parallel.mesh import Mesh, build_mesh
from titanlite.run.agreement import RunFailed, agree_on, agreed
from titanlite.run.joining import SAVING_SECONDS, Membership
from titanlite.run.log import Report
from titanlite.run.watchdog import Watchdog
from titanlite.tokenizer import Tokenizer
from titanlite.trainer import Trainer, build_model, param_dtype


@dataclass(frozen=True)
class Result:
    """A line of metrics.jsonl, beside that of the step."""

    step: int
    tokens: int
    """Target tokens trained by then."""
    validation_loss: float
    """Sum of the loss over all targets of the set / their number, in nats; an eos is a target like any other."""
    perplexity: float
    bits_per_byte: float
    """That sum in bits / ValidationSet.num_bytes: the length of the texts, compressed by the model, over theirs."""
    validation_targets: int
    validation_set: str
    validation_seconds: float

    @property
    def numbers(self) -> str:
        return (
            f"validation loss {self.validation_loss:.4f}  perplexity {self.perplexity:.2f}"
            f"  bits per byte {self.bits_per_byte:.4f}  ({self.validation_seconds:.1f} s)"
        )


def result(nats: float, of: ValidationSet, step: int, tokens: int, seconds: float) -> Result:
    """From the sum of the loss over all targets of a set."""
    loss = nats / of.num_targets
    perplexity = math.exp(loss) if loss < 700 else math.inf
    bits_per_byte = nats / math.log(2) / of.num_bytes
    return Result(step, tokens, loss, perplexity, bits_per_byte, of.num_targets, of.digest, seconds)


@torch.no_grad()
def sum_of_losses(
    model: Llama, rows: Tensor, mesh: Mesh, eos_id: int, backend: str, goes_on: Callable[[], bool]
) -> float | None:
    """The loss summed over all targets of all ranks' rows [passes, B, seq_len + 1], in nats. Collective.

    All ranks have equally many passes. None as soon as `goes_on`, asked before each of them, says no, on all ranks.
    """
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    hidden_bar = True if dist.get_rank() else None
    try:
        for batch in tqdm(rows, desc="validating", unit="pass", delay=2, leave=False, disable=hidden_bar):
            if not goes_on():
                return None
            batch = batch.to(mesh.device, torch.int64)
            tokens = batch[:, :-1]
            hidden = model(tokens, build_documents(tokens, eos_id, backend))
            total += model.output(hidden, labels(batch, eos_id))
    finally:
        reshard(model)
    dist.all_reduce(total)
    return total.item() / mesh.tp.size()  # tensor-parallel peers hold the same loss


def reshard(model: Llama) -> None:
    """After a forward pass without a backward: what FSDP2 keeps gathered for that would stand where shards belong."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Polling:
    """Whether to go on, asked before each pass: not once any rank is asked to stop. Collective, all get the same."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def __call__(self) -> bool:
        self._watchdog.mark("validating")
        stop = torch.tensor(int(bool(self._watchdog.stop_asked)))
        dist.all_reduce(stop, dist.ReduceOp.MAX)
        return not stop.item()


def open_validation_set(
    config: Config, mesh: Mesh, tokenizer: Tokenizer, corpus: Corpus | None, watchdog: Watchdog
) -> ValidationSet:
    """This rank's share of the set. Collective; raises RunFailed, on all ranks, for what any of them cannot read, and
    where they read different sets. corpus: the training's where it is open."""
    training = config.training

    def stop() -> bool:
        return watchdog.ending

    with agreed(), stoppable(watchdog):
        if corpus is None and not config.validation.paths:
            corpus = open_corpus(config.data, tokenizer, seq_len=training.seq_len, seed=training.seed, stop=stop)
        sources = validation_sources(config.validation, config.data, tokenizer, corpus, stop)
        found = build_validation_set(
            sources,
            config.data,
            tokenizer,
            seq_len=training.seq_len,
            # As in training, so that compiled blocks are not compiled again for another shape.
            batch_size=min(training.local_batch_size, max(1, training.global_batch_size // mesh.dp_degree)),
            dp_rank=mesh.dp_rank,
            dp_degree=mesh.dp_degree,
        )
    agree_on({"the validation set": f"{found}"})
    logger.info("validation: %s", found)
    return found


@contextmanager
def stoppable(watchdog: Watchdog) -> Iterator[None]:
    """Where an index or a cache is written, which may be stopped."""
    try:
        yield
    except WritingStopped as stopped:  # nothing is to be saved yet, and others may be in the midst of reading
        watchdog.end(0, "preempted", f"{watchdog.stop_asked}: {stopped}")
        Event().wait()


def open_validation(
    config: Config, mesh: Mesh, tokenizer: Tokenizer, corpus: Corpus, watchdog: Watchdog
) -> "Validation | None":
    """None where the config wants none. Collective; raises RunFailed. corpus: of the training."""
    if not config.validation.enable:
        return None
    held = open_validation_set(config, mesh, tokenizer, corpus, watchdog)
    with agreed():
        return Validation(config, mesh, tokenizer, held, Polling(watchdog))


class Validation:
    """The validation of a run."""

    def __init__(
        self, config: Config, mesh: Mesh, tokenizer: Tokenizer, held: ValidationSet, goes_on: Callable[[], bool]
    ) -> None:
        """Raises ValueError for prompts that cannot be continued. Not collective; goes_on is, see `sum_of_losses`."""
        self._config, self._mesh, self._tokenizer, self._set = config.validation, mesh, tokenizer, held
        self._goes_on, self._left = goes_on, False
        self._steps, self._rows = config.training.steps, torch.from_numpy(held.rows)
        self._prompts = tokenizer.encode_prompts(self._config.sample_prompts)
        longest = max(map(len, self._prompts), default=0) + self._config.sample_tokens
        if self._prompts and longest > config.training.seq_len:
            raise ValueError(
                f"validation.sample_tokens = {self._config.sample_tokens} and the longest of validation.sample_prompts"
                f" make {longest} tokens, more than training.seq_len = {config.training.seq_len}: shorten one of them"
            )

    def run(self, trainer: Trainer, report: Report, *, at_end: bool = False) -> bool:
        """Validate, and sample, where that is due after the trainer's step. Collective. False where the validation was
        left because `goes_on` says no: it stays due.

        Raises OSError, on rank 0, where the logs cannot be written.
        """
        with report.throughput.paused():
            return self._run(trainer, report, at_end)

    def _run(self, trainer: Trainer, report: Report, at_end: bool) -> bool:
        step, config = trainer.step, self._config
        due = at_end or step == self._steps or step % config.freq == 0
        if self._left:
            return False
        if due and 0 < step != report.validated_step:
            began = time.perf_counter()
            eos_id = self._tokenizer.eos_id
            with self._weights(trainer):
                nats = sum_of_losses(trainer.model, self._rows, self._mesh, eos_id, trainer.backend, self._goes_on)
            if nats is None:
                logger.warning("the validation of step %d is left; the next start makes up for it", step)
                self._left = True
                return False
            found = result(nats, self._set, step, trainer.trained_targets, time.perf_counter() - began)
            report.validated(f"step {step:>{len(str(self._steps))}}/{self._steps}  {found.numbers}", asdict(found))
        if self._prompts and step % config.sample_freq == 0 and step != report.sampled_step:
            with self._weights(trainer):
                texts = self._continuations(trainer.model)
            report.samples(step, texts)
        return True

    def _weights(self, trainer: Trainer) -> AbstractContextManager[None]:
        """With those to validate in their place."""
        if not self._config.use_ema:
            return nullcontext()
        assert trainer.average, "validation.use_ema without training.ema_decay"
        return trainer.average.in_place_of_weights()

    def _continuations(self, model: Llama) -> dict[str, str]:
        """What the model adds to each prompt, always the most probable token. Collective."""
        unused, vocab_size = self._tokenizer.unused_ids(), self._tokenizer.vocab_size

        def choose(logits: Tensor) -> list[int]:
            logits = logits[:, :vocab_size].float()
            logits[:, unused] = -torch.inf
            ids: list[int] = logits.argmax(-1).tolist()
            return ids

        made: list[list[int]] = [[] for _ in self._prompts]
        eos_id = self._tokenizer.eos_id
        # Compiled blocks would be compiled again for every length.
        with torch.compiler.set_stance("force_eager"):
            for tokens in generate(
                model,
                self._prompts,
                max_new_tokens=self._config.sample_tokens,
                eos_id=eos_id,
                choose=choose,
                device=self._mesh.device,
            ):
                for ids, token in zip(made, tokens, strict=True):
                    ids += [token] if token not in (None, eos_id) else []
                if not self._goes_on():
                    break
        reshard(model)
        texts = map(self._tokenizer.decode, made)
        return dict(zip(self._config.sample_prompts, texts, strict=True))


def validate_checkpoint(config: Config, watchdog: Watchdog) -> None:
    """--validation.only: validate the checkpoint that is meant, and print the result. Collective.

    Raises RunFailed or CheckpointError, the same on all ranks, or PeerLost.
    """
    with Membership(config.comm, watchdog) as membership:
        degrees = resolve_degrees(config.parallelism, dist.get_world_size())
        mesh = build_mesh(membership.device_type, *degrees)
        membership.start(mesh.groups)
        _validate_checkpoint(config, mesh, membership, watchdog)


def _validate_checkpoint(config: Config, mesh: Mesh, membership: Membership, watchdog: Watchdog) -> None:
    membership.prepare()
    with agreed():
        tokenizer = load_tokenizer(config)
    held = open_validation_set(config, mesh, tokenizer, None, watchdog)
    membership.start()
    watchdog.mark("building the model")
    with agreed():
        dtype, head_dim = param_dtype(config, mesh.device.type), config.model.head_size
        backend = resolve_backend(
            config.model.attention,
            device_type=mesh.device.type,
            seq_len=config.training.seq_len,
            head_dim=head_dim,
            dtype=dtype,
        )
        check_backend(backend, mesh.device, dtype, head_dim)
        model = build_model(config, mesh)
        model.to_empty(device="cpu" if config.parallelism.enable_cpu_offload else mesh.device)
    watchdog.mark("loading", at_least=SAVING_SECONDS)
    loaded = _load(model, config, tokenizer)
    goes_on = Polling(watchdog)
    began = time.perf_counter()
    nats = sum_of_losses(model, torch.from_numpy(held.rows), mesh, tokenizer.eos_id, backend, goes_on)
    if nats is None:
        raise RunFailed(f"{watchdog.stop_asked or 'another rank was signalled'}: the validation was left")
    meta = loaded.meta
    found = result(nats, held, meta.step, meta.trained_targets, time.perf_counter() - began)
    if dist.get_rank() == 0:
        print(f"{loaded.path}: step {meta.step}  {found.numbers}", flush=True)


def _load(model: Llama, config: Config, tokenizer: Tokenizer) -> Found:
    """Fill the model from the newest checkpoint that is right, and leave the others as they are."""
    folder, step = str(Path(config.job.dump_folder) / "checkpoint"), config.checkpoint.load_step
    with agreed():
        if not list_steps(folder):
            if step >= 0 or not config.checkpoint.init_from:
                raise ValueError(f"validation.only: {folder} has no valid checkpoint")
            folder = config.checkpoint.init_from
    checkpointer = Checkpointer(folder, keep_latest_k=0, async_save=False)
    refused: dict[str, str] = {}
    while True:
        found = find_together(folder, refused, step)
        with agreed():
            check_tokenizer(found, tokenizer, config.tokenizer.path, "set tokenizer.path to that one's folder")
            _refuse_other_documents(found, config)
        if load_weights(checkpointer, found, model, refused, use_ema=config.validation.use_ema):
            return found


def _refuse_other_documents(found: Found, config: Config) -> None:
    """What defined the token stream of the training is not known of imported weights."""
    stream, share = (found.meta.cursor or {}).get("stream", {}), config.data.held_out_fraction
    if not config.validation.paths and stream.get("held_out_fraction", share) != share:
        raise ValueError(
            f"{found.path} was trained with data.held_out_fraction = {stream['held_out_fraction']} and not {share}:"
            " other documents were held out then, so set it as it was"
        )

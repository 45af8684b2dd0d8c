"""Opening what a job reads, the tokenizer and the stream of rows, so that all ranks read the same or none goes on."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.distributed as dist

from titanlite.config import Config
from titanlite.data.cache.writer import available_cores
from titanlite.data.corpus import Corpus, open_corpus
from titanlite.data.index import WritingStopped
from titanlite.data.loader import Loader, build_loader
from titanlite.data.validation_set import ValidationSet, build_validation_set, validation_sources
from titanlite.files import read_json
from titanlite.log import logger
from titanlite.model.transformer import flops_per_token
from titanlite.parallel.mesh import Mesh
from titanlite.run.agreement import agree_on, agreed
from titanlite.run.metrics import peak_flops
from titanlite.run.watchdog import Watchdog
from titanlite.tokenizer import Tokenizer


def open_data(
    config: Config, mesh: Mesh, folder: Path, cursor: Mapping[str, Any] | None, watchdog: Watchdog
) -> tuple[Tokenizer, Loader]:
    """This rank's tokenizer and batches, from `cursor` on. Collective; takes as long as indices and caches take.

    Raises RunFailed, on all ranks, for what any of them cannot read. A stop while an index or a cache is written ends
    all ranks.
    """
    with agreed():
        tokenizer = load_tokenizer(config)
        with _stoppable(watchdog):
            loader = build_loader(
                config.data,
                tokenizer,
                seq_len=config.training.seq_len,
                global_batch_size=config.training.global_batch_size,
                seed=config.training.seed,
                dp_rank=mesh.dp_rank,
                dp_degree=mesh.dp_degree,
                cursor=cursor,
                saved_corpus=read_json(folder / "corpus.json"),
                pin_memory=mesh.device.type == "cuda",
                tokenizing_share=_tokenizing_share(config, mesh.device.type),
                stop=lambda: watchdog.ending,
            )
    return tokenizer, loader


def open_validation_set(
    config: Config, mesh: Mesh, tokenizer: Tokenizer, corpus: Corpus | None, watchdog: Watchdog
) -> ValidationSet:
    """This rank's share of the set. Collective; raises RunFailed, on all ranks, for what any of them cannot read, and
    where they read different sets. corpus: the training's where it is open."""
    training = config.training

    def stop() -> bool:
        return watchdog.ending

    with agreed(), _stoppable(watchdog):
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
def _stoppable(watchdog: Watchdog) -> Iterator[None]:
    """Where an index or a cache is written, which may be stopped."""
    try:
        yield
    except WritingStopped as stopped:  # nothing is to be saved yet, and others may be in the midst of reading
        watchdog.end(0, "preempted", f"{watchdog.stop_asked}: {stopped}")
        Event().wait()


def load_tokenizer(config: Config) -> Tokenizer:
    """Raises ValueError where the model has no row for some id."""
    tokenizer = Tokenizer.load(config.tokenizer.path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size = {config.model.vocab_size} is less than the {tokenizer.vocab_size} ids of the"
            f" tokenizer in tokenizer.path = {config.tokenizer.path!r}: raise model.vocab_size"
        )
    return tokenizer


def compare_data(tokenizer: Tokenizer, corpus: Mapping[str, Any]) -> None:
    """Each rank found its own: on a node's own disk, or while files were being added. Collective; raises RunFailed."""
    agree_on(
        {
            "the tokenizer in tokenizer.path": f"fingerprint {tokenizer.fingerprint[:12]}",
            "the corpus in data.paths": f"{corpus['num_files']:,} files, {corpus['num_bytes']:,} bytes, digest"
            f" {corpus['digest'][:12]}",
        }
    )


def _tokenizing_share(config: Config, device_type: str) -> float:
    """The share of this host's cores that it would take to tokenise the whole stream on each of its ranks; 0: unknown.

    At 2.5 million tokens per second and core, and training at half of the devices' peak.
    """
    peak = peak_flops(torch.cuda.get_device_name()) if device_type == "cuda" else None
    if peak is None:
        return 0.0
    tokens_per_second = dist.get_world_size() * 0.5 * peak / flops_per_token(config.model, config.training.seq_len)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return tokens_per_second * ranks_here / 2.5e6 / available_cores()

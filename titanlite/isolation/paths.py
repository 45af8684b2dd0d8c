"""Rows as each path prepares them, the documents in them to compare, and noise in place of all others.

Boundaries are read from the tokens once more, by the definition: the document rule is what is on trial.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from titanlite.config import Config
from titanlite.data.feed import EndOfData
from titanlite.data.loader import build_loader
from titanlite.model import check_rule
from titanlite.tokenizer import Tokenizer

_SEARCHED_ROWS = 1000
_COMPARED_ROWS = 2


@dataclass(frozen=True)
class Document:
    """The piece of a document that lies in row `row`, from token `begin` to before `end` of its seq_len + 1 tokens."""

    row: int
    begin: int
    end: int
    name: str


@dataclass(frozen=True)
class MicroBatch:
    """Rows [B, seq_len + 1] that the model takes at once, and the documents to compare in them."""

    origin: str
    rows: Tensor
    documents: list[Document]


def training_rows(config: Config, tokenizer: Tokenizer) -> MicroBatch:
    """The first micro-batch with as many documents to compare as there can be; else the one that comes nearest."""
    training = config.training
    loader = build_loader(
        config.data,
        tokenizer,
        seq_len=training.seq_len,
        global_batch_size=training.global_batch_size,
        seed=training.seed,
        dp_rank=0,
        dp_degree=1,
    )
    best, searched = MicroBatch("", torch.empty(0), []), 0
    most = 3 * min(_COMPARED_ROWS, training.local_batch_size, training.global_batch_size)
    try:
        for step, batch in enumerate(loader, 1):
            check_rule(batch.rows, batch.starts, tokenizer.eos_id)
            for rows in batch.rows.split(training.local_batch_size):
                documents = choose_documents(rows, tokenizer)
                if len(documents) > len(best.documents):
                    best = MicroBatch(f"step {step}", rows, documents)
            searched += training.global_batch_size
            if len(best.documents) == most or searched >= _SEARCHED_ROWS:
                break
    except EndOfData as end:
        if not searched:
            raise ValueError(str(end)) from end
    finally:
        loader.close()
    if not best.documents:
        raise ValueError(
            f"none of the first {searched:,} rows holds two documents, so there is nothing to isolate: raise"
            f" training.seq_len = {training.seq_len}, or name other data.paths"
        )
    return best


PATHS: dict[str, Callable[[Config, Tokenizer], MicroBatch]] = {"training": training_rows}
"""Every path that prepares batches."""


def choose_documents(rows: Tensor, tokenizer: Tokenizer) -> list[Document]:
    """First, middle and last document of those rows [B, seq_len + 1] that hold most, and more than one.

    A document ends with an eos or with its row: written out here, so as not to trust the rule that is on trial. One
    of a single input is not chosen: it predicts nothing and could not be noise to another one.
    """
    by_row = []
    for number, row in enumerate(rows.tolist()):
        begins = [0, *(i + 1 for i, token in enumerate(row[:-1]) if token == tokenizer.eos_id)]
        pieces = [
            (begin, end)
            for begin, end in itertools.pairwise([*begins, len(row)])
            if min(end, len(row) - 1) - begin >= 2
        ]
        goes_on = tokenizer.bos_id is not None and row[0] != tokenizer.bos_id
        documents = []
        for place, (begin, end) in enumerate(pieces, 1):
            name = f"row {number}, document {place} of {len(pieces)}, {end - begin:,} tokens"
            name += ", gone on from an earlier row" if goes_on and begin == 0 else ""
            documents.append(Document(number, begin, end, name))
        if len(documents) >= 2:
            by_row.append(documents)
    by_row.sort(key=len, reverse=True)
    return [found[i] for found in by_row[:_COMPARED_ROWS] for i in sorted({0, len(found) // 2, len(found) - 1})]


def noisy(rows: Tensor, document: Document, eos_id: int, vocab_size: int) -> Tensor:
    """`rows` with another random id for every token outside the document; each eos stays, and none is added."""
    generator = torch.Generator().manual_seed(document.row << 32 | document.begin)
    noise = (rows + torch.randint(1, vocab_size - 1, rows.shape, generator=generator)) % vocab_size
    noise = torch.where(noise == eos_id, (noise + 1) % vocab_size, noise)
    noise = torch.where(rows == eos_id, rows, noise)
    piece = document.row, slice(document.begin, document.end)
    noise[piece] = rows[piece]
    return noise

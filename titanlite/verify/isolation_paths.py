"""Rows as each path prepares them, the documents in them to compare, and noise in place of all others.

Boundaries are read from the tokens once more, by the definition: the document rule is what is on trial.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from titanlite.config import Config
from titanlite.data.corpus import open_corpus
from titanlite.data.loader import build_loader
from titanlite.data.validation_set import build_validation_set, validation_sources
from titanlite.model.decode import right_align
from titanlite.model.selfcheck import check_starts
from titanlite.tokenizer import Tokenizer

_SEARCHED_ROWS = 1000
_COMPARED_ROWS = 2
_PROMPTS = 6
NUM_DECODED = 4
"""Columns of prompts that go through the model one by one, with a KV cache, as generated tokens do."""


Piece = tuple[int, int, int]
"""What a row holds of a document: row, first token, and the one behind the last, of the row's seq_len + 1."""


@dataclass(frozen=True)
class Kept:
    """Documents that stay when noise replaces all others."""

    name: str
    pieces: list[Piece]

    @property
    def num_tokens(self) -> int:
        return sum(end - begin for _, begin, end in self.pieces)

    def mask(self, rows: Tensor) -> Tensor:
        """True where `rows`, or inputs without their last column, hold a token of these documents."""
        mask = torch.zeros_like(rows, dtype=torch.bool)
        for row, begin, end in self.pieces:
            mask[row, begin:end] = True
        return mask

    def positions(self, seq_len: int) -> Tensor:
        """The index of each of their inputs in its own document, in the order of the rows."""
        return torch.cat([torch.arange(min(end, seq_len) - begin) for _, begin, end in self.pieces])


@dataclass(frozen=True)
class MicroBatch:
    """Rows that the model takes at once, and what to keep of them, one comparison each."""

    origin: str
    """What they are, in words."""
    rows: Tensor
    """[B, seq_len + 1]; of generation [B, longest prompt]."""
    comparisons: list[Kept]
    starts: Tensor | None = None
    """Where generation begins documents, by their lengths; None where that is read from eos."""
    trains: bool = True
    """Whether there is a backward pass."""


def training_rows(config: Config, tokenizer: Tokenizer) -> MicroBatch:
    """The first micro-batch with as many comparisons as there can be; else the one that comes nearest."""
    training = config.training
    loader = build_loader(
        config.data,
        tokenizer,
        seq_len=training.seq_len,
        global_batch_size=training.global_batch_size,
        seed=training.seed,
    )
    best, searched = MicroBatch("", torch.empty(0), []), 0
    most = 3 * min(_COMPARED_ROWS, training.local_batch_size, training.global_batch_size) + 2
    try:
        for step, batch in enumerate(loader, 1):
            check_starts(batch.starts, batch.begins)
            for rows in batch.rows.split(training.local_batch_size):
                comparisons = choose_documents(rows, tokenizer)
                if len(comparisons) > len(best.comparisons):
                    size = f"{len(rows)} rows of {training.seq_len:,} tokens"
                    best = MicroBatch(f"step {step}, {size}", rows, comparisons)
            searched += training.global_batch_size
            if len(best.comparisons) == most or searched >= _SEARCHED_ROWS:
                break
    finally:
        loader.close()
    if not searched:
        raise ValueError(f"{loader.ended}")
    if not best.comparisons:
        raise ValueError(
            f"none of the first {searched:,} rows holds two documents, so there is nothing to isolate: raise"
            f" training.seq_len = {training.seq_len}, or name other data.paths"
        )
    return best


def validation_rows(config: Config, tokenizer: Tokenizer) -> MicroBatch:
    """As training_rows, of the validation set; without a comparison where no row of that holds two documents."""
    training, data = config.training, config.data
    corpus = open_corpus(data, tokenizer, seq_len=training.seq_len, seed=training.seed)
    held = build_validation_set(
        validation_sources(config.validation, data, tokenizer, corpus),
        data,
        tokenizer,
        seq_len=training.seq_len,
        batch_size=min(training.local_batch_size, training.global_batch_size),
        dp_rank=0,
        dp_degree=1,
    )
    best = MicroBatch("", torch.empty(0), [], trains=False)
    for number, part in enumerate(held.rows[: -(-_SEARCHED_ROWS // held.rows.shape[1])], 1):
        rows = torch.from_numpy(part).long()
        comparisons = choose_documents(rows, tokenizer)
        if len(comparisons) > len(best.comparisons):
            size = f"{len(rows)} rows of {training.seq_len:,} tokens"
            best = MicroBatch(f"pass {number} over set {held.digest}, {size}", rows, comparisons, trains=False)
    return best


def generation_rows(training: MicroBatch, vocab_size: int) -> MicroBatch:
    """Prompts of different lengths from the same documents, as generation lays them out: right-aligned.

    The longest is a whole row, so that an eos is content. Pads get random ids: none may matter.
    """
    rows = training.rows.tolist()
    whole = training.comparisons[0].pieces[0][0]  # the row with most documents
    by_length = {end - begin: rows[row][begin:end] for kept in training.comparisons for row, begin, end in kept.pieces}
    lengths = sorted(by_length)
    lengths = sorted({lengths[len(lengths) * i // _PROMPTS] for i in range(_PROMPTS)})
    prompts = [*(by_length[length] for length in lengths), rows[whole]]
    tokens, starts = right_align(prompts, max_new_tokens=0)
    longest, count = tokens.shape[1], len(prompts)
    pieces = [(row, longest - len(prompt), longest) for row, prompt in enumerate(prompts)]
    comparisons = [
        Kept(f"prompt {row + 1} of {count}, {end - begin:,} tokens", [(row, begin, end)]) for row, begin, end in pieces
    ]
    comparisons += [
        Kept(f"every second prompt, from the {which} on", pieces[first::2])
        for first, which in enumerate(("first", "second"))
    ]
    tokens = noisy(tokens, Kept("", pieces), -1, vocab_size)
    size = f"{count} prompts of {len(prompts[0]):,} to {longest:,} tokens"
    return MicroBatch(
        f"{size} from the same documents, the last {NUM_DECODED} one by one", tokens, comparisons, starts, trains=False
    )


def prepare(config: Config, tokenizer: Tokenizer) -> Iterator[tuple[str, MicroBatch]]:
    """Every path that prepares batches, by name."""
    training = training_rows(config, tokenizer)
    yield "training", training
    if config.validation.enable and (validation := validation_rows(config, tokenizer)).comparisons:
        yield "validation", validation
    yield "generation", generation_rows(training, config.model.vocab_size)


def choose_documents(rows: Tensor, tokenizer: Tokenizer) -> list[Kept]:
    """What to keep of rows [B, seq_len + 1]; nothing where no row holds two documents.

    One at a time the first, the middle and the last document of those rows that hold most; then every second document
    of all rows at once, so that each boundary has noise on either side once. A document ends with an eos or with its
    row: written out here, so as not to trust the rule that is on trial. One of a single input (a pad) counts only in
    the last two: it predicts nothing and could not be noise to another one.
    """
    by_row: list[list[Kept]] = []
    every_second: tuple[list[Piece], list[Piece]] = ([], [])
    for number, row in enumerate(rows.tolist()):
        begins = [0, *(i + 1 for i, token in enumerate(row[:-1]) if token == tokenizer.eos_id)]
        pieces = [(number, begin, end) for begin, end in itertools.pairwise([*begins, len(row)])]
        for place, piece in enumerate(pieces):
            every_second[place % 2].append(piece)
        pieces = [(row, begin, end) for row, begin, end in pieces if min(end, rows.shape[1] - 1) - begin >= 2]
        goes_on = tokenizer.bos_id is not None and row[0] != tokenizer.bos_id
        kept = []
        for place, (_, begin, end) in enumerate(pieces, 1):
            name = f"row {number}, document {place} of {len(pieces)}, {end - begin:,} tokens"
            name += ", gone on from an earlier row" if goes_on and begin == 0 else ""
            kept.append(Kept(name, [(number, begin, end)]))
        if len(kept) >= 2:
            by_row.append(kept)
    by_row.sort(key=len, reverse=True)
    chosen = [kept[i] for kept in by_row[:_COMPARED_ROWS] for i in sorted({0, len(kept) // 2, len(kept) - 1})]
    if chosen:
        for which, pieces in zip(("first", "second"), every_second, strict=True):
            chosen.append(Kept(f"every second document of every row, from the {which} on", pieces))
    return chosen


def noisy(rows: Tensor, kept: Kept, eos_id: int, vocab_size: int) -> Tensor:
    """`rows` with another random id for every token of other documents; each eos stays, and none is added. An eos_id
    of -1 is no token's."""
    generator = torch.Generator().manual_seed(kept.num_tokens)
    noise = (rows + torch.randint(1, vocab_size - 1, rows.shape, generator=generator)) % vocab_size
    noise = torch.where(noise == eos_id, (noise + 1) % vocab_size, noise)
    return torch.where((rows == eos_id) | kept.mask(rows), rows, noise)

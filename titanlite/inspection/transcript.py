"""Rows and statistics as text for people: what `python -m titanlite.show` prints.

Owns names, columns and what a terminal may be given. Refuses to find or to read data: it gets rows and surveys.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from titanlite.config import Config
from titanlite.data.corpus import Corpus
from titanlite.data.rows import StepRows
from titanlite.inspection.survey import Packed, Survey
from titanlite.tokenizer import Tokenizer

_PREVIEW_TOKENS, _PREVIEW_CHARS = 32, 32
_BAR = 40


@dataclass(frozen=True, eq=False)
class Piece:
    """Consecutive tokens of a document in a row, or consecutive pads."""

    source: str
    ids: np.ndarray
    place: str = ""
    """File and line or row of the document; empty: these are pads."""
    counter: int = -1
    """Of the document in its source's stream, epochs included."""
    epoch: int = -1
    offset: int = 0
    """Index in the document of the first token."""


def pieces_of(rows: StepRows, row: int, corpus: Corpus) -> list[Piece]:
    """What a row (from 0 in the step) is made of, in order."""
    name = list(corpus.sources)[int(rows.sources[row])]
    source, tokens = corpus.sources[name], rows.tokens[row]
    counters = rows.counters[row]
    ends = np.append(rows.starts[row][1:], len(tokens))
    documents = source.order.documents(np.maximum(counters, 0))
    pieces: list[Piece] = []
    for k, (begin, end) in enumerate(zip(rows.starts[row].tolist(), ends.tolist(), strict=True)):
        if counters[k] < 0:
            pieces.append(Piece(name, tokens[begin:]))  # pads stand at the end
            break
        counter = int(counters[k])
        epoch = counter // source.order.num_documents
        place = source.reader.locate(int(documents[k]))
        pieces.append(Piece(name, tokens[begin:end], place, counter, epoch, int(rows.offsets[row][k])))
    return pieces


def step_text(rows: StepRows, corpus: Corpus, tokenizer: Tokenizer) -> str:
    """All pieces of all rows of a step, one a line, each with the beginning of its text."""
    lines = [["row", "source", "tokens", "offset", "counter", "epoch", "text", "document"]]
    for row in range(len(rows.tokens)):
        for piece in pieces_of(rows, row, corpus):
            start = [str(row), piece.source, f"{len(piece.ids):,}"]
            if not piece.place:
                lines.append([*start, "-", "-", "-", "", "pads"])
                continue
            numbers = [f"{n:,}" for n in (piece.offset, piece.counter, piece.epoch)]
            beginning = " ".join(tokenizer.decode(piece.ids[:_PREVIEW_TOKENS]).split())
            lines.append([*start, *numbers, escaped(beginning)[:_PREVIEW_CHARS], piece.place])
    return aligned(lines, left=(1, 6, 7))


def row_text(pieces: Sequence[Piece], tokenizer: Tokenizer, *, raw: bool) -> str:
    """The whole text of a row, each piece below a line that says where it is from."""
    lines = []
    for piece in pieces:
        if not piece.place:
            lines.append(f"--- {len(piece.ids):,} pads")
            continue
        lines.append(
            f"--- {len(piece.ids):,} tokens from token {piece.offset:,} on of document {piece.counter:,}"
            f" (epoch {piece.epoch}) of source {piece.source}: {piece.place}"
        )
        text = tokenizer.decode(piece.ids)
        lines += [text] if raw else [f"| {line}" for line in escaped(text).split("\n")]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """The text with escapes for whatever could change a terminal or cannot be seen, but for spaces and line ends."""
    return "".join(c if _is_plain(c) else c.encode("unicode_escape").decode() for c in text)


def _is_plain(c: str) -> bool:
    return c == "\n" or c.isprintable() or unicodedata.category(c) == "Zs"


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Columns, right-aligned but for those in `left`; the first row holds the titles."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            f"{cell:<{w}}" if i in left else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def statistics_text(
    config: Config, corpus: Corpus, surveys: Mapping[str, Survey], packed: Mapping[str, Mapping[str, Packed]]
) -> str:
    """Tables of all sources and of each, and a histogram. packed: by source, then by way of packing."""
    training, configured = config.training, config.data.packing
    num_rows = training.steps * training.global_batch_size
    dealt = dict(zip(corpus.sources, corpus.deck.dealt(num_rows).tolist(), strict=True))
    shares = dict(zip(corpus.sources, (corpus.deck.counts / corpus.deck.num_rows).tolist(), strict=True))
    lines = [["source", "share", "documents", "tokens", "mean", "median", "p5", "p95", "max", "> row", "epochs"]]
    for name, survey in surveys.items():
        epochs = dealt[name] * packed[name][configured].new_tokens_per_row / survey.num_tokens
        lines.append([name, f"{shares[name]:.1%}", *_lengths(survey, training.seq_len), f"{epochs:.3g}"])
    pooled = _Pooled(surveys)
    if len(surveys) > 1:
        lines.append(["all", "", *_lengths_of(pooled, training.seq_len), ""])
    packings = [["source", "packing", "documents/row", "cut", "padding", "attention"]]
    for packing in ("split", "best_fit"):
        mark = " (configured)" if packing == configured else ""
        each = {name: packed[name][packing] for name in surveys}
        figures = {name: _figures(p) for name, p in each.items()}
        if len(surveys) > 1:
            figures["all"] = np.sum([figures[name] * shares[name] for name in surveys], axis=0)
        packings += [
            [name, packing + mark, f"{f[0]:.2f}", *(f"{share:.1%}" for share in f[1:].tolist())]
            for name, f in figures.items()
        ]
    return "\n".join(
        [
            f"{training.steps:,} steps of {training.global_batch_size:,} rows of {training.seq_len:,} tokens",
            "",
            aligned(lines),
            *_notes(config, surveys),
            "",
            aligned(packings, left=(0, 1)),
            "cut: of the documents that a row could hold, those in two rows. attention: pairs of query and key that"
            " document masking leaves, of seq_len^2",
            "",
            _histogram(pooled),
        ]
    )


class _Pooled:
    """The documents of all sources, each with the number of documents that it stands for."""

    def __init__(self, surveys: Mapping[str, Survey]) -> None:
        lengths = np.concatenate([survey.lengths for survey in surveys.values()])
        weights = np.concatenate([np.full(len(s.lengths), s.num_documents / len(s.lengths)) for s in surveys.values()])
        order = np.argsort(lengths, kind="stable")
        self.lengths, self.weights = lengths[order], weights[order]
        self.num_documents = sum(survey.num_documents for survey in surveys.values())
        self.num_tokens = sum(survey.num_tokens for survey in surveys.values())
        self.about = "" if all(survey.is_whole for survey in surveys.values()) else "~"

    def quantile(self, share: float) -> int:
        ends = np.cumsum(self.weights)
        return int(self.lengths[np.searchsorted(ends, share * ends[-1])])

    def share(self, which: np.ndarray) -> float:
        return float(self.weights[which].sum() / self.weights.sum())


def _lengths(survey: Survey, seq_len: int) -> list[str]:
    return _lengths_of(_Pooled({"": survey}), seq_len)


def _lengths_of(pooled: _Pooled, seq_len: int) -> list[str]:
    quantiles = [pooled.quantile(share) for share in (0.5, 0.05, 0.95, 1.0)]
    return [
        *(f"{pooled.about}{count:,}" for count in (pooled.num_documents, pooled.num_tokens)),
        f"{pooled.num_tokens / pooled.num_documents:,.1f}",
        *(f"{length:,}" for length in quantiles),
        f"{pooled.share(pooled.lengths > seq_len + 1):.1%}",
    ]


def _figures(packing: Packed) -> np.ndarray:
    return np.array([packing.documents_per_row, packing.cut, packing.padding, packing.attention])


def _notes(config: Config, surveys: Mapping[str, Survey]) -> list[str]:
    notes = [
        f"~ source {name}: estimated from {survey.num_looked_at:,} documents drawn at random; a token cache"
        " (python -m titanlite.cache) makes it exact"
        for name, survey in surveys.items()
        if not survey.is_whole
    ]
    if config.data.held_out_fraction:
        notes.append("documents held out of training (data.held_out_fraction) are not counted")
    return notes


def _histogram(pooled: _Pooled) -> str:
    """Shares of documents and of tokens by length, a line for each power of two."""
    power = np.frexp(pooled.lengths.astype(np.float64))[1] - 1
    lines = [["tokens", "documents", "of all tokens", ""]]
    for p in range(int(power[0]), int(power[-1]) + 1):
        share = pooled.share(power == p)
        held = float((pooled.lengths * pooled.weights)[power == p].sum() / (pooled.lengths * pooled.weights).sum())
        lines.append([f"{2**p:,} to {2 ** (p + 1) - 1:,}", f"{share:.1%}", f"{held:.1%}", "#" * round(share * _BAR)])
    return aligned(lines, left=(3,))

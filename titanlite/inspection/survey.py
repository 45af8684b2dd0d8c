"""What a source is made of: the lengths of its documents, and what each way of packing makes of them.

Owns the numbers behind `python -m titanlite.show --stats`, and how a sample is drawn where not all documents are looked
at. Refuses to print.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from titanlite.data.cache.reader import CachedReader
from titanlite.data.feed import StreamSource
from titanlite.data.order import permute
from titanlite.data.windows import BestFit, Packing, Split
from titanlite.inspection.seek import trained_lengths

_SAMPLE_BYTES = 1 << 24  # of text that is tokenised for a sample
_PACKED_ROWS = 1 << 12  # of a window
_PORTION = 64  # documents


@dataclass(frozen=True, eq=False)
class Survey:
    """Documents of one source, without those that are held out and bad records."""

    lengths: np.ndarray
    """Tokens of each document that was looked at, int64 [n], in random order; each at least 1."""
    num_documents: int
    """Of the whole source; exact if all were looked at."""
    num_looked_at: int
    """Documents, held out and bad ones included."""
    is_whole: bool
    """Whether all documents were looked at."""

    @property
    def num_tokens(self) -> int:
        """Of the whole source; exact if all documents were looked at."""
        return round(float(self.lengths.mean()) * self.num_documents)


def survey(source: StreamSource) -> Survey:
    """Look at all documents in the token cache; else tokenise about 16 MiB of text, of documents drawn at random, the
    same ones each time. Raises what reading them raises, and ValueError where there is none to train on."""
    if isinstance(source.reader, CachedReader):
        return survey_of(source, np.concatenate([*trained_lengths(source)]))
    return _survey(source, _sample(source))


def survey_of(source: StreamSource, lengths: np.ndarray) -> Survey:
    """The survey of all documents: tokens of each in the order of their numbers, int64; 0 for what is left out."""
    drawn = np.arange(len(lengths), dtype=np.uint64)
    return _survey(source, lengths[permute(drawn, len(lengths), np.zeros_like(drawn)).astype(np.int64)])


def _survey(source: StreamSource, lengths: np.ndarray) -> Survey:
    trained, num_documents = lengths[lengths > 0], source.order.num_documents
    if not len(trained):
        raise ValueError(f"data source {source.name!r}: no document is left to train on")
    share = num_documents / len(lengths)
    return Survey(trained, round(len(trained) * share), len(lengths), len(lengths) == num_documents)


def _sample(source: StreamSource) -> np.ndarray:
    reader, num_documents = source.reader, source.order.num_documents
    lengths: list[np.ndarray] = []
    read = 0
    with tqdm(
        total=_SAMPLE_BYTES,
        desc=f"sampling {source.name}",
        unit="B",
        unit_scale=True,
        delay=1,
        leave=False,
        disable=None,
    ) as bar:
        for first in range(0, num_documents, _PORTION):
            drawn = np.arange(first, min(first + _PORTION, num_documents), dtype=np.uint64)
            documents = permute(drawn, num_documents, np.zeros_like(drawn)).astype(np.int64)
            got = reader.read(documents, ~source.held_out(*reader.numbering.places(documents)))
            if got.error is not None:
                raise got.error
            lengths.append(got.lengths)
            read += int(got.bytes.sum())
            bar.update(int(got.bytes.sum()))
            if read >= _SAMPLE_BYTES:
                break
    return np.concatenate(lengths)


@dataclass(frozen=True)
class Packed:
    """What a way of packing makes of documents."""

    num_rows: int
    documents_per_row: float
    """Pieces of documents; pads are none."""
    cut: float
    """Share of the documents that a row could hold and that lie in two."""
    padding: float
    """Share of the tokens of all rows."""
    new_tokens_per_row: float
    """Tokens that no row before has."""
    attention: float
    """Pairs of query and key that document masking leaves, as a share of seq_len^2 per row."""


def pack_every_way(surveys: Mapping[str, Survey], seq_len: int) -> dict[str, dict[str, Packed]]:
    """By source, then by data.packing."""
    return {
        name: {packing: pack(found.lengths, packing, seq_len) for packing in ("split", "best_fit")}
        for name, found in surveys.items()
    }


def pack(lengths: np.ndarray, packing: str, seq_len: int) -> Packed:
    """Pack documents (tokens, int64 [n], each at least 1) in the given order, over and over, into a window."""
    way: Packing = Split(seq_len, _PACKED_ROWS) if packing == "split" else BestFit(seq_len, _PACKED_ROWS, False)
    enough = -(-_PACKED_ROWS * (seq_len + 1) // int(lengths.sum())) + 1
    repeated = np.resize(lengths, enough * len(lengths))
    laid = way.lay(repeated, 0, True, (len(repeated), len(repeated)), True)
    assert laid is not None
    layout, num_rows = laid.layout, len(laid.layout.edges) - 1
    row_of = np.repeat(np.arange(num_rows), np.diff(layout.edges))
    begins = np.append(0, np.cumsum(layout.sizes))
    starts = begins[:-1] - begins[layout.edges[:-1]][row_of]
    inside = np.minimum(layout.sizes, seq_len - starts)  # the last token of a row is no input
    used = np.diff(begins[layout.edges])
    pads = (seq_len + 1) * num_rows - int(used.sum())
    squares = int((inside**2).sum() + np.maximum(0, seq_len - used).sum())  # a pad sees itself
    new = int((layout.sizes - 1).sum() + layout.document_first.sum())
    fitting = int(np.count_nonzero(np.resize(lengths, laid.num_documents) <= seq_len + 1))
    return Packed(
        num_rows,
        documents_per_row=int(np.count_nonzero(inside)) / num_rows,
        cut=laid.cut / max(1, fitting),
        padding=pads / (num_rows * (seq_len + 1)),
        new_tokens_per_row=new / num_rows,
        attention=squares / (num_rows * seq_len**2),
    )

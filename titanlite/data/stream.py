"""The token stream of one source: documents as tokens, the position in them, and what became of each token.

Owns what travels between the rooms of `data`: documents read (`EncodedDocuments`), runs of them in the stream's order
(`Chunk`), the cursor, which is all that a resume needs, and the ledger. Nothing here knows of ranks, batches, workers
or threads.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

import numpy as np

from titanlite.data.source import Numbering, RecordError, Source

_SAMPLE_DOCUMENTS, _SAMPLE_CHARS, _SAMPLE_BYTES = 32, 16_384, 32 << 20  # to estimate the tokens of a source
_SIZED_DOCUMENTS = 10_000


@dataclass(frozen=True)
class Ledger:
    """What became of the tokens: tokens_read == targets + document_first + carried + dropped."""

    tokens_read: int = 0
    """Tokens of all windows that were begun."""
    targets: int = 0
    """Tokens that were predicted from another token of their document."""
    document_first: int = 0
    """First tokens of documents, which nothing predicts; so also the number of documents begun."""
    carried: int = 0
    """Tokens that wait in the rows of the window that are not dealt yet."""
    dropped: int = 0
    """Tokens that no row will hold, because the data ended (data.max_epochs)."""
    padding: int = 0
    """Pads, which are no tokens read: they fill rows that no document fits into."""
    bytes: int = 0
    """UTF-8 bytes of the texts of the documents whose tokens were read."""
    bad_records: int = 0
    """Records that hold no text and were left out."""
    held_out: int = 0
    """Documents that were left to validation."""
    fitting: int = 0
    """Documents read that a row can hold whole."""
    cut: int = 0
    """Fitting documents that lie in two rows all the same."""

    def __add__(self, other: "Ledger") -> "Ledger":
        return Ledger(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Ledger)))

    def closes(self) -> bool:
        return self.tokens_read == self.targets + self.document_first + self.carried + self.dropped


@dataclass(frozen=True)
class SourceCursor:
    """Where a source's stream stands: the next row, and the place in the documents where its window begins."""

    row: int = 0
    """Rows that the source has dealt."""
    document: int = 0
    """Counter (epochs included) of the document that holds the window's first token."""
    offset: int = 0
    """Index of that token in the document."""
    dealt: int = 0
    """Rows of the window that are dealt."""
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def first_row(self) -> int:
        """The source's row with which the window begins."""
        return self.row - self.dealt

    def to_dict(self) -> dict[str, Any]:
        """JSON-able and small: counts of 0 are left out."""
        ledger = {name: count for name, count in asdict(self.ledger).items() if count}
        place = {"row": self.row, "document": self.document, "offset": self.offset, "dealt": self.dealt}
        return {**place, "ledger": ledger}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "SourceCursor":
        place = {key: state[key] for key in ("row", "document", "offset", "dealt")}
        return cls(**place, ledger=Ledger(**state["ledger"]))


@dataclass(frozen=True, eq=False)
class EncodedDocuments:
    """Documents that were asked for by number, as tokens."""

    ids: np.ndarray | None
    """int32 [tokens], document after document; None of a reader on demand."""
    lengths: np.ndarray
    """Tokens of each document, int64 [documents]; 0 where it was not to be kept or is a bad record."""
    bytes: np.ndarray
    """num_text_bytes of each document, int64 [documents]; 0 where the length is."""
    bad: list[tuple[int, RecordError]]
    """Bad records with their index in the request."""
    error: Exception | None = None
    """What ended the reading; the arrays then end before that document."""


class DocumentEncoder(Protocol):
    """What the data needs of a tokenizer. Picklable: processes that write a token cache get a copy."""

    @property
    def fingerprint(self) -> str:
        """Changes with whatever could change the ids of any text."""

    @property
    def vocab_size(self) -> int:
        """Highest id + 1."""

    @property
    def eos_id(self) -> int: ...

    def encode_document(self, text: str) -> np.ndarray:
        """int32 ids: [bos] text [eos]; never empty."""


class Reader(Protocol):
    """Documents of a source by number. Threads may share it."""

    @property
    def numbering(self) -> Numbering: ...

    @property
    def num_tokens(self) -> int:
        """Of all documents; an estimate where they would have to be tokenised for it."""

    @property
    def on_demand(self) -> bool:
        """Whether `read` gives lengths alone, so that it takes no time, and `tokens` the ids of what is wanted."""

    def sizes(self, documents: np.ndarray) -> np.ndarray:
        """About how many bytes each of the documents has, int64 [n], without reading them. Not of one on demand."""

    def read(self, documents: np.ndarray, keep: np.ndarray) -> EncodedDocuments:
        """The tokens of documents (int64 [n]); what is not to be kept (bool [n]) is not even read.

        Raises nothing but KeyboardInterrupt and SystemExit. What bad records mean is the caller's business.
        """

    def tokens(self, documents: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Pieces of documents, one after the other, int32: of each document (int64 [n]) so many tokens from an offset
        on. Only of a reader on demand. Raises what ends the reading."""

    def locate(self, document: int) -> str:
        """The document's place for people: file, and line or row."""


class StreamedReader:
    """Reads text and tokenises it on the spot."""

    on_demand = False

    def __init__(self, source: Source, encode_document: Callable[[str], np.ndarray]) -> None:
        assert source.numbering is not None, "a source without random access is read from the token cache"
        self.numbering: Numbering = source.numbering
        self._source, self._encode_document = source, encode_document

    @property
    def num_tokens(self) -> int:
        """Estimated from the beginnings of some documents and the sizes of many."""
        num_documents = self.numbering.num_documents
        sized = np.unique(np.linspace(0, num_documents - 1, min(num_documents, _SIZED_DOCUMENTS)).astype(np.int64))
        sizes = self.sizes(sized)
        tokens = read = 0.0
        for i in np.linspace(0, len(sized) - 1, min(len(sized), _SAMPLE_DOCUMENTS)).astype(np.int64).tolist():
            if read > _SAMPLE_BYTES:
                break
            try:
                text = self._source.read(int(sized[i]))
                beginning = text[:_SAMPLE_CHARS]
                tokens += len(self._encode_document(beginning)) * (len(text) / max(1, len(beginning)))
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:  # met again, and told, when the document's turn comes
                continue
            read += float(sizes[i])
        return round(tokens / max(1.0, read) * float(sizes.mean()) * num_documents)

    def sizes(self, documents: np.ndarray) -> np.ndarray:
        return self._source.sizes(documents)

    def tokens(self, documents: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        raise AssertionError("they came with `read`")

    def locate(self, document: int) -> str:
        return self._source.locate(*self.numbering.place(document))

    def read(self, documents: np.ndarray, keep: np.ndarray) -> EncodedDocuments:
        ids = [np.empty(0, np.int32)]  # concatenate wants at least one array
        lengths: list[int] = []
        sizes: list[int] = []
        bad: list[tuple[int, RecordError]] = []
        error: Exception | None = None
        texts = self._source.texts(documents[keep])
        try:
            for i, (document, kept) in enumerate(zip(documents.tolist(), keep.tolist(), strict=True)):
                length = size = 0
                if kept:
                    try:
                        text = next(texts)
                        if isinstance(text, RecordError):
                            raise text
                        ids.append(encode_or_raise(self._encode_document, text, self.locate, document))
                        length, size = len(ids[-1]), num_text_bytes(text)
                    except RecordError as broken:  # a copy: its traceback and its cause hold what was read
                        bad.append((i, RecordError(broken.place, broken.reason)))
                lengths.append(length)
                sizes.append(size)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as failure:
            error = located(failure, self.locate(document))
        read = np.flatnonzero(keep[: len(lengths)])
        num, changed = self._source.unchanged(documents[read])
        if changed is not None:  # what was read of it may be anything, also a bad record
            error, end = changed, int(read[num])
            lengths, sizes, bad = lengths[:end], sizes[:end], [record for record in bad if record[0] < end]
        num_tokens = sum(lengths)
        return EncodedDocuments(
            np.concatenate(ids)[:num_tokens], np.array(lengths, np.int64), np.array(sizes, np.int64), bad, error
        )


def located(error: BaseException, place: str) -> Exception:
    """What a user reads of an error: itself, where its words name a place, else an error that does. MemoryError has no
    words, and the panic of a library is no Exception."""
    if isinstance(error, OSError | ValueError | RuntimeError):
        return error
    return RuntimeError(f"{place}: {type(error).__name__}: {error}".removesuffix(": "))


def encode_or_raise(
    encode_document: Callable[[str], np.ndarray], text: str, locate: Callable[..., str], *document: int
) -> np.ndarray:
    """The tokens of a document. Raises RecordError for a text that the tokenizer gives up on, RuntimeError for a bug of
    its own; both name the place that `locate` gives of the document."""
    try:
        return encode_document(text)
    except Exception as error:
        raise RuntimeError(f"{locate(*document)}: cannot tokenise: {type(error).__name__}: {error}") from error
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as panic:  # tiktoken's PanicException, which `except Exception` misses
        raise RecordError(locate(*document), f"the tokenizer gave up on this text: {panic}") from panic


def num_text_bytes(text: str) -> int:
    """In UTF-8; a lone surrogate counts 3."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive documents of the stream."""

    counter: int
    """Counter of the first document."""
    numbers: np.ndarray
    """The documents' numbers in the source, int64 [documents]."""
    ids: list[np.ndarray] | None
    """Arrays of whole documents, one after the other, int32 [tokens of some]; None of a reader on demand."""
    lengths: np.ndarray
    """Tokens of each document, int64 [documents]; 0 for one that is left out."""
    bytes: np.ndarray
    """UTF-8 bytes of each text, int64 [documents]; 0 for one that is left out."""
    bad: np.ndarray
    """Which documents are bad records that were left out, bool [documents]."""
    held_out: np.ndarray
    """Which documents are left to validation, bool [documents]."""
    bad_records: list[tuple[int, RecordError]]
    """The bad records with their place among the documents."""
    error: Exception | None = None
    """What ended the stream after these documents."""

    @classmethod
    def failed(cls, counter: int, error: Exception) -> "Chunk":
        """No documents, and what ended the stream."""
        none, no = np.empty(0, np.int64), np.empty(0, bool)
        return cls(counter, none, [], none, none, no, no, [], error)

    @classmethod
    def join(cls, chunks: list["Chunk"]) -> "Chunk":
        """Chunks that follow each other, at least one."""
        if len(chunks) == 1:
            return chunks[0]
        before = np.cumsum([0, *(len(chunk.lengths) for chunk in chunks)]).tolist()
        ids = None if chunks[0].ids is None else [ids for chunk in chunks for ids in chunk.ids or []]
        return cls(
            chunks[0].counter,
            np.concatenate([chunk.numbers for chunk in chunks]),
            ids,
            np.concatenate([chunk.lengths for chunk in chunks]),
            np.concatenate([chunk.bytes for chunk in chunks]),
            np.concatenate([chunk.bad for chunk in chunks]),
            np.concatenate([chunk.held_out for chunk in chunks]),
            [(first + i, bad) for first, chunk in zip(before, chunks, strict=False) for i, bad in chunk.bad_records],
            chunks[-1].error,
        )

    def after(self, first: int) -> "Chunk":
        """The documents from the one at place `first` on, which hold on to nothing but an array of those before."""
        begin, ids = int(self.lengths[:first].sum()), None
        if self.ids is not None:
            ends = np.cumsum([len(part) for part in self.ids])
            kept = int(np.searchsorted(ends, begin, side="right"))
            ids = self.ids[kept:]
            if ids:
                ids[0] = ids[0][begin - int(ends[kept]) :]  # from its end on
        return Chunk(
            self.counter + first,
            self.numbers[first:].copy(),
            ids,
            self.lengths[first:].copy(),
            self.bytes[first:].copy(),
            self.bad[first:].copy(),
            self.held_out[first:].copy(),
            [(place - first, bad) for place, bad in self.bad_records if place >= first],
            self.error,
        )

    def count(self, documents: slice, seq_len: int) -> Ledger:
        """What the ledger says of some of the documents, but for their tokens."""
        lengths = self.lengths[documents]
        return Ledger(
            bytes=int(self.bytes[documents].sum()),
            bad_records=int(np.count_nonzero(self.bad[documents])),
            held_out=int(np.count_nonzero(self.held_out[documents])),
            fitting=int(np.count_nonzero((lengths > 0) & (lengths <= seq_len + 1))),
        )


def read_chunk(
    reader: Reader, counter: int, documents: np.ndarray, held_out: np.ndarray, skip_bad_records: bool
) -> Chunk:
    """Read and tokenise documents (numbers in the source, int64 [n]) whose counters begin at `counter`.

    An error travels in the chunk, to be raised by who needs the documents after it: a bad record too, unless it is
    to be skipped.
    """
    read = reader.read(documents, ~held_out)
    num, error, bad_records = len(read.lengths), read.error, read.bad
    if read.bad and not skip_bad_records:
        num, first = read.bad[0]
        error = RecordError(first.place, f'{first.reason}; data.on_bad_record = "skip" would leave it out and count it')
        bad_records = []
    bad = np.zeros(num, bool)
    bad[[i for i, _ in read.bad if i < num]] = True
    lengths = read.lengths[:num]
    ids = None if read.ids is None else [read.ids[: int(lengths.sum())]]
    return Chunk(counter, documents[:num], ids, lengths, read.bytes[:num], bad, held_out[:num], bad_records, error)

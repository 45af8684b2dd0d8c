"""The token stream of one source: documents as tokens, the position in them, and what became of each token.

Owns what travels between the rooms of `data`: documents read (`Documents`), runs of them in the stream's order
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
    """Tokens of all documents that were begun (best_fit: of all windows that were begun)."""
    targets: int = 0
    """Tokens that were predicted from another token of their document."""
    document_first: int = 0
    """First tokens of documents, which nothing predicts; so also the number of documents begun."""
    carried: int = 0
    """Tokens that wait for the next row."""
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
    """Where a source's stream stands: the next row, and the place in the documents from which it is made."""

    row: int = 0
    """Rows that the source has dealt."""
    document: int = 0
    """split: counter (epochs included) of the document that holds the next row's first token. best_fit: of the first
    document in the window."""
    offset: int = 0
    """split: index of that token in the document. best_fit: rows of the window that are dealt."""
    ledger: Ledger = field(default_factory=Ledger)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able and small: counts of 0 are left out."""
        ledger = {name: count for name, count in asdict(self.ledger).items() if count}
        return {"row": self.row, "document": self.document, "offset": self.offset, "ledger": ledger}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "SourceCursor":
        return cls(state["row"], state["document"], state["offset"], Ledger(**state["ledger"]))


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents that were asked for by number, as tokens."""

    ids: np.ndarray
    """int32 [tokens], document after document."""
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

    def sizes(self, documents: np.ndarray) -> np.ndarray:
        """About how many bytes each of the documents has, int64 [n], without reading them."""

    def read(self, documents: np.ndarray, keep: np.ndarray) -> Documents:
        """The tokens of documents (int64 [n]); what is not to be kept (bool [n]) is not even read.

        Raises nothing but KeyboardInterrupt and SystemExit. What bad records mean is the caller's business.
        """

    def locate(self, document: int) -> str:
        """The document's place for people: file, and line or row."""


class StreamedReader:
    """Reads text and tokenises it on the spot."""

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
                tokens += len(self._encode(beginning, int(sized[i]))) * (len(text) / max(1, len(beginning)))
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:  # met again, and told, when the document's turn comes
                continue
            read += float(sizes[i])
        return round(tokens / max(1.0, read) * float(sizes.mean()) * num_documents)

    def sizes(self, documents: np.ndarray) -> np.ndarray:
        return self._source.sizes(documents)

    def locate(self, document: int) -> str:
        return self._source.locate(*self.numbering.place(document))

    def read(self, documents: np.ndarray, keep: np.ndarray) -> Documents:
        ids = [np.empty(0, np.int32)]  # concatenate wants at least one array
        lengths: list[int] = []
        sizes: list[int] = []
        bad: list[tuple[int, RecordError]] = []
        error: Exception | None = None
        try:
            for i, (document, kept) in enumerate(zip(documents.tolist(), keep.tolist(), strict=True)):
                length = size = 0
                if kept:
                    try:
                        text = self._source.read(document)
                        ids.append(self._encode(text, document))
                        length, size = len(ids[-1]), num_text_bytes(text)
                    except RecordError as broken:  # a copy: its traceback and its cause hold what was read
                        bad.append((i, RecordError(broken.place, broken.reason)))
                lengths.append(length)
                sizes.append(size)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as failure:
            error = located(failure, self.locate(document))
        return Documents(np.concatenate(ids), np.array(lengths, np.int64), np.array(sizes, np.int64), bad, error)

    def _encode(self, text: str, document: int) -> np.ndarray:
        return encode_or_raise(self._encode_document, text, lambda: self.locate(document))


def located(error: BaseException, place: str) -> Exception:
    """What a user reads of an error: itself, where its words name a place, else an error that does. MemoryError has no
    words, and the panic of a library is no Exception."""
    if isinstance(error, OSError | ValueError | RuntimeError):
        return error
    return RuntimeError(f"{place}: {type(error).__name__}: {error}".removesuffix(": "))


def encode_or_raise(encode_document: Callable[[str], np.ndarray], text: str, place: Callable[[], str]) -> np.ndarray:
    """The tokens of a document. Raises RecordError for a text that the tokenizer gives up on, RuntimeError for a bug of
    its own."""
    try:
        return encode_document(text)
    except Exception as error:
        raise RuntimeError(f"{place()}: cannot tokenise: {type(error).__name__}: {error}") from error
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as panic:  # tiktoken's PanicException, which `except Exception` misses
        raise RecordError(place(), f"the tokenizer gave up on this text: {panic}") from panic


def num_text_bytes(text: str) -> int:
    """In UTF-8; a lone surrogate counts 3."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True, eq=False)
class Chunk:
    """The tokens of consecutive documents of the stream, one after the other."""

    counter: int
    """Counter of the first document."""
    ids: np.ndarray
    """int32 [tokens]."""
    lengths: np.ndarray
    """Tokens of each document, int64 [documents]; 0 for one that is left out."""
    bytes: np.ndarray
    """UTF-8 bytes of each text, int64 [documents]; 0 for one that is left out."""
    bad: np.ndarray
    """Which documents are bad records that were left out, bool [documents]."""
    held_out: np.ndarray
    """Which documents are left to validation, bool [documents]."""
    bad_records: list[RecordError]
    error: Exception | None
    """What ended the stream behind these documents."""


def read_chunk(
    reader: Reader, counter: int, documents: np.ndarray, held_out: np.ndarray, skip_bad_records: bool
) -> Chunk:
    """Read and tokenise documents (numbers in the source, int64 [n]) whose counters begin at `counter`.

    An error travels in the chunk, to be raised by who needs the documents behind it: a bad record too, unless it is
    to be skipped.
    """
    read = reader.read(documents, ~held_out)
    num, error, bad_records = len(read.lengths), read.error, [bad for _, bad in read.bad]
    if read.bad and not skip_bad_records:
        num, first = read.bad[0]
        error = RecordError(first.place, f'{first.reason}; data.on_bad_record = "skip" would leave it out and count it')
        bad_records = []
    bad = np.zeros(num, bool)
    bad[[i for i, _ in read.bad if i < num]] = True
    ids = read.ids[: int(read.lengths[:num].sum())]
    return Chunk(counter, ids, read.lengths[:num], read.bytes[:num], bad, held_out[:num], bad_records, error)

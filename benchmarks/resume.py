"""How long a loader takes to go on at a far document: python -m benchmarks.resume [--rounds N] [--out FILE]

The source is synthetic: 2,000,000,000 documents, each made from its number when it is read, and shuffled in blocks as
files are. A stream is opened at the documents 0, 10^3, 10^6 and 10^9, in turn, and its first step's rows are taken.
Opening the files of a real corpus, which does not depend on the position, is not in it: benchmarks.data has that.
"""

import json
import statistics
import sys
import time
from datetime import date

import numpy as np

from benchmarks.common import circumstances, command_line, publish
from titanlite.config import DataConfig
from titanlite.data.corpus import Corpus, open_rows
from titanlite.data.feed import StreamSource
from titanlite.data.mixture import Deck
from titanlite.data.order import DocumentOrder, HeldOut
from titanlite.data.source import Numbering
from titanlite.data.stream import EncodedDocuments

NUM_DOCUMENTS = 2_000_000_000
MEAN_TOKENS, BYTES_PER_TOKEN = 300, 4
ROWS, SEQ_LEN = 8, 2048
POSITIONS = (0, 10**3, 10**6, 10**9)
MOST_SECONDS, MOST_BYTES = 1.0, 1024


class SyntheticReader:
    """Documents of 1 to 599 tokens, as long as their number says."""

    numbering = Numbering(np.array([NUM_DOCUMENTS]))
    num_tokens = NUM_DOCUMENTS * MEAN_TOKENS
    on_demand = False

    def sizes(self, documents: np.ndarray) -> np.ndarray:
        return (documents * 2654435761 % (2 * MEAN_TOKENS - 1) + 1) * BYTES_PER_TOKEN

    def read(self, documents: np.ndarray, keep: np.ndarray) -> EncodedDocuments:
        sizes = self.sizes(documents) * keep
        lengths = sizes // BYTES_PER_TOKEN
        ids = np.repeat(documents % 8000, lengths).astype(np.int32)
        return EncodedDocuments(ids, lengths, sizes, [])

    def tokens(self, documents: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        raise AssertionError("they came with `read`")

    def locate(self, document: int) -> str:
        return f"document {document}"


def open_corpus() -> Corpus:
    source = StreamSource(
        "synthetic",
        SyntheticReader(),
        DocumentOrder(NUM_DOCUMENTS, 0, DataConfig().shuffle_block),
        HeldOut("synthetic", ["synthetic"], 0.0),
    )
    identity = {
        "seq_len": SEQ_LEN,
        "seed": 0,
        "shuffle_block": DataConfig().shuffle_block,
        "packing": "split",
        "window_tokens": DataConfig().window_tokens,
        "held_out_fraction": 0.0,
        "tokenizer": "0" * 32,
        "sources": {"synthetic": "1 of 1 rows, " + "0" * 32},
    }
    return Corpus({"synthetic": source}, {}, Deck({"synthetic": 1.0}, 0), {}, identity)


def cursor_at(document: int) -> dict[str, object] | None:
    """Of a run whose window begins with this document, after about as many tokens as the documents before it have."""
    corpus = open_corpus()
    if not document:
        return None
    row = document * MEAN_TOKENS // SEQ_LEN
    tokens = row * SEQ_LEN
    ledger = {
        "tokens_read": tokens + 1,
        "targets": tokens - document,
        "document_first": document + 1,
        "bytes": tokens * BYTES_PER_TOKEN,
    }
    source = {"row": row, "document": document, "offset": 0, "dealt": 0, "ledger": ledger}
    return {"row": row, "sources": {"synthetic": source}, "stream": corpus.identity}


def first_rows(document: int) -> tuple[float, int]:
    """Seconds until the first step's rows are there, and bytes of the state after them."""
    cursor = cursor_at(document)
    begin = time.perf_counter()
    stream = open_rows(open_corpus(), DataConfig(), eos_id=1, num_rows=ROWS, cursor=cursor)
    stream.take()
    return time.perf_counter() - begin, len(json.dumps(stream.cursor()))


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="counted openings at each document (default 9)")
    arguments = parser.parse_args()
    runs = [{document: first_rows(document) for document in POSITIONS} for _ in range(arguments.rounds + 1)][1:]
    seconds = {document: statistics.median(run[document][0] for run in runs) for document in POSITIONS}
    state = max(run[document][1] for run in runs for document in POSITIONS)
    later = seconds[10**9] - seconds[10**3]
    lines = "\n".join(
        f"| {document:,} | {seconds[document] * 1e3:.1f} ({min(times):.1f}-{max(times):.1f}) |"
        for document in POSITIONS
        for times in [[run[document][0] * 1e3 for run in runs]]
    )
    publish(
        f"""# Going on at a far document, CPU, {date.today()}

| at document | ms to the first step's rows, median (range) |
|---|---|
{lines}

- Document 10^9 takes {later * 1e3:+.1f} ms more than document 10^3 (bound {MOST_SECONDS:g} s:
  {"met" if later <= MOST_SECONDS else "missed"}).
- The state of the loader has at most {state} bytes of JSON (bound {MOST_BYTES}:
  {"met" if state <= MOST_BYTES else "missed"}).
- {NUM_DOCUMENTS:,} documents, {ROWS} rows of {SEQ_LEN} tokens a step, {arguments.rounds} rounds after one that is not
  counted
{circumstances(" ".join(["python -m benchmarks.resume", *sys.argv[1:]]), "")}""",
        arguments.out,
    )
    return 0 if later <= MOST_SECONDS and state <= MOST_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())

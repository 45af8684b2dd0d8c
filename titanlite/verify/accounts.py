"""The accounts of a corpus: what `python -m titanlite.verify data` counts, prints and proves.

Owns the order of the questions and the words of the answers. Refuses to count by itself: reading, sums, packing and
comparison are those of the modules beside it. Imports no torch.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from titanlite.config import Config
from titanlite.data.cache.reader import CachedReader
from titanlite.data.cache.writer import available_cores
from titanlite.data.corpus import Corpus, open_corpus, open_rows, window_rows
from titanlite.data.feed import EndOfData, in_threads_of
from titanlite.data.rows import total
from titanlite.data.stream import Ledger, SourceCursor
from titanlite.data.windows import Dealing
from titanlite.inspection.survey import pack_every_way, survey_of
from titanlite.inspection.transcript import aligned, statistics_text
from titanlite.tokenizer import Tokenizer
from titanlite.verify.account import Account, AccountsDiffer, check_cursor
from titanlite.verify.census import Census, take_census
from titanlite.verify.proof import ProvenStep, Prover
from titanlite.verify.sampling import Walk, choose_steps, deal_all, lanes_of, measured, row_of

_NAMED = 20  # bad records
_AHEAD = 4  # portions of documents per thread


def audit(config: Config, num_steps: int) -> None:
    """Read the corpus once, print its accounts, and prove them on `num_steps` steps of the training.

    Raises AccountsDiffer, which names the first thing that is not what it should be, and ValueError, OSError or
    RuntimeError for what cannot be read or would stop the training.
    """
    data, num_rows = config.data, config.training.global_batch_size
    tokenizer = Tokenizer.load(config.tokenizer.path)
    corpus = open_corpus(data, tokenizer, seq_len=config.training.seq_len, seed=config.training.seed)
    num_threads = available_cores()
    threads = ThreadPoolExecutor(num_threads)
    try:
        censuses = _read(corpus, threads, num_threads)
        _check_bad_records(corpus, censuses, data.on_bad_record == "stop")
        by_length = measured(corpus, censuses)
        epochs = _one_epoch(by_length, config, censuses, tokenizer.eos_id)
        print(_statistics(config, corpus, censuses), flush=True)
        last = _last_step(by_length, config, tokenizer.eos_id)
        rows_per_epoch = {
            name: censuses[name].trained.sum() / config.training.seq_len if data.packing == "split" else epochs[name]
            for name in corpus.sources
        }
        steps = choose_steps(by_length, rows_per_epoch, num_rows, last, num_steps)
        walk = Walk(by_length, data, tokenizer.eos_id)
        prover = Prover(corpus, data, tokenizer, censuses, num_rows, threads)
        run = _Run(Path(config.job.dump_folder), steps)
        print(f"\n{len(steps)} of {last:,} steps, made again document by document:")
        proven = []
        with tqdm(steps, desc="proving", unit="step", leave=False, disable=None) as bar:
            for step in bar:
                row = (step - 1) * num_rows
                proven.append(prover.prove(step, walk.to(row)))
                bar.write(_step_text(proven[-1], corpus, run.check(proven[-1], row)))
        _close(by_length, config, tokenizer.eos_id, proven, prover.seeks, run)
    except EndOfData as end:
        raise AccountsDiffer(f"{end}, which the lengths of its documents do not say") from end
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _read(corpus: Corpus, threads: ThreadPoolExecutor, num_threads: int) -> dict[str, Census]:
    """Every document once; prints what was read."""
    start = time.monotonic()
    censuses: dict[str, Census] = {}
    readers = {name: source.reader for name, source in corpus.sources.items()}
    num_bytes = sum(
        reader.num_text_bytes if isinstance(reader, CachedReader) else corpus.texts[name].num_bytes
        for name, reader in readers.items()
    )
    with tqdm(
        total=num_bytes, desc="reading every document", unit="B", unit_scale=True, leave=False, disable=None
    ) as bar:
        for name, source in corpus.sources.items():
            bar.set_postfix_str(f"source {name}")
            censuses[name] = take_census(source, in_threads_of(threads), _AHEAD * num_threads, bar.update)
    seconds = time.monotonic() - start
    titles = ("source", "read from", "files", "documents", "bytes", "tokens", "held out", "their tokens", "bad records")
    counts: list[list[int]] = []
    rows = [[*titles]]
    for name, census in censuses.items():
        lengths = census.lengths
        held = int(np.count_nonzero(census.held_out))
        files = len(corpus.texts[name].files)
        read = (files, len(lengths), int(census.bytes.sum()), int(lengths.sum()))
        counts.append([*read, held, int(lengths[census.held_out].sum()), census.num_bad])
        way = "token cache" if isinstance(readers[name], CachedReader) else "text"
        rows.append([name, way, *(f"{count:,}" for count in counts[-1])])
        _equal(f"source {name}: documents", len(lengths), "read", readers[name].numbering.num_documents, "numbered")
        if isinstance(readers[name], CachedReader):
            _equal(f"source {name}: tokens", read[3], "read", readers[name].num_tokens, "by the cache's headers")
    sums = np.sum(counts, axis=0).tolist()
    if len(rows) > 2:
        rows.append(["all", "", *(f"{count:,}" for count in sums)])
    print(aligned(rows, left=(0, 1)))
    rates = f"{sums[2] / seconds / 1e6:.1f} MB/s, {sums[3] / seconds / 1e6:.2f} million tokens/s"
    print(f"every document was read once, in {seconds:.1f} s with {num_threads} threads: {rates}", flush=True)
    return censuses


def _check_bad_records(corpus: Corpus, censuses: Mapping[str, Census], stops: bool) -> None:
    """Print the bad records; raise for the first if it stops a run."""
    bad = [(name, record) for name, census in censuses.items() for record in census.bad]
    if not bad:
        return
    lines = ["", "bad records:", *(f"  source {name}: {record}" for name, record in bad[:_NAMED])]
    shown = Counter(name for name, _ in bad[:_NAMED])
    for name, census in censuses.items():
        if more := census.num_bad - shown[name]:
            lines.append(f"  source {name}: {more:,} more")
    print(*lines, sep="\n", flush=True)
    if stops:
        raise ValueError(
            f'{bad[0][1]}; data.on_bad_record = "stop" ends a run at a bad record: mend it, or let "skip" leave it out'
        )


def _one_epoch(corpus: Corpus, config: Config, censuses: Mapping[str, Census], eos_id: int) -> dict[str, int]:
    """Print the ledger of one epoch of each source by itself; the rows of each."""
    once = {name: replace(source, max_epochs=1) for name, source in corpus.sources.items()}
    ledgers: dict[str, Ledger] = {}
    rows: dict[str, int] = {}
    for lane in lanes_of(replace(corpus, sources=once), config.data, eos_id):
        name, census = lane.source.name, censuses[lane.source.name]
        place, ledgers[name] = deal_all(lane)
        dealing = Dealing(config.training.seed, name, config.data.shuffle)
        rows_of = window_rows(corpus, config.data)[name]
        account = Account(lane.source, census, config.data.packing, dealing, config.training.seq_len, rows_of)
        account.take(place.row)
        check_cursor(f"source {name}, one epoch", place, account.cursor)
        check_cursor(
            f"source {name}, one epoch",
            replace(place, ledger=ledgers[name]),
            _all_read(place, census, config.training.seq_len),
        )
        rows[name] = place.row
    print("\none epoch of each source:")
    print(_ledger_text(ledgers, rows, "left"))
    print("tokens read = targets + document-first + left, and is the sum over the documents read. left: behind the")
    print("last whole row; the next epoch takes them up, and where data.max_epochs ends the data they are dropped\n")
    return rows


def _all_read(place: SourceCursor, census: Census, seq_len: int) -> SourceCursor:
    """The cursor at the end of an epoch, with every token of the documents in its ledger."""
    num_tokens, ledger = int(census.trained.sum()), place.ledger
    read = replace(
        ledger,
        tokens_read=num_tokens,
        carried=0,
        dropped=num_tokens - ledger.targets - ledger.document_first,
        bytes=int(census.bytes[~census.held_out].sum()),
        bad_records=int(np.count_nonzero(census.lengths[~census.held_out] == 0)),
        held_out=int(np.count_nonzero(census.held_out)),
        fitting=int(np.count_nonzero((census.trained > 0) & (census.trained <= seq_len + 1))),
    )
    return replace(place, ledger=read)


def _equal(what: str, one: int, of_one: str, other: int, of_other: str) -> None:
    if one != other:
        raise AccountsDiffer(f"{what}: {one:,} {of_one} and {int(other):,} {of_other}")


def _statistics(config: Config, corpus: Corpus, censuses: Mapping[str, Census]) -> str:
    """Lengths, epochs, and what packing makes of the documents."""
    surveys = {name: survey_of(source, censuses[name].trained) for name, source in corpus.sources.items()}
    packed = pack_every_way(surveys, config.training.seq_len)
    shares = corpus.deck.counts / corpus.deck.num_rows
    left = float(shares @ [packed[name][config.data.packing].attention for name in corpus.sources])
    return (
        statistics_text(config, corpus, surveys, packed)
        + f"\n\ndocument masking saves {1 - left:.1%} of the attention work of these rows"
    )


def _last_step(corpus: Corpus, config: Config, eos_id: int) -> int:
    """The last step of the training, or of its data."""
    num_rows, last = config.training.global_batch_size, config.training.steps
    for i, lane in enumerate(lanes_of(corpus, config.data, eos_id)):
        if lane.source.max_epochs:
            place, _ = deal_all(lane)
            last = row_of(corpus.deck, i, place.row, last * num_rows) // num_rows
    if not last:
        raise ValueError(f"training.global_batch_size = {num_rows}: the data end before the first step")
    return last


def _ledger_text(ledgers: Mapping[str, Ledger], rows: Mapping[str, int], waiting: str) -> str:
    """A table of the ledgers of all sources; `waiting` is the title of what is neither target nor document-first."""
    lines = [
        ["source", "rows", "tokens read", "targets", "document-first", waiting, "padding", "held out", "bad records"]
    ]
    both = {name: asdict(ledger) for name, ledger in ledgers.items()}
    if len(both) > 1:
        both["all"] = total(dict(ledgers))
    for name, count in both.items():
        rest = count["carried"] + count["dropped"]
        counts = (
            rows[name] if name in rows else sum(rows.values()),
            *(count[key] for key in ("tokens_read", "targets", "document_first")),
            rest,
            *(count[key] for key in ("padding", "held_out", "bad_records")),
        )
        lines.append([name, *(f"{count:,}" for count in counts)])
    return aligned(lines)


def _close(corpus: Corpus, config: Config, eos_id: int, steps: Sequence[ProvenStep], seeks: bool, run: "_Run") -> None:
    """Print the ledger of the training, which the last of its steps ends, and what was proven."""
    last = steps[-1]
    places = {name: SourceCursor.from_dict(state) for name, state in last.cursor["sources"].items()}
    ledgers, waiting = {name: place.ledger for name, place in places.items()}, "carried"
    why = "carried: read, and waiting in the window's rows that are not dealt yet"
    if last.number < config.training.steps:
        num_rows = config.training.global_batch_size
        try:
            first = num_rows - 1  # rank 0 would warn of bad records
            open_rows(corpus, config.data, eos_id=eos_id, num_rows=num_rows, first=first, cursor=last.cursor).take()
            raise AccountsDiffer(f"step {last.number + 1} can be made, and the lengths of the documents end before it")
        except EndOfData as end:
            ledgers = {name: Ledger(**counts) for name, counts in end.ledgers.items()}
            waiting, why = "dropped", f"dropped after step {last.number:,}: {end}"
    print(f"\n{last.number:,} of {config.training.steps:,} steps of training:")
    print(_ledger_text(ledgers, {name: place.row for name, place in places.items()}, waiting))
    print(why)
    ways = sum((step.ways for step in steps), Counter())
    compared = ", ".join(f"{count:,} by their {way}" for way, count in sorted(ways.items()) if count)
    facts = [
        "the ledger of an epoch closes, over the lengths of all documents",
        f"{sum(step.num_rows for step in steps):,} rows hold the tokens of their documents, piece by piece: {compared}",
        "both halves of each step, as two ranks get them, and its fingerprint, by hashlib",
        "cursor and ledger before and after each step are what the lengths of all documents before it add up to",
    ]
    if seeks:
        facts.append("the search for each step by the lengths in the token cache ends at the same place")
    if run.num_compared:
        facts.append(f"{run.folder} logged the same fingerprints and cursors for {run.num_compared} of these steps")
    print("", *(f"right  {fact}" for fact in facts), sep="\n")


def _step_text(step: ProvenStep, corpus: Corpus, logged: bool) -> str:
    spans = []
    for name, (first, last) in step.documents.items():
        epochs = [counter // corpus.sources[name].order.num_documents for counter in (first, last)]
        epoch = f"epoch {epochs[0]}" if epochs[0] == epochs[1] else f"epochs {epochs[0]} to {epochs[1]}"
        spans.append(f"documents {first:,} to {last:,} of {name} ({epoch})")
    return (
        f"right  step {step.number:,}: {step.num_rows:,} rows, {step.num_pieces:,} pieces of"
        f" {' and '.join(spans)}; batch {step.fingerprint}{', as the run logged it' if logged else ''}"
    )


class _Run:
    """What a run folder says of some steps; nothing where there is none."""

    def __init__(self, folder: Path, steps: Sequence[int]) -> None:
        self.folder, self.num_compared = folder, 0
        wanted = {*steps, *(step - 1 for step in steps)}
        self._cursors, self._metrics = (_logged(folder / name, wanted) for name in ("cursor.jsonl", "metrics.jsonl"))

    def check(self, step: ProvenStep, row: int) -> bool:
        """Compare a step whose rows begin at `row`; false if the run says nothing of these rows.

        Raises AccountsDiffer.
        """
        cursor, metrics = self._cursors.get(step.number), self._metrics.get(step.number)
        before = self._cursors.get(step.number - 1, {"row": 0} if step.number == 1 else {})
        if cursor and (before.get("row", row), cursor["row"]) != (row, step.cursor["row"]):
            return False  # the run has had another global_batch_size
        where = f"step {step.number}, {self.folder}"
        for name, entry in (("cursor.jsonl", cursor), ("metrics.jsonl", metrics)):
            if entry and entry["batch_fingerprint"] != step.fingerprint:
                raise AccountsDiffer(
                    f"{where}/{name}: the run trained on batch {entry['batch_fingerprint']}, and this config and these"
                    f" documents make {step.fingerprint}"
                )
        if cursor and cursor["sources"] != step.cursor["sources"]:
            raise AccountsDiffer(
                f"{where}/cursor.jsonl: {cursor['sources']} in the run, {step.cursor['sources']} by now"
            )
        self.num_compared += bool(cursor or metrics)
        return bool(cursor or metrics)


def _logged(path: Path, steps: set[int]) -> dict[int, dict[str, Any]]:
    """The lines of a log of steps that are about some of them; a line that was not written whole is passed over."""
    found: dict[int, dict[str, Any]] = {}
    if not path.exists():
        return found
    with open(path, "rb") as log:
        for line in log:
            match = re.match(rb'\{"step": (\d+), ', line)
            if match and int(match[1]) in steps and line.endswith(b"}\n"):
                entry = json.loads(line)
                if "batch_fingerprint" in entry:  # a row of validation has none
                    found[int(match[1])] = entry
    return found

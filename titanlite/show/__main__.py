"""Show what a step trained on, or what a corpus is made of: python -m titanlite.show --run RUN_FOLDER --step N --row R

Owns the search for a step: in a run's cursor log, in the token cache, or by reading up to it. Refuses to import torch:
it answers at once.
"""

import argparse
import json
import math
import os
import sys
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from titanlite.command import exit_code
from titanlite.config import Config, OneLineParser, load_config
from titanlite.data.cache.writer import available_cores
from titanlite.data.corpus import Corpus, open_corpus, open_rows
from titanlite.data.feed import EndOfData, ReadAhead, in_threads_of, one_by_one
from titanlite.data.rows import StepRows
from titanlite.data.stream import SourceCursor
from titanlite.data.windows import fingerprint_part, row_digest
from titanlite.inspection.seek import seek
from titanlite.inspection.survey import pack_every_way, survey
from titanlite.inspection.transcript import pieces_of, row_text, statistics_text, step_text
from titanlite.log import init_logging
from titanlite.tokenizer import Tokenizer

DESCRIPTION = """\
Show what a step trains on: the documents in its rows, with source, file, line or row number, counter in the source's
stream, epoch and token offset; with --row their text. Steps count from 1; rows, counters, epochs and offsets from 0.

--run finds the step in the run's cursor log at once, takes the run's own config.toml, and compares the step's
fingerprint with the one that the run logged. Without it, the step is found by the lengths in the token cache; sources
that have none are read up to it, with a bar. Paths in a config are relative to the current folder, as in training.
"""


@dataclass(frozen=True, eq=False)
class FoundStep:
    """Where a step is, and what a run says of it."""

    number: int
    num_rows: int
    found: str
    """How, in words."""
    cursor: dict[str, Any]
    """Of the stream before the step."""
    fingerprint: str | None = None
    """As the run logged it; None where no run made the step."""


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 shown, 1 not, or not what the run logged; a line says why."""

    def work() -> bool:
        options, arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        config = load_config(arguments)
        init_logging()
        return show_statistics(config) if options.stats else show_step(config, options)

    return exit_code(work, also=(RuntimeError, EndOfData))


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The verb's own options, and the config's arguments."""
    parser = OneLineParser(
        prog="python -m titanlite.show",
        usage="%(prog)s (--job.config_file FILE | --run FOLDER) (--step N [--row R [--raw]] | --stats)"
        " [--section.key VALUE ...]",
        description=DESCRIPTION,
        epilog="--section.key VALUE overrides a key of the config: python -m titanlite.train --help explains them all.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--run", metavar="FOLDER", help="run folder (job.dump_folder) whose step to show")
    add("--step", type=int, metavar="N", help="step to show, from 1")
    add("--row", type=int, metavar="R", help="show the whole text of this row of the step's global batch, from 0")
    add(
        "--raw",
        action="store_true",
        help="with --row: the text as it is, also what changes a terminal (default: escaped)",
    )
    add(
        "--stats",
        action="store_true",
        help="show lengths of documents, epochs, and what each way of packing cuts, pads and saves, by source; exact"
        " from the token cache, else from a sample",
    )
    options, arguments = parser.parse_known_args(argv)
    if options.stats and (options.step, options.row) != (None, None):
        raise ValueError("--stats is about the corpus: leave out --step and --row")
    if not options.stats and options.step is None:
        raise ValueError("name a step with --step N, or ask for --stats; --help explains every option")
    if options.step is not None and options.step < 1:
        raise ValueError(f"--step {options.step}: steps count from 1")
    if options.raw and options.row is None:
        raise ValueError("--raw is about the text of a row: add --row R")
    if options.run is not None:
        path = Path(options.run) / "config.toml"
        if any(argument.split("=")[0] == "--job.config_file" for argument in arguments):
            raise ValueError("--run takes the config of the run: leave out --job.config_file")
        if not path.is_file():
            raise ValueError(f"--run {options.run}: no config.toml in there, so it is no run folder")
        arguments = ["--job.config_file", str(path), *arguments]
    return options, arguments


def show_step(config: Config, options: argparse.Namespace) -> bool:
    """Print a step, or a row of it; False where it is not what the run logged."""
    # The rows are the same whatever reads them: a cache is taken where it is there, and not written only to look.
    config = replace(config, data=replace(config.data, reader="auto"))
    tokenizer, corpus = open_all(config)
    pool: ThreadPoolExecutor | None = None
    read_ahead: ReadAhead = one_by_one
    try:
        if options.run is None:
            if not all(source.reader.on_demand for source in corpus.sources.values()):
                read_ahead = in_threads_of(pool := ThreadPoolExecutor(available_cores()))
            step = find_in_stream(config, corpus, tokenizer.eos_id, options.step, read_ahead)
        else:
            step = find_in_run(Path(options.run), config, corpus, options.step)
        if options.row is not None and not 0 <= options.row < step.num_rows:
            raise ValueError(f"--row {options.row}: step {step.number} has the rows 0 to {step.num_rows - 1}")
        saved_corpus = _read_json(Path(options.run) / "corpus.json") if options.run else None
        rows = open_rows(
            corpus,
            config.data,
            eos_id=tokenizer.eos_id,
            num_rows=step.num_rows,
            cursor=step.cursor,
            saved_corpus=saved_corpus,
            read_ahead=read_ahead,
        ).take()
    except EndOfData as end:
        raise ValueError(f"--step {options.step} lies beyond the end of the data: {end}") from end
    finally:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
    fingerprint = f"{fingerprint_part(np.array([row_digest(row) for row in rows.tokens], np.uint64), 0):016x}"
    print(_header(step, rows, corpus, fingerprint), end="\n\n")
    if options.row is None:
        print(step_text(rows, corpus, tokenizer))
    else:
        name = list(corpus.sources)[int(rows.sources[options.row])]
        print(f"row {options.row}, which is row {rows.row_index[options.row]:,} of the stream, from source {name}")
        print(row_text(pieces_of(rows, options.row, corpus), tokenizer, raw=options.raw))
    if step.fingerprint in (None, fingerprint):
        return True
    sys.stdout.flush()
    print(
        f"titanlite: NOT WHAT THE RUN TRAINED ON: it logged batch {step.fingerprint} for step {step.number}, and these"
        f" rows are batch {fingerprint}",
        file=sys.stderr,
    )
    return False


def show_statistics(config: Config) -> bool:
    config = replace(config, data=replace(config.data, reader="auto"))
    _, corpus = open_all(config)
    surveys = {name: survey(source) for name, source in corpus.sources.items()}
    print(statistics_text(config, corpus, surveys, pack_every_way(surveys, config.training.seq_len)))
    return True


def open_all(config: Config) -> tuple[Tokenizer, Corpus]:
    tokenizer = Tokenizer.load(config.tokenizer.path)
    return tokenizer, open_corpus(config.data, tokenizer, seq_len=config.training.seq_len, seed=config.training.seed)


def find_in_stream(config: Config, corpus: Corpus, eos_id: int, number: int, read_ahead: ReadAhead) -> FoundStep:
    """A step that no run need have made, from the lengths in the token cache, else from the text."""
    num_rows = config.training.global_batch_size
    cursor = seek(corpus, config.data, eos_id=eos_id, row=(number - 1) * num_rows, read_ahead=read_ahead)
    cached = all(source.reader.on_demand for source in corpus.sources.values())
    return FoundStep(number, num_rows, "by the token cache" if cached else "by reading up to it", cursor)


def find_in_run(folder: Path, config: Config, corpus: Corpus, number: int) -> FoundStep:
    """A step that the run made, or the next that it would make, from the run's cursor log."""
    path = folder / "cursor.jsonl"
    try:
        before, at = (logged(path, n) for n in (number - 1, number))
        if before is None and number > 1:
            first, last = logged(path, 0, or_later=True), logged(path, None)
            steps = f"the steps {first['step']} to {last['step']}" if first and last else "no step"
            raise ValueError(
                f"--step {number}: its rows begin where step {number - 1} ended, and {path} holds {steps};"
                " --job.config_file instead of --run finds any step"
            )
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file, so the run has no cursor log; --job.config_file instead of --run finds any step"
        ) from None
    if before is None:
        start = {name: SourceCursor().to_dict() for name in corpus.sources}
        before = {"row": 0, "sources": start, "stream": at["stream"] if at else corpus.identity}
    if at is None:
        return FoundStep(number, config.training.global_batch_size, "by the cursor log", before)
    return FoundStep(number, at["row"] - before["row"], "by the cursor log", before, at["batch_fingerprint"])


def logged(path: Path, step: int | None, or_later: bool = False) -> dict[str, Any] | None:
    """A step's line of a cursor log, where steps ascend, found by bisection; None where it is missing. With or_later
    the first from that step on; of no step: the last line. Lines that were not written whole are passed over."""
    with open(path, "rb") as log:

        def first_from(offset: int) -> dict[str, Any] | None:
            """The first line that begins behind a place in the file; from 0 on also the first of all."""
            log.seek(offset)
            if offset:
                log.readline()
            return next((entry for entry in map(_parse, log) if entry is not None), None)

        def step_from(offset: int) -> float:
            entry = first_from(offset)
            return math.inf if entry is None else entry["step"]

        size = os.path.getsize(path)
        place = bisect_left(range(size), math.inf if step is None else step, key=step_from)
        if step is None:
            return first_from(place - 1) if place else None
        found = first_from(place)
        return found if found is not None and (or_later or found["step"] == step) else None


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
        return entry if isinstance(entry["step"], int) else None
    except (ValueError, TypeError, KeyError):
        return None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return None


def _header(step: FoundStep, rows: StepRows, corpus: Corpus, fingerprint: str) -> str:
    said = {None: "", fingerprint: ", as the run logged it"}.get(step.fingerprint, ", NOT WHAT THE RUN LOGGED")
    num_rows, seq_len = len(rows.tokens), rows.tokens.shape[1] - 1
    lines = [
        f"step {step.number:,}: {num_rows:,} rows of {seq_len:,} tokens, batch {fingerprint}{said}",
        f"rows {rows.row_index[0]:,} to {rows.row_index[-1]:,} of the stream, found {step.found}",
    ]
    for i, (name, source) in enumerate(corpus.sources.items()):
        mine = np.flatnonzero(rows.sources == i).tolist()
        counters = np.concatenate([np.empty(0, np.int64), *(rows.counters[k] for k in mine)])
        documents = np.unique(counters[counters >= 0])
        kind = corpus.manifest["sources"][name]["reader"]
        span = f", documents {documents[0]:,} to {documents[-1]:,}" if len(documents) else ""
        epochs = np.unique(documents // source.order.num_documents).tolist()
        span += f", epoch {' to '.join(map(str, sorted({epochs[0], epochs[-1]})))}" if epochs else ""
        lines.append(f"source {name} ({kind}): {len(mine):,} rows{span}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""Tokenise a config's data once, ahead of its runs: python -m titanlite.cache --job.config_file FILE [--processes N]

`--help` explains it.
"""

import sys
import time

from titanlite.command import exit_code
from titanlite.config import load_config, take_number
from titanlite.config.sections import DataConfig, SourceConfig, source_configs
from titanlite.data.cache.reader import num_cached_tokens, open_cache
from titanlite.data.cache.writer import available_cores, write_cache
from titanlite.data.index import cache_folder
from titanlite.data.source import open_source
from titanlite.log import init_logging, logger
from titanlite.tokenizer import Tokenizer

USAGE = """\
usage: python -m titanlite.cache --job.config_file FILE [--processes N] [--section.key VALUE ...]

Write the tokens of every source of [data] to data.cache_dir, where each run of the same files and tokenizer finds them,
with data.reader = "auto" or "cached". What is there already stays: after a kill, or with more files, only what is
missing is written, together with other jobs that want the same. Ends with a table of the sources; exit code 0, or 1
after one line that names what to fix.

  --processes int   (default: the cores that this process may use)
      Processes that tokenise.

All other options are those of a training run:

"""
COLUMNS = ("source", "files", "documents", "tokens", "text bytes", "bytes/token", "bad records", "seconds", "tokens/s")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 the cache is complete, 1 a failure told in one line, 130 stopped by Ctrl-C."""
    stopped = "stopped; what was written stays, and the next start goes on from there"
    return exit_code(lambda: write(list(sys.argv[1:] if argv is None else argv)), (RuntimeError,), stopped)


def write(arguments: list[str]) -> bool:
    """Write what is missing, and print a table of the sources."""
    if {"--help", "-h"} & set(arguments):
        print(USAGE, end="")
    num_processes, arguments = take_number(arguments, "--processes", available_cores(), 1, "processes")
    config = load_config(arguments)
    init_logging()
    tokenizer = Tokenizer.load(config.tokenizer.path)
    sources = source_configs(config.data)
    rows = [_write(name, source, tokenizer, config.data, num_processes) for name, source in sources.items()]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for row in (COLUMNS, *rows):
        print(row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)))
    print(f"token cache: {cache_folder(config.data.cache_dir)}")
    return True


def _write(
    name: str, config: SourceConfig, tokenizer: Tokenizer, data: DataConfig, num_processes: int
) -> tuple[str, ...]:
    """Complete the cache of a source; its row of the table."""
    source = open_source(name, config, data.cache_dir)
    start, before = time.monotonic(), num_cached_tokens(source, tokenizer.fingerprint, data.cache_dir)
    write_cache(source, tokenizer, data.cache_dir, num_processes, data.on_bad_record == "stop", data.max_bad_records)
    reader = open_cache(source, tokenizer.fingerprint, data.cache_dir)
    if reader is None:
        raise ValueError(f"data.cache_dir: the token cache of source {name!r} was damaged while it was written")
    seconds, written = time.monotonic() - start, reader.num_tokens - before
    if not written:
        logger.info(f"token cache of source {name!r}: was complete")
    return (
        name,
        f"{len(source.files):,}",
        f"{reader.numbering.num_documents:,}",
        f"{reader.num_tokens:,}",
        f"{reader.num_text_bytes:,}",
        f"{reader.num_text_bytes / max(1, reader.num_tokens):.2f}",
        f"{reader.num_bad_records:,}",
        f"{seconds:.1f}",
        f"{written / seconds:,.0f}" if written else "-",
    )


if __name__ == "__main__":
    sys.exit(main())

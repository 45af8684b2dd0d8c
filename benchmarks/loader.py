"""What a row costs as documents get shorter, and with more threads: python -m benchmarks.loader [--rounds N] [--out F]

For documents of several mean lengths (pieces of the standard library's source): rows from the token cache and rows
tokenised on the fly, in one thread, beside a plain read of as many tokens from a memory-mapped file, row after row,
and tiktoken's encode_ordinary on the same kind of text, already in memory. Then a whole loader, which hands out
tensors made by another thread, with 0, 1 and 2 threads that read ahead. All take turns, round after round.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.common import circumstances, command_line, publish
from benchmarks.data import ROWS, SEQ_LEN, TOKENIZER, WINDOW, generate, raw_tiktoken, rows, texts_of, write
from titanlite.config.sections import DataConfig
from titanlite.data.loader import Loader, build_loader
from titanlite.tokenizer import Tokenizer

CHARS_PER_TOKEN = 3.4  # of the shipped tokenizer on this text
MEANS = (20, 50, 300, 1000)
NUM_BYTES = 40_000_000
STEPS = {"cached": 4 * WINDOW, "streamed": WINDOW}
STEP_TOKENS = ROWS * SEQ_LEN
WORKERS = (0, 1, 2)


def speed(num_tokens: int, do: Callable[[], object]) -> tuple[float, float]:
    """Tokens per wall second and per CPU second of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    do()
    return num_tokens / (time.perf_counter() - wall), num_tokens / (time.process_time() - cpu)


def mapped(path: Path) -> Iterator[np.ndarray]:
    """Rows of a file of uint16 tokens, one behind the other, as int64."""
    tokens = np.memmap(path, np.uint16, mode="r")
    while True:
        for begin in range(0, len(tokens) - SEQ_LEN, SEQ_LEN):
            yield tokens[begin : begin + SEQ_LEN + 1].astype(np.int64)


def loaded(path: Path, cache: Path, reader: str, num_workers: int) -> Loader:
    data = DataConfig(paths=(str(path),), cache_dir=str(cache), reader=reader, num_workers=num_workers)  # type: ignore[arg-type]
    tokenizer = Tokenizer.load(str(TOKENIZER))
    return build_loader(data, tokenizer, seq_len=SEQ_LEN, global_batch_size=ROWS, seed=0)


def take(stream: Iterator[object], steps: int) -> tuple[float, float]:
    return speed(steps * STEP_TOKENS, lambda: [next(stream) for _ in range(steps)])


def measure_lengths(folder: Path, rounds: int) -> str:
    """A table line per mean length."""
    encoding, tokenizer = raw_tiktoken(), Tokenizer.load(str(TOKENIZER))
    flat = folder / "flat.bin"
    np.arange(20 * STEP_TOKENS, dtype=np.uint16).tofile(flat)
    lines = [
        "| mean tokens | memory map | cached | us a cached row | tiktoken | on the fly |",
        "|---|---|---|---|---|---|",
    ]
    for mean in MEANS:
        path, cache = folder / f"{mean}.jsonl", folder / str(mean)
        generate(path, NUM_BYTES, int(mean * CHARS_PER_TOKEN))
        cache.mkdir()
        write(path, cache, 2, tokenizer, 0)
        texts = texts_of(path, 0, 20)
        num_tokens = sum(len(encoding.encode_ordinary(text)) for text in texts)
        plain, cached, streamed = mapped(flat), rows(path, cache, "cached"), rows(path, cache, "streamed")
        figures: dict[str, list[float]] = {"memory map": [], "cached": [], "tiktoken": [], "streamed": []}
        for number in range(rounds + 1):
            taken = {
                "memory map": speed(20 * STEP_TOKENS, lambda: [next(plain) for _ in range(20 * ROWS)]),  # noqa: B023
                "cached": take(cached, STEPS["cached"]),
                "tiktoken": speed(num_tokens, lambda: [encoding.encode_ordinary(text) for text in texts]),  # noqa: B023
                "streamed": take(streamed, STEPS["streamed"]),
            }
            for name, (_, per_cpu) in taken.items() if number else ():
                figures[name].append(per_cpu)
        middle = {name: statistics.median(values) for name, values in figures.items()}
        ratio = statistics.median(a / b for a, b in zip(figures["streamed"], figures["tiktoken"], strict=True))
        lines.append(
            f"| {mean} | {middle['memory map'] / 1e6:.0f} | {middle['cached'] / 1e6:.0f}"
            f" | {SEQ_LEN / middle['cached'] * 1e6:.0f} | {middle['tiktoken'] / 1e6:.2f}"
            f" | {middle['streamed'] / 1e6:.2f} ({ratio:.2f} of tiktoken) |"
        )
    return "\n".join(lines)


def measure_workers(folder: Path, rounds: int) -> str:
    """A table line per number of threads, for documents of 300 tokens."""
    path, cache = folder / "300.jsonl", folder / "300"
    lines = ["| threads that read ahead | on the fly | cached |", "|---|---|---|"]
    figures: dict[tuple[str, int], list[float]] = {}
    for number in range(rounds + 1):
        for reader, steps in STEPS.items():
            for num_workers in WORKERS:
                loader = loaded(path, cache, reader, num_workers)
                stream = iter(loader)
                next(stream)
                per_wall, _ = take(stream, 4 * steps)
                loader.close()
                if number:
                    figures.setdefault((reader, num_workers), []).append(per_wall)
    for num_workers in WORKERS:
        on_the_fly, cached = (
            statistics.median(figures[reader, num_workers]) / 1e6 for reader in ("streamed", "cached")
        )
        lines.append(f"| {num_workers} | {on_the_fly:.2f} | {cached:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default 5)")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        lengths = measure_lengths(Path(folder), arguments.rounds)
        workers = measure_workers(Path(folder), arguments.rounds)
    publish(
        f"""# Rows of shorter documents, and of more threads, CPU, {date.today()}

Million tokens per CPU second of one thread, medians:

{lengths}

Million tokens per wall second of a whole loader, documents of mean 300, medians:

{workers}

Rows of {SEQ_LEN} tokens, {ROWS} a step; {arguments.rounds} rounds after one that is not counted.

{circumstances(" ".join(["python -m benchmarks.loader", *sys.argv[1:]]), "")}""",
        arguments.out,
    )


if __name__ == "__main__":
    main()

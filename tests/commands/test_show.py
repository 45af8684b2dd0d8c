"""Showing a step: the same rows as in training however they are found, their documents, and what it refuses."""

import contextlib
import gzip
import json
import re
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import tiny_run
from tests.support.naive_stream import dealt_rows
from titanlite.config import Config, dump_toml, load_config
from titanlite.data.cache.reader import CachedReader
from titanlite.data.corpus import open_corpus, open_rows
from titanlite.data.feed import EndOfData, StreamSource, in_threads_of, one_by_one
from titanlite.data.loader import Batch, build_loader
from titanlite.data.order import DocumentOrder
from titanlite.data.source import Numbering
from titanlite.inspection import seek as seek_module
from titanlite.inspection.seek import _jump as jump
from titanlite.inspection.seek import seek, trained_lengths
from titanlite.inspection.transcript import escaped, pieces_of
from titanlite.run.metrics import RunLog
from titanlite.show import __main__ as show
from titanlite.tokenizer import Tokenizer

STEPS, ROWS, SEQ_LEN = 9, 4, 48
WINDOW_ROWS = 64
BEGIN, END = "<|begin|>", "<|end|>"


def texts(letter: str, num_documents: int) -> list[str]:
    """Of 0 to 200 characters, many of more than one byte; each names itself."""
    return [f"{letter}{i} " + "\té€😀"[i % 4] * (i * 37 % 200) if i % 7 else "" for i in range(num_documents)]


def write_jsonl(path: Path, documents: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


CORPORA: dict[str, dict[str, Any]] = {
    "split": {},
    "natural order": {"data__shuffle": False},
    "best_fit": {"data__packing": "best_fit"},
    "held out": {"data__held_out_fraction": 0.3},
    "held out, best_fit": {"data__held_out_fraction": 0.3, "data__packing": "best_fit"},
    "mixture": {"data.sources.a__weight": 0.7, "data.sources.b__weight": 0.3},
    "mixture, best_fit": {"data.sources.a__weight": 3, "data.sources.b__weight": 1, "data__packing": "best_fit"},
}
"""Of 61 documents, which the steps pass several times, and for mixtures of 11 more."""


def make_config(folder: Path, **overrides: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    a = write_jsonl(folder / "a.jsonl", texts("a", 61))
    paths: dict[str, Any] = {"data__paths": [a]}
    if any("sources" in key for key in overrides):
        b = write_jsonl(folder / "b.jsonl", texts("b", 11))
        paths = {"data__paths": [], "data.sources.a__paths": [a], "data.sources.b__paths": [b]}
    sizes = {"training__seq_len": SEQ_LEN, "training__global_batch_size": ROWS, "training__local_batch_size": ROWS}
    blocks = {"data__num_workers": 0, "data__prefetch": 0, "data__window_tokens": WINDOW_ROWS * SEQ_LEN}
    if overrides.get("data__shuffle", True):
        blocks["data__shuffle_block"] = 16
    return tiny_run.write_config(folder, **{**sizes, **blocks, **paths, **overrides})


def load(path: Path) -> Config:
    return load_config(["--job.config_file", str(path)])


def train(config: Config, steps: int = STEPS, dp_degree: int = 2, log: bool = True) -> list[list[Batch]]:
    """The batches of each rank, and the run folder that rank 0 leaves behind."""
    tokenizer = Tokenizer.load(config.tokenizer.path)
    loaders = [
        build_loader(
            config.data,
            tokenizer,
            seq_len=config.training.seq_len,
            global_batch_size=config.training.global_batch_size,
            seed=config.training.seed,
            dp_rank=rank,
            dp_degree=dp_degree,
        )
        for rank in range(dp_degree)
    ]
    batches = [list(islice(loader, steps)) for loader in loaders]
    folder = Path(config.job.dump_folder)
    if log:
        with RunLog(folder, start_step=0, total_steps=steps, enable_tensorboard=False) as run_log:
            for step in range(steps):
                run_log.step(step + 1, fingerprint([rank[step] for rank in batches]), batches[0][step].cursor)
        (folder / "config.toml").write_text(dump_toml(config))
        (folder / "corpus.json").write_text(json.dumps(loaders[0].corpus))
    for loader in loaders:
        loader.close()
    return batches


def fingerprint(ranks: list[Batch]) -> str:
    return f"{sum(batch.fingerprint_part for batch in ranks) % 2**64:016x}"


def run(*arguments: object) -> int:
    return show.main([str(argument) for argument in arguments])


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run(*arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize("name", CORPORA)
def test_every_way_to_a_step_gives_the_rows_that_its_ranks_trained_on(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_config(tmp_path, **CORPORA[name])
    ranks = train(load(path))
    config = load(path)
    tokenizer = Tokenizer.load(config.tokenizer.path)
    logged = [json.loads(line) for line in (tmp_path / "run" / "cursor.jsonl").read_text().splitlines()]
    for way in ("streamed", "streamed in threads", "cached"):
        data = replace(config.data, reader="cached" if way == "cached" else "streamed", num_workers=2)
        corpus = open_corpus(data, tokenizer, seq_len=SEQ_LEN, seed=0)
        for step in range(STEPS):
            with ThreadPoolExecutor(2) as pool:
                ahead = in_threads_of(pool) if "threads" in way else one_by_one
                cursor = seek(corpus, data, eos_id=tokenizer.eos_id, row=step * ROWS, read_ahead=ahead)
            if step:
                assert cursor["row"] == logged[step - 1]["row"]
                for source, place in logged[step - 1]["sources"].items():
                    found = cursor["sources"][source]
                    assert [found[key] for key in ("row", "document", "offset", "dealt")] == [
                        place[key] for key in ("row", "document", "offset", "dealt")
                    ]
                    if way != "cached" or data.packing == "best_fit":
                        assert found == place  # with the same ledger, as nothing was jumped over
            rows = open_rows(corpus, data, eos_id=tokenizer.eos_id, num_rows=ROWS, cursor=cursor).take()
            expected = np.concatenate([rank[step].rows.numpy() for rank in ranks])
            assert np.array_equal(rows.tokens, expected)
            assert rows.row_index.tolist() == [i for rank in ranks for i in rank[step].row_index]
    for step in (0, 1, STEPS - 1):
        by_run = shown(capsys, "--run", tmp_path / "run", "--step", step + 1)
        found = fingerprint([rank[step] for rank in ranks])
        assert f"batch {found}, as the run logged it" in by_run
        by_cache = shown(capsys, "--job.config_file", path, "--step", step + 1)
        assert f"batch {found}\n" in by_cache
        assert "found by the token cache" in by_cache
        without = shown(capsys, "--job.config_file", path, "--step", step + 1, "--data.cache_dir", tmp_path / "none")
        assert "found by reading up to it" in without
        # But for the first lines, which say where it was found.
        assert by_run.split("row  source")[1] == by_cache.split("row  source")[1] == without.split("row  source")[1]


def naive_stream(documents: list[str], counters: range, block: int) -> list[tuple[int, int, int]]:
    """(counter, index in the document, byte or special id) of every token."""
    order = DocumentOrder(len(documents), 0, block)
    ids = []
    for counter in counters:
        text = documents[int(order.documents(np.array([counter]))[0])]
        tokens = [-1, *text.encode(), -2]
        ids += [(counter, k, token) for k, token in enumerate(tokens)]
    return ids


def in_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> list[int]:
    """The bytes that each id stands for: -1 begin, -2 end."""
    special = {tokenizer.bos_id: -1, tokenizer.eos_id: -2}
    single = tiny_run.single_bytes()
    return [special[i] if i in special else single[i][0] for i in ids.tolist()]


@pytest.mark.parametrize("block", [0, 16])
def test_pieces_are_those_of_a_stream_written_down_as_a_list(block: int, tmp_path: Path) -> None:
    config = load(make_config(tmp_path, data__shuffle=block > 0))
    tokenizer = Tokenizer.load(config.tokenizer.path)
    corpus = open_corpus(config.data, tokenizer, seq_len=SEQ_LEN, seed=0)
    documents = texts("a", 61)
    stream = naive_stream(documents, range(200), block)
    rows = open_rows(corpus, config.data, eos_id=tokenizer.eos_id, num_rows=300).take()
    order = DocumentOrder(61, 0, block)
    epochs = [counter // 61 for counter, _, _ in stream]
    places = dealt_rows(epochs, 300, SEQ_LEN, WINDOW_ROWS, 0, "data") if block else range(300)
    for row, place in enumerate(places):
        tokens = stream[place * SEQ_LEN : (place + 1) * SEQ_LEN + 1]
        expected: dict[int, list[tuple[int, int]]] = {}
        for counter, k, token in tokens:
            expected.setdefault(counter, []).append((k, token))
        pieces = pieces_of(rows, row, corpus)
        assert [piece.counter for piece in pieces] == list(expected)
        for piece in pieces:
            assert piece.offset == expected[piece.counter][0][0]
            assert in_bytes(tokenizer, piece.ids) == [token for _, token in expected[piece.counter]]
            assert piece.epoch == piece.counter // 61
            number = int(order.documents(np.array([piece.counter]))[0])
            assert piece.place == f"{tmp_path / 'a.jsonl'}:{number + 1}"


@pytest.mark.parametrize("name", ["best_fit", "mixture, best_fit", "held out, best_fit"])
def test_best_fit_pieces_are_slices_of_their_documents_and_then_pads(name: str, tmp_path: Path) -> None:
    config = load(make_config(tmp_path, **CORPORA[name]))
    tokenizer = Tokenizer.load(config.tokenizer.path)
    corpus = open_corpus(config.data, tokenizer, seq_len=SEQ_LEN, seed=0)
    stream = open_rows(corpus, config.data, eos_id=tokenizer.eos_id, num_rows=ROWS)
    texts_of = {
        source: texts(source if len(corpus.sources) > 1 else "a", n)
        for source, n in (("data", 61), ("a", 61), ("b", 11))
    }
    num_pads = 0
    for _ in range(100):
        rows = stream.take()
        for row in range(ROWS):
            pieces = pieces_of(rows, row, corpus)
            assert np.array_equal(np.concatenate([piece.ids for piece in pieces]), rows.tokens[row])
            for piece in pieces[:-1]:
                assert piece.place
            for piece in pieces:
                if not piece.place:
                    assert set(piece.ids.tolist()) == {tokenizer.eos_id}
                    num_pads += len(piece.ids)
                    continue
                number = int(piece.place.rsplit(":", 1)[1]) - 1
                whole = [-1, *texts_of[piece.source][number].encode(), -2]
                assert in_bytes(tokenizer, piece.ids) == whole[piece.offset :][: len(piece.ids)]
    assert num_pads == sum(ledger.padding for ledger in stream.ledgers().values()) > 0


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_text_of_a_row_is_that_of_its_documents(
    packing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_config(tmp_path, data__packing=packing)
    documents = texts("a", 61)
    met = set()
    for step in (1, 6, 15, 30):
        for row in range(ROWS):
            text = shown(capsys, "--job.config_file", path, "--step", step, "--row", row, "--raw")
            heads = re.findall(r"^--- (\d+) tokens from token ([\d,]+) on of document .*: (.*)\n", text, re.MULTILINE)
            parts = re.split(r"^--- .*\n", text, flags=re.MULTILINE)[1:]
            for (tokens, offset, place), part in zip(heads, parts, strict=False):
                number = int(place.rsplit(":", 1)[1]) - 1
                begin = int(offset.replace(",", ""))
                whole = documents[number].encode()
                here = whole[max(0, begin - 1) : begin - 1 + int(tokens)].decode(errors="replace")
                is_begin, is_end = begin == 0, begin + int(tokens) == len(whole) + 2
                assert part == BEGIN * is_begin + here + END * is_end + "\n"
                met.add(number)
            if packing == "best_fit" and len(parts) > len(heads):
                assert re.search(r"^--- \d+ pads$", text, re.MULTILINE)
    assert len(met) > 6


class Known(CachedReader):
    """A cache of which only the lengths are there."""

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = np.array(lengths, np.int64)
        self.numbering = Numbering(np.array([len(lengths)]))
        self.num_tokens, self.num_bad_records = sum(lengths), lengths.count(0)

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        return self._lengths[documents]

    def sizes(self, documents: np.ndarray) -> np.ndarray:
        return self._lengths[documents]


def source_of(lengths: list[int], held_out: list[bool], block: int, max_epochs: int = 0) -> StreamSource:
    order = DocumentOrder(len(lengths), 5, block)
    is_held_out: Any = lambda files, records: np.array(held_out)[records]  # noqa: E731
    return StreamSource("data", Known(lengths), order, is_held_out, max_epochs)


@given(st.data())
def test_a_jump_lands_where_counting_document_by_document_does(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(any))
    held_out = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    kept = [0 if held else length for length, held in zip(lengths, held_out, strict=True)]
    if not any(kept):
        kept, held_out = lengths, [False] * len(lengths)
    source = source_of(lengths, held_out, data.draw(st.integers(0, 12)))
    seq_len = data.draw(st.integers(1, 30))
    window_rows = data.draw(st.integers(1, 9))
    row = data.draw(st.integers(0, 3 * sum(kept) // seq_len + 1))
    with patch.multiple(seek_module, _STRIDE_DOCUMENTS=data.draw(st.integers(1, 20)), _BLOCK=5):
        assert np.concatenate([*trained_lengths(source)]).tolist() == kept
        cursor = jump(source, row, window_rows, seq_len)
    tokens: list[tuple[int, int]] = []
    counter = 0
    while len(tokens) <= (row + window_rows + 1) * seq_len:
        length = kept[int(source.order.documents(np.array([counter]))[0])]
        tokens += [(counter, k) for k in range(length)]
        counter += 1
    first = 0
    while True:  # window by window
        behind = first + 1
        while behind - first < window_rows:
            if tokens[(behind + 1) * seq_len][0] // len(kept) > tokens[(first + 1) * seq_len][0] // len(kept):
                break
            behind += 1
        if row < behind:
            break
        first = behind
    assert (cursor.row, cursor.dealt) == (first, 0)
    assert (cursor.document, cursor.offset) == (tokens[first * seq_len] if first else (0, 0))


def test_a_jump_over_many_epochs_takes_no_time_and_ends_with_the_data() -> None:
    lengths = [3, 0, 5, 2] * 50
    source = source_of(lengths, [False] * 200, 16)
    cursor = jump(source, 10**12 + 3, 4, 50)  # 10^11 epochs of 500 tokens
    # The last row of an epoch ends with the first token of the next one, with whose windows it is dealt: they begin
    # with row 10^12 - 1, which is the last of 10 rows of 50 tokens.
    assert (cursor.row, cursor.document // 200) == (10**12 + 3, 10**11)
    limited = source_of(lengths, [False] * 200, 16, max_epochs=2)
    assert jump(limited, 18, 4, 50).document // 200 == 1
    with pytest.raises(EndOfData, match="no row left after max_epochs = 2"):
        jump(limited, 20, 1, 50)
    with pytest.raises(ValueError, match="no document is left to train on"):
        jump(source_of([3, 4], [True, True], 0), 1, 4, 2)


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_bad_record_on_the_way_does_what_it_does_in_training(
    action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_config(tmp_path, data__on_bad_record="skip", data__shuffle=False)
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join([*lines[:20], "{broken\n", *lines[20:]]))
    arguments = ("--job.config_file", path, "--data.on_bad_record", action, "--step")
    streamed = [run(*arguments, step) for step in (1, 60)], capsys.readouterr()
    config = load(path)
    open_corpus(replace(config.data, reader="cached"), Tokenizer.load(config.tokenizer.path), seq_len=8, seed=0)
    cached = [run(*arguments, step) for step in (1, 60)], capsys.readouterr()
    assert streamed[0] == cached[0] == ([0, 1] if action == "stop" else [0, 0])
    errors = [printed.err.splitlines()[-1] for _, printed in (streamed, cached)]
    if action == "stop":
        assert errors[0] == errors[1]
        assert f"titanlite: {tmp_path}/a.jsonl:21: " in errors[0]
    assert re.findall("batch .*", streamed[1].out) == re.findall("batch .*", cached[1].out)


def test_a_step_keeps_its_rows_where_the_batch_size_changed_on_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_config(tmp_path)
    first = train(load(path), steps=2)
    config = load(path)
    tokenizer = Tokenizer.load(config.tokenizer.path)
    loader = build_loader(
        config.data,
        tokenizer,
        seq_len=SEQ_LEN,
        global_batch_size=6,
        seed=0,
        cursor=first[0][1].cursor,
    )
    batch = next(iter(loader))
    with RunLog(tmp_path / "run", start_step=2, total_steps=9, enable_tensorboard=False) as run_log:
        run_log.step(3, fingerprint([batch]), batch.cursor)
    assert "4 rows of" in shown(capsys, "--run", tmp_path / "run", "--step", 2)
    third = shown(capsys, "--run", tmp_path / "run", "--step", 3)
    assert f"6 rows of {SEQ_LEN} tokens, batch {fingerprint([batch])}, as the run logged it" in third
    # The step that comes next is not in the log, but all that it needs is.
    fourth = shown(capsys, "--run", tmp_path / "run", "--step", 4, "--training.global_batch_size", 2)
    assert re.search(r"step 4: 2 rows of 48 tokens, batch [0-9a-f]{16}\nrows 14 to 15", fourth)


def test_rows_that_are_not_those_of_the_log_are_said_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batches = train(load(make_config(tmp_path)))
    log = tmp_path / "run" / "cursor.jsonl"
    log.write_text(log.read_text().replace(fingerprint([rank[4] for rank in batches]), "0123456789abcdef"))
    for arguments in ([], ["--row", "1"]):
        assert run("--run", tmp_path / "run", "--step", 5, *arguments) == 1
        printed = capsys.readouterr()
        assert "NOT WHAT THE RUN LOGGED" in printed.out
        assert "NOT WHAT THE RUN TRAINED ON: it logged batch 0123456789abcdef for step 5" in printed.err
    assert run("--run", tmp_path / "run", "--step", 6) == 0


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_config(tmp_path)
    train(load(path))
    here, folder = ("--job.config_file", path), tmp_path / "run"
    for name in ("logless", "empty"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text((folder / "config.toml").read_text())
    (tmp_path / "empty" / "cursor.jsonl").touch()
    mistakes: list[tuple[list[Any], str]] = [
        ([], "name a step with --step N"),
        ([*here], "name a step with --step N"),
        ([*here, "--step", "two"], "argument --step: invalid int value"),
        ([*here, "--step", 0], "--step 0: steps count from 1"),
        ([*here, "--step", 2, "--stats"], "leave out --step and --row"),
        ([*here, "--step", 2, "--raw"], "add --row R"),
        ([*here, "--step", 2, "--row", 4], "--row 4: step 2 has the rows 0 to 3"),
        ([*here, "--step", 2, "--row", -1], "--row -1: step 2 has the rows 0 to 3"),
        (["--run", folder, "--step", 2, "--row", 4], "--row 4: step 2 has the rows 0 to 3"),
        ([*here, "--step", 2, "--rows", 4], "command line: unknown key --rows"),
        ([*here, "--run", folder, "--step", 2], "leave out --job.config_file"),
        (["--run", tmp_path, "--step", 2, "--data.paths", tmp_path / "x"], "matches no file"),
        (["--run", tmp_path / "nowhere", "--step", 2], "no config.toml in there, so it is no run folder"),
        (["--run", tmp_path / "logless", "--step", 2], "cursor.jsonl: no such file, so the run has no cursor log"),
        (["--run", folder, "--step", 11], "begin where step 10 ended, and " + str(folder / "cursor.jsonl")),
        (["--run", folder, "--step", 11], "holds the steps 1 to 9"),
        (["--run", tmp_path / "empty", "--step", 2], "begin where step 1 ended"),
        (["--run", tmp_path / "empty", "--step", 2], "holds no step"),
        ([*here, "--step", 500, "--data.max_epochs", 1], "--step 500 lies beyond the end of the data: the data ended"),
        (["--run", folder, "--step", 2, "--training.seed", 1], "training.seed was 0 and is 1"),
        (["--run", folder, "--step", 1, "--training.seed", 1], "training.seed was 0 and is 1"),
    ]
    for arguments, expected in mistakes:
        assert run(*arguments) == 1, arguments
        printed = capsys.readouterr()
        assert printed.out == ""
        lines = [line for line in printed.err.splitlines() if " INFO " not in line]
        assert len(lines) == 1
        assert expected in lines[0]


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@pytest.mark.parametrize("way", ["streamed", "cached"])
def test_the_last_step_of_the_data_is_that_of_the_run(
    way: str, packing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_config(tmp_path, data__max_epochs=1, data__packing=packing)
    config = load(path)
    tokenizer = Tokenizer.load(config.tokenizer.path)
    corpus = open_corpus(replace(config.data, reader=way), tokenizer, seq_len=SEQ_LEN, seed=0)
    stream = open_rows(corpus, config.data, eos_id=tokenizer.eos_id, num_rows=ROWS)
    last = 0
    with contextlib.suppress(EndOfData):
        while stream.take():
            last += 1
    assert run("--job.config_file", path, "--step", last) == 0
    for beyond in (last + 1, last + 2, last + 50):
        assert run("--job.config_file", path, "--step", beyond) == 1
        assert f"--step {beyond} lies beyond the end of the data" in capsys.readouterr().err


def test_a_file_that_changed_or_vanished_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(load(make_config(tmp_path)))
    write_jsonl(tmp_path / "a.jsonl", texts("a", 60))
    for step in (1, 4):
        assert run("--run", tmp_path / "run", "--step", step) == 1
        assert re.search("titanlite: .*changed: .*a.jsonl", capsys.readouterr().err)
    (tmp_path / "a.jsonl").unlink()
    assert run("--run", tmp_path / "run", "--step", 4) == 1
    assert re.search("titanlite: data.paths.*a.jsonl", capsys.readouterr().err)


def test_cursor_log_of_a_killed_run_is_read(tmp_path: Path) -> None:
    log = tmp_path / "cursor.jsonl"
    for steps in ([], [1], [1, 2], list(range(1, 200)), [5, 6, 7]):
        whole = [json.dumps({"step": step, "x": "y" * (step * 31 % 97)}) for step in steps]
        for lines in (whole, [*whole, '{"step": 3000, "x"'], [*whole[:1], "null", "[1]", "\xff{", *whole[1:]]):
            log.write_text("\n".join(lines) + ("\n" if lines is not whole else ""), encoding="latin-1")
            for step in range(203):
                found = show.logged(log, step)
                assert (found and found["step"]) == (step if step in steps else None)
                later = show.logged(log, step, or_later=True)
                assert (later and later["step"]) == min((s for s in steps if s >= step), default=None)
            last = show.logged(log, None)
            assert (last and last["step"]) == (steps[-1] if steps else None)


def test_a_long_cursor_log_is_not_read_through(tmp_path: Path) -> None:
    log = tmp_path / "cursor.jsonl"
    with log.open("w") as file:
        for step in range(1, 200_001):
            file.write(f'{{"step": {step}, "x": "{"y" * 100}"}}\n')
    parsed = []
    with patch.object(show, "_parse", side_effect=lambda line, parse=show._parse: parsed.append(line) or parse(line)):
        assert show.logged(log, 123_456) == {"step": 123_456, "x": "y" * 100}
    assert len(parsed) < 40


@given(st.text())
def test_escaped_text_cannot_change_a_terminal(text: str) -> None:
    safe = escaped(text)
    assert all(c in "\n" or c.isprintable() or c.isspace() for c in safe)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", safe)
    if text.isprintable():
        assert safe == text


def test_what_is_escaped() -> None:
    assert escaped("a\x1b[31m\tb\r\nc\u202ed\u3000é") == "a\\x1b[31m\\tb\\r\nc\\u202ed\u3000é"


def test_a_row_that_cuts_characters_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_config(tmp_path, training__seq_len=5)
    write_jsonl(tmp_path / "a.jsonl", ["\x1b[2J😀" * 30])
    for step in (1, 6):
        for row in range(ROWS):
            text = shown(capsys, "--job.config_file", path, "--step", step, "--row", row)
            assert "\x1b" not in text
            assert text.count("\n| ") == 1
        assert "\x1b" not in shown(capsys, "--job.config_file", path, "--step", step)


def test_documents_of_all_formats_are_placed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = make_config(tmp_path)
    (tmp_path / "odd\nname.txt").write_text("a text file")
    parquet.write_table(pyarrow.table({"text": ["row zero", "row one"]}), tmp_path / "c.parquet")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "line one"}\n{"text": "line two"}\n'))
    names = json.dumps([str(tmp_path / name) for name in ("odd\nname.txt", "c.parquet", "d.jsonl.gz")])
    text = shown(capsys, "--job.config_file", path, "--data.paths", names, "--step", 1)
    for beginning, place in (
        ("<|begin|>a text file<|end|>", repr(str(tmp_path / "odd\nname.txt"))),
        ("<|begin|>row one<|end|>", f"{tmp_path}/c.parquet: row 1"),
        ("<|begin|>line two<|end|>", f"{tmp_path}/d.jsonl.gz:2"),
    ):
        assert re.search(f"{re.escape(beginning)} +{re.escape(place)}\n", text)


def measured(*arguments: object) -> tuple[str, float]:
    """What a process of its own prints that ends with a list of the modules it imported, and its processor seconds."""
    code = (
        "import sys; from titanlite.show.__main__ import main; code = main(sys.argv[1:]);"
        "print([m for m in ('torch', 'pyarrow', 'tensorboard') if m in sys.modules]); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=100
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_answers_within_two_seconds_and_without_torch(tmp_path: Path) -> None:
    """20 MB in 40,000 documents, from the log of a run and, some epochs on, from the cache."""
    path = make_config(tmp_path, training__seq_len=512, training__global_batch_size=64, data__window_tokens=2**21)
    write_jsonl(tmp_path / "a.jsonl", ["x" * (50 + i * 977 % 900) for i in range(40_000)])
    config = load(path)
    train(config, steps=3, dp_degree=1)
    by_run = measured("--run", tmp_path / "run", "--step", 3)
    open_corpus(replace(config.data, reader="cached"), Tokenizer.load(config.tokenizer.path), seq_len=512, seed=0)
    by_cache = measured("--job.config_file", path, "--step", 2000)
    by_windows = measured("--job.config_file", path, "--step", 300, "--data.packing", "best_fit")
    for text, seconds in (by_run, by_cache, by_windows):
        assert text.splitlines()[-1] == "[]"
        assert seconds < 2


@pytest.mark.slow
def test_a_run_of_the_trainer_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_config(tmp_path, data__packing="best_fit", checkpoint__enable=False)
    command = [sys.executable, "-m", "titanlite.train", "--job.config_file", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    for step, found in tiny_run.fingerprints(tmp_path / "run").items():
        assert f"batch {found}, as the run logged it" in shown(capsys, "--run", tmp_path / "run", "--step", step)


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--help")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in ("--run FOLDER", "--step N", "--row R", "--raw", "--stats", "--section.key VALUE"):
        assert re.search(rf"{re.escape(option)} [a-z]", text.split("options:")[1]), option


def test_output_that_nobody_reads_on_is_no_error(tmp_path: Path) -> None:
    path = make_config(tmp_path, training__global_batch_size=400)
    command = f"{sys.executable} -m titanlite.show --job.config_file {path} --step 1"
    shell = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"], capture_output=True, text=True, check=False
    )
    assert shell.returncode == 0
    assert shell.stdout.startswith("step 1: 400 rows")
    assert "Error" not in shell.stderr

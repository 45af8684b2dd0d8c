"""`verify data` counts what there is, proves the stream on real steps, and names what is wrong where one thing is."""

import gzip
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import tiny_run
from tests.support.cases import some_quick
from tests.support.listed_documents import rows_of
from titanlite.config import Config, load_config
from titanlite.config.sections import source_configs
from titanlite.data.cache.writer import write_cache
from titanlite.data.corpus import open_corpus, open_rows
from titanlite.data.feed import EndOfData, SourceRows
from titanlite.data.order import DocumentOrder
from titanlite.data.rows import RowStream
from titanlite.data.source import open_source
from titanlite.data.stream import EncodedDocuments, SourceCursor, StreamedReader
from titanlite.data.windows import BestFit, Dealing, Split, Window, fingerprint_part, row_digest
from titanlite.inspection import seek
from titanlite.run.metrics import RunLog
from titanlite.tokenizer import Tokenizer
from titanlite.verify.__main__ import main
from titanlite.verify.account import Account, pieces_of
from titanlite.verify.census import Census
from titanlite.verify.proof import plain_fingerprint

SEQ_LEN, ROWS, STEPS = 48, 4, 12
BEGIN_AND_END = 2  # tokens; of the rest each is a byte


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each chunk would be the corpus some forty times."""
    monkeypatch.setattr("titanlite.data.feed.CHUNK_BYTES", 1 << 12)


def texts(letter: str, num_documents: int) -> list[str]:
    return [f"{letter}{i} " + "aé€😀"[i % 4] * (i * 37 % 120) if i % 7 else "" for i in range(num_documents)]


def jsonl(path: Path, documents: list[str]) -> str:
    content = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def write(folder: Path, **overrides: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    paths = {} if any("sources" in key for key in overrides) else {"paths": [jsonl(folder / "a.jsonl", texts("a", 61))]}
    values = {
        f"data__{key}": value
        for key, value in {"paths": [], "shuffle_block": 16, "window_tokens": 64 * SEQ_LEN, "num_workers": 0}.items()
    }
    values |= {f"data__{key}": value for key, value in paths.items()}
    sizes = {"steps": STEPS, "seq_len": SEQ_LEN, "global_batch_size": ROWS, "local_batch_size": ROWS}
    return tiny_run.write_config(folder, **values, **{f"training__{k}": v for k, v in sizes.items()}, **overrides)


def mixture(folder: Path) -> dict[str, Any]:
    """Sources of every kind of file."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts("p", 23)}), folder / "p.parquet", row_group_size=5)
    for i, text in enumerate(texts("t", 9)):
        (folder / f"{i}.txt").write_text(text)
    names = {
        "lines": [jsonl(folder / "a.jsonl", texts("a", 31)), str(folder / "p.parquet")],
        "packed": [jsonl(folder / "z.jsonl.gz", texts("z", 40))],
        "texts": [str(folder / "*.txt")],
    }
    weights = {"lines": 3, "packed": 2, "texts": 1}
    tables: dict[str, Any] = {f"data.sources.{name}__paths": paths for name, paths in names.items()}
    return tables | {f"data.sources.{name}__weight": weight for name, weight in weights.items()}


def run(path: Path, *overrides: str) -> int:
    return main(["data", "--job.config_file", str(path), *overrides])


def load(path: Path) -> Config:
    return load_config(["--job.config_file", str(path)])


def cells(out: str, source: str, nth: int) -> list[str]:
    """The nth row of a table (from 0) that begins with the source's name."""
    return [line.split() for line in out.splitlines() if line.split()[:1] == [source]][nth]


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


VARIANTS: dict[str, list[str]] = {
    "split": [],
    "natural order": ["--data.shuffle=false", "--data.shuffle_block=16384"],
    "best_fit": ["--data.packing=best_fit"],
    "cached": ["--data.reader=cached"],
    "cached, best_fit, held out": ["--data.reader=cached", "--data.packing=best_fit", "--data.held_out_fraction=0.3"],
    "held out": ["--data.held_out_fraction=0.3"],
    "one row": ["--training.global_batch_size=1", "--training.local_batch_size=1"],
    "the data end": ["--data.max_epochs=2", "--training.steps=400"],
    "the data end, best_fit": ["--data.max_epochs=2", "--training.steps=400", "--data.packing=best_fit"],
}


@pytest.mark.parametrize("name", some_quick(VARIANTS, "split", "cached, best_fit, held out", "the data end"))
def test_a_right_stream_is_proven(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path)
    assert run(path, *VARIANTS[name]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    lengths = [len(text.encode()) + BEGIN_AND_END for text in texts("a", 61)]
    read = cells(out, "data", 0)
    assert read[1:3] == (["token", "cache"] if "cached" in name else ["text", "1"])
    assert [number(cell) for cell in read[-6:-3]] == [61, sum(lengths) - 61 * BEGIN_AND_END, sum(lengths)]
    held_out, their_tokens, bad = map(number, read[-3:])
    assert (held_out > 0, bad) == ("held out" in name, 0)
    epoch = [number(cell) for cell in cells(out, "data", 1)[1:]]
    assert epoch[1] == sum(lengths) - their_tokens == epoch[2] + epoch[3] + epoch[4]
    assert epoch[3] == 61 - held_out
    if "best_fit" in name:
        assert epoch[0] * (SEQ_LEN + 1) >= epoch[1]
        assert epoch[4] == 0
    else:
        assert epoch[0] == (epoch[1] - 1) // SEQ_LEN
    training = [number(cell) for cell in cells(out, "data", -1)[1:]]
    assert training[1] == sum(training[2:5])
    steps = [int(n) for n in re.findall(r"^right  step (\d+)", out, re.MULTILINE)]
    if "end" in name:
        assert training[1] == 2 * sum(lengths)
        last = training[0] // ROWS
        assert f"dropped after step {last}: the data ended: source data has no row" in out.replace("'", "")
    else:
        last = STEPS
        assert training[0] == last * (1 if name == "one row" else ROWS)
    assert len(steps) == 8
    assert (steps[0], steps[-1]) == (1, last)


def test_a_mixture_of_formats_closes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, **mixture(tmp_path))
    assert run(path, "--steps", "12") == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    counted = {"lines": [*texts("a", 31), *texts("p", 23)], "packed": texts("z", 40), "texts": texts("t", 9)}
    ways = {"lines": "text 2", "packed": "token cache 1", "texts": "text 9"}
    for name, documents in counted.items():
        num_bytes = sum(len(text.encode()) for text in documents)
        num_tokens = num_bytes + BEGIN_AND_END * len(documents)
        row = cells(out, name, 0)
        assert " ".join(row[1:-6]) == ways[name]
        assert [number(cell) for cell in row[-6:-3]] == [len(documents), num_bytes, num_tokens]
        rows = (num_tokens - 1) // SEQ_LEN
        first, left = len(documents), num_tokens - rows * SEQ_LEN - 1
        epoch = [number(cell) for cell in cells(out, name, 1)[1:]]
        assert epoch == [rows, num_tokens, num_tokens - first - left, first, left, 0, 0, 0]
    dealt = [number(cells(out, name, -1)[1]) for name in (*counted, "all")]
    assert dealt == [24, 16, 8, 48]
    # Every document of the compressed source was compared with its text too.
    compared = re.search(r"piece by piece: (\d+) by their text, (\d+) by their text and cache\n", out)
    assert compared
    assert min(map(int, compared.groups())) > 9  # documents


@pytest.mark.slow
def test_the_ledger_of_the_built_in_corpus_closes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, tokenizer__path="assets/tokenizer", model__vocab_size=8192)
    overrides = ["--data.paths=[]", "--training.seq_len=512", f"--data.window_tokens={64 * 512}"]
    assert run(path, *overrides, "--steps=3") == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    config = load_config(["--job.config_file", str(path), *overrides])
    corpus = open_corpus(config.data, tokenizer := Tokenizer.load(config.tokenizer.path), seq_len=512, seed=0)
    source = corpus.texts["data"]
    lengths = [len(tokenizer.encode_document(text)) for f in range(len(source.files)) for text in source.records(f)]
    assert number(cells(out, "data", 0)[-4]) == sum(lengths)
    rows, left = divmod(sum(lengths) - 1, 512)
    epoch = [number(cell) for cell in cells(out, "data", 1)[1:6]]
    assert epoch == [rows, sum(lengths), sum(lengths) - len(lengths) - left, len(lengths), left]


def test_every_epoch_reached_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for packing in ("split", "best_fit"):
        path = write(tmp_path / packing, data__packing=packing)
        assert run(path, "--training.steps=200", "--steps=7") == 0, capsys.readouterr().err
        epochs = re.findall(r"\(epochs? (\d+)(?: to (\d+))?\)", capsys.readouterr().out)
        assert {int(last or first) for first, last in epochs} >= {0, 1, 2, 3, 4}


@pytest.mark.parametrize("epochs", [2, 0])
@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_both_accounts_of_any_row_agree(packing: str, epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of 0 to 9 tokens in rows of 4: every way in which an edge can lie."""
    monkeypatch.setattr("titanlite.verify.account._BLOCK", 64)
    lengths = np.random.default_rng(0).integers(0, 10, 300)
    census = Census(lengths, np.where(lengths > 0, np.arange(300) + 1, 0), np.zeros(300, bool), lengths, [])
    rows = rows_of(lengths.tolist(), packing, 4, 35, seed=1, max_epochs=epochs, order=DocumentOrder(300, 1, 16))
    account = Account(rows.source, census, packing, Dealing(1, "web", True), 4, 35)
    while rows.cursor.row < 900:
        try:
            rows.fill(3)
        except EndOfData:
            break
        before = rows.cursor
        assert account.cursor == before
        expected = account.take(3)
        taken = rows.take(3, 0, 3)[0]
        assert rows.cursor == account.cursor
        for pieces, *found in zip(expected, taken.starts, taken.counters, taken.offsets, strict=True):
            assert pieces == pieces_of(*found)
    assert rows.cursor.row > 500


def another_document(monkeypatch: pytest.MonkeyPatch) -> None:
    right = StreamedReader.read

    def read(self: StreamedReader, documents: np.ndarray, keep: np.ndarray) -> EncodedDocuments:
        return right(self, np.where(documents % 9 == 5, 12, documents), keep)  # of another length

    monkeypatch.setattr(StreamedReader, "read", read)


def another_token(monkeypatch: pytest.MonkeyPatch) -> None:
    right = StreamedReader.read

    def read(self: StreamedReader, documents: np.ndarray, keep: np.ndarray) -> EncodedDocuments:
        got = right(self, documents, keep)
        broken = np.flatnonzero((documents % 9 == 5) & keep)
        got.ids[(np.cumsum(got.lengths) - got.lengths)[broken] + 1] += 1
        return got

    monkeypatch.setattr(StreamedReader, "read", read)


def one_token_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Window.rows

    def rows(self: Window, *arguments: Any) -> Any:
        found = right(self, *arguments)
        return replace(found, tokens=np.roll(found.tokens, 1, axis=1))

    monkeypatch.setattr(Window, "rows", rows)


def wrong_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Window.rows

    def rows(self: Window, *arguments: Any) -> Any:
        found = right(self, *arguments)
        for offsets in found.offsets:
            offsets[0] += 1
        return found

    monkeypatch.setattr(Window, "rows", rows)


def advanced(monkeypatch: pytest.MonkeyPatch, change: Callable[[SourceCursor], SourceCursor]) -> None:
    right = SourceRows._advance

    def advance(self: SourceRows, *arguments: Any) -> None:
        right(self, *arguments)
        self.cursor = change(self.cursor)

    monkeypatch.setattr(SourceRows, "_advance", advance)


def wrong_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    advanced(monkeypatch, lambda cursor: replace(cursor, offset=cursor.offset + (cursor.dealt == 0)))


def another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dealing, "order", lambda self, first_row, num_rows: np.arange(num_rows)[::-1])


def a_window_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Split.lay
    monkeypatch.setattr(Split, "lay", lambda self, *rest: right(replace(self, window_rows=self.window_rows + 1), *rest))


def wrong_state(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RowStream.cursor

    def cursor(self: RowStream) -> Any:
        state = right(self)
        state["sources"]["data"]["ledger"]["targets"] += 1
        state["sources"]["data"]["ledger"]["carried"] -= 1
        return state

    monkeypatch.setattr(RowStream, "cursor", cursor)


def tail_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SourceRows, "ended", lambda self: replace(self.cursor.ledger, carried=0, dropped=0))


def wrong_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_more(cursor: SourceCursor) -> SourceCursor:
        return replace(cursor, ledger=replace(cursor.ledger, bytes=cursor.ledger.bytes + 1))

    advanced(monkeypatch, one_more)


def a_piece_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    right = BestFit.lay

    def lay(self: BestFit, *arguments: Any) -> Any:
        laid = right(self, *arguments)
        if laid is not None:
            laid.layout.offsets[laid.layout.documents == 3] += 1
        return laid

    monkeypatch.setattr(BestFit, "lay", lay)


def rank_1_sees_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SourceRows.take

    def take(self: SourceRows, num_rows: int, first: int, last: int) -> Any:
        return right(self, num_rows, first - (first > 0), last - (first > 0))

    monkeypatch.setattr(SourceRows, "take", take)


def wrong_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titanlite.verify.proof.fingerprint_part", lambda digests, first: fingerprint_part(digests, 0))


PLACE = r"document \d+ \(.*a\.jsonl:\d+\)"
FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = {
    "another document": (another_document, "split", rf"step \d+, row \d.*, source data, {PLACE}.* in the row"),
    "another token": (
        another_token,
        "split",
        r"step \d+, row \d .*source data, document \d+ \(.*a\.jsonl:\d+\), its token 1: ",
    ),
    "a token skipped": (one_token_skipped, "split", rf"step 1, row 0 \(row 0 of the stream\), source data, {PLACE}"),
    "wrong offsets": (
        wrong_offsets,
        "split",
        r"step 1, row 0 .*: \(position, .* is \(0, 2, 151\) in the stream and \(0, 2, 150\)",
    ),
    "wrong cursor": (
        wrong_cursor,
        "split",
        r"source data, one epoch: offset is \d+ and \d+ by the lengths",
    ),
    "wrong state": (
        wrong_state,
        "split",
        r"step 1, source data, the cursor after it: targets is \d+ and \d+ by",
    ),
    "another order": (another_order, "split", r"step 1, source data, the cursor after it: targets is"),
    "a window too long": (a_window_too_long, "split", r"the cursor after it: tokens_read is \d+ and \d+"),
    "tail": (tail_forgotten, "split", r"source data, one epoch: tokens_read is \d+ and \d+ by the lengths"),
    "wrong ledger": (wrong_ledger, "split", r"source data, one epoch: bytes is \d+ and \d+ by the lengths"),
    "a piece lost": (
        a_piece_lost,
        "best_fit",
        # The fourth document of the order, and the token of it where the row begins.
        r"step 3, row 1 .*, source data, document 25 \(.*a\.jsonl:26\), its token 144: token 0 is \d+ in the row and",
    ),
    "ranks": (rank_1_sees_other_rows, "split", rf"step 1, row 2 \(row 2 of the stream\), source data, {PLACE}"),
    "fingerprint": (
        wrong_fingerprint,
        "split",
        r"step 1: its fingerprint is [0-9a-f]{16}, and [0-9a-f]{16} by hashlib",
    ),
}


@pytest.mark.parametrize("name", some_quick(FAULTS, "another document", "another token", "fingerprint"))
def test_what_is_broken_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant, packing, message = FAULTS[name]
    plant(monkeypatch)
    assert run(write(tmp_path, data__packing=packing), "--steps=12") == 1
    captured = capsys.readouterr()
    assert re.search("titanlite: .*" + message, captured.err)
    assert "\n" not in captured.err.strip().split("titanlite: ")[-1]


def test_a_jump_to_another_place_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, data__reader="cached")
    right = seek._jump
    monkeypatch.setattr(seek, "_jump", lambda *where: replace(right(*where), document=right(*where).document + 1))
    assert run(path, "--steps=12") == 1
    assert re.search(r"step 1, source data: .* by the search for it and \[0, 0, 0, 0\] by", capsys.readouterr().err)


def test_a_cache_with_other_tokens_is_found_whichever_reader_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    right = Tokenizer.encode_document
    data, tokenizer = load(path).data, Tokenizer.load(load(path).tokenizer.path)
    with monkeypatch.context() as planted:
        planted.setattr(Tokenizer, "encode_document", lambda self, text: swapped(right(self, text)))
        source = open_source("data", source_configs(data)["data"], data.cache_dir)
        write_cache(source, tokenizer, data.cache_dir, num_processes=0, stop_on_bad_record=True)
    for reader in ("cached", "streamed"):
        assert run(path, f"--data.reader={reader}", "--steps=12") == 1
        message = r"source data, document \d+, .*a\.jsonl:\d+: token \d+ is \d+ in the token cache and \d+ by its text"
        assert re.search(message, capsys.readouterr().err)


def swapped(ids: np.ndarray) -> np.ndarray:
    """Other ids, and as many."""
    return np.concatenate([ids[:1], ids[1:-1][::-1], ids[-1:]])


def log_run(config: Config, steps: int, wrong_at: int = 0) -> None:
    """What a run of the config leaves behind."""
    tokenizer = Tokenizer.load(config.tokenizer.path)
    corpus = open_corpus(config.data, tokenizer, seq_len=SEQ_LEN, seed=config.training.seed)
    rows = open_rows(corpus, config.data, eos_id=tokenizer.eos_id, num_rows=config.training.global_batch_size)
    folder = Path(config.job.dump_folder)
    with RunLog(folder, start_step=0, total_steps=steps, enable_tensorboard=False) as log:
        for step in range(1, steps + 1):
            digests = np.array([row_digest(row) for row in rows.take().tokens], np.uint64)
            log.step(step, f"{fingerprint_part(digests, 0) ^ (step == wrong_at):016x}", rows.cursor())


def test_what_a_run_logged_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path)
    log_run(load(path), 7)
    assert run(path, "--steps=12") == 0
    out = capsys.readouterr().out
    assert out.count("as the run logged it") == 7
    assert f"{tmp_path}/run logged the same fingerprints and cursors for 7 of these steps" in out
    log_run(load(path), 7, wrong_at=5)
    assert run(path, "--steps=12") == 1
    captured = capsys.readouterr()
    assert f"step 5, {tmp_path}/run/cursor.jsonl: the run trained on batch" in captured.err
    assert captured.out.splitlines()[-1].startswith("right  step 4: ")
    assert run(path, "--steps=12", "--training.seed=1") == 1
    assert "step 1, " in capsys.readouterr().err
    # Steps of other rows are no steps of this config, and are not compared.
    assert run(path, "--steps=12", "--training.global_batch_size=8", "--training.local_batch_size=8") == 0
    assert "logged" not in capsys.readouterr().out


def test_metrics_alone_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path)
    log_run(load(path), 3)
    log = tmp_path / "run" / "cursor.jsonl"
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    log.unlink()
    lines = [{"step": e["step"], "loss": 1.0, "batch_fingerprint": e["batch_fingerprint"]} for e in entries]
    lines.insert(2, {"step": 2, "validation_loss": 1.0})
    (log.parent / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(path, "--steps=12") == 0
    assert capsys.readouterr().out.count("as the run logged it") == 3
    lines[1]["batch_fingerprint"] = 16 * "0"
    (log.parent / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(path, "--steps=12") == 1
    assert "run/metrics.jsonl: the run trained on batch 0000000000000000" in capsys.readouterr().err


def test_bad_records_are_named_by_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"text": text}) if i % 2 else f"{{broken {i}" for i, text in enumerate(texts("a", 61))]
    lines[0] = json.dumps({"text": "first"})
    path = write(tmp_path)
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    assert run(path) == 1
    captured = capsys.readouterr()
    assert re.search(r"titanlite: .*a\.jsonl:3: .*data\.on_bad_record", captured.err)
    assert "right" not in captured.out
    for reader in ("streamed", "cached"):
        assert run(path, "--data.on_bad_record=skip", f"--data.reader={reader}") == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        named = re.findall(r"^  source data: .*a\.jsonl:(\d+): ", out, re.MULTILINE)
        assert named == [str(line) for line in range(3, 43, 2)]
        assert "  source data: 10 more\n" in out
        assert number(cells(out, "data", 0)[-1]) == number(cells(out, "data", 1)[-1]) == 30
    # As in training: more of them than it may leave out end it.
    assert run(path, "--data.on_bad_record=skip", "--data.max_bad_records=10") == 1
    assert "more bad records than data.max_bad_records = 10" in capsys.readouterr().err


def test_documents_behind_the_last_row_of_an_epoch_are_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path)
    tail = ["{broken", json.dumps({"text": ""}), json.dumps({"text": "a"}), "{broken"]
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"text": "long " * 20}), *tail]))
    for packing, first in (("split", 1), ("best_fit", 3)):
        options = ["--data.shuffle=false", "--data.shuffle_block=16384", f"--data.packing={packing}"]
        assert run(path, "--data.on_bad_record=skip", *options) == 0, capsys.readouterr().err
        epoch = [number(cell) for cell in cells(capsys.readouterr().out, "data", 1)[1:]]
        assert (epoch[1], epoch[3]) == (107, first)
        assert epoch[1] == sum(epoch[2:5])


def test_mistakes_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path)
    for arguments, message in (
        (["--steps", "1"], "titanlite: --steps 1: give a number of steps to prove, 2 or more\n"),
        (["--data.max_epochs=1", "--training.global_batch_size=4000"], "the data end before the first step"),
        (["--data.held_out_fraction=0.9999"], "no document is left to train on"),
    ):
        assert run(path, *arguments) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "a.jsonl").unlink()
    assert run(path) == 1
    assert re.search(r"\ntitanlite: data\.paths: .*a\.jsonl matches no file.*\n$", capsys.readouterr().err)
    assert main(["--help"]) == 0
    assert "verify data --job.config_file FILE [--steps N]" in capsys.readouterr().out


def test_the_plain_fingerprint_is_that_of_the_definition() -> None:
    rows = [np.arange(5, dtype=np.int32), np.arange(5, dtype=np.int32)[::-1]]
    digests = [
        int.from_bytes(hashlib.blake2b(r.astype("<i4").tobytes(), digest_size=8).digest(), "little") for r in rows
    ]
    assert plain_fingerprint(rows) == f"{fingerprint_part(np.array(digests, np.uint64), 0):016x}"
    assert plain_fingerprint(rows) != plain_fingerprint(rows[::-1])


@pytest.mark.slow
def test_files_without_random_access_are_read_again_only_up_to_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("titanlite.verify.proof._SEQUENTIAL_BYTES", 10)
    path = write(tmp_path, **mixture(tmp_path))
    assert run(path) == 0, capsys.readouterr().err
    assert re.search(r"piece by piece: \d+ by their cache alone, \d+ by their text\n", capsys.readouterr().out)

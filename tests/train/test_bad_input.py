"""What a user gets wrong ends in one line that names the key or file, the value and the fix, and in exit code 1."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.test_source import HOSTILE
from tests.support.make_tokenizers import SHIPPED, single_bytes, write_tokenizer
from tests.support.tiny_run import metrics, write_config
from titanlite.train.__main__ import main


def write_jsonl(path: Path, lines: list[str]) -> str:
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def write_bytes(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def dangling(folder: Path, target: str = "nowhere.txt") -> str:
    (folder / "links").mkdir()
    (folder / "links/link.txt").symlink_to(target)
    return str(folder / "links/link.txt")


def without_eos(folder: Path) -> str:
    return str(write_tokenizer(folder / "no-eos", single_bytes(), {"<s>": 256}, bos_token="<s>"))


# What is wrong -> (overrides of the config, words that the message must have)
CASES: dict[str, tuple[Callable[[Path], dict[str, Any]], list[str]]] = {
    "unknown key": (lambda f: {"training__stpes": 3}, ["training.stpes", "config.toml", "training.steps"]),
    "wrong type": (lambda f: {"optimizer__lr": "fast"}, ["optimizer.lr", "config.toml", "fast"]),
    "more tp than heads": (
        lambda f: {"parallelism__tensor_parallel_degree": 4},
        ["parallelism.tensor_parallel_degree = 4", "model.n_kv_heads = 2"],
    ),
    "glob without a file": (lambda f: {"data__paths": [str(f / "nothing/*.txt")]}, ["data.paths", "nothing/*.txt"]),
    "missing file": (lambda f: {"data__paths": [str(f / "absent.jsonl")]}, ["data.paths", "absent.jsonl"]),
    "empty corpus": (lambda f: {"data__paths": [write_jsonl(f / "none.jsonl", [])]}, ["data.paths", "none.jsonl"]),
    "folder": (lambda f: {"data__paths": [str(f)]}, ["data.paths", "is a folder; name its files", "**/*.txt"]),
    "dangling link": (lambda f: {"data__paths": [dangling(f)]}, ["data.paths", "link.txt", "No such file"]),
    "dangling links only": (
        lambda f: {"data__paths": [str(Path(dangling(f)).parent / "*")]},
        ["data.paths", "matches no file"],
    ),
    "loop of links": (lambda f: {"data__paths": [dangling(f, "link.txt")]}, ["data.paths", "link.txt", "links"]),
    "empty compressed file": (
        lambda f: {"data__paths": [write_jsonl(f / "x.jsonl.gz", [])]},
        ["data.paths", "x.jsonl.gz", "is empty"],
    ),
    "compressed file that is cut off": (
        lambda f: {"data__paths": [write_bytes(f / "x.jsonl.gz", gzip.compress(b'{"text": "a"}')[:-6])]},
        ["data.paths", "x.jsonl.gz", "cut off"],
    ),
    "no such field": (
        lambda f: {"data__paths": [write_jsonl(f / "x.jsonl", ['{"body": "a"}'])]},
        ["x.jsonl", "data.text_field", "'text'"],
    ),
    "broken record": (
        lambda f: {"data__paths": [write_jsonl(f / "x.jsonl", ['{"text": "a"}', '{"text": '])]},
        ["x.jsonl:2", "data.on_bad_record"],
    ),
    "no tokenizer": (lambda f: {"tokenizer__path": str(f / "absent")}, ["tokenizer.path", "absent"]),
    "tokenizer without eos": (lambda f: {"tokenizer__path": without_eos(f)}, ["tokenizer", "eos"]),
    "vocabulary too small": (lambda f: {"model__vocab_size": 257}, ["model.vocab_size = 257", "258"]),
    "flex on a CPU": (lambda f: {"model__attention": "flex", "training__seq_len": 128}, ["model.attention", "flex"]),
    "nothing to resume": (lambda f: {"checkpoint__resume": "must"}, ["checkpoint.resume", "must"]),
    "no such weights": (lambda f: {"checkpoint__init_from": str(f / "absent")}, ["absent"]),
    "folder is a file": (lambda f: {"job__dump_folder": str(f / "config.toml")}, ["job.dump_folder", "config.toml"]),
    "CUDA only": (lambda f: {"profiling__enable_memory_snapshot": True}, ["profiling.enable_memory_snapshot", "CUDA"]),
    "offload to itself": (lambda f: {"parallelism__enable_cpu_offload": True}, ["parallelism.enable_cpu_offload"]),
    "learning rate that explodes": (
        lambda f: {"optimizer__lr": 1e30, "training__max_norm": 0.0},
        ["step 2", "batch", "not finite", "no update"],
    ),
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
def test_one_line_names_it(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, words = CASES[case]
    config = write_config(tmp_path, **overrides(tmp_path))
    assert main(["--job.config_file", str(config)]) == 1
    message = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[rank0]")]
    assert len(message) == 1, message
    for word in words:
        assert word in message[0]


def test_a_step_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--job.config_file", str(write_config(tmp_path)), "--checkpoint.load_step", "3"]) == 1
    assert "no checkpoint of step 3" in capsys.readouterr().err


@pytest.mark.parametrize("world_size", ["3", "6"])
def test_rank_count_that_does_not_fit(
    world_size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world_size)
    assert main(["--job.config_file", str(write_config(tmp_path))]) == 1
    message = capsys.readouterr().err
    assert "training.global_batch_size = 8" in message
    assert f"cannot be dealt to {world_size} data-parallel ranks" in message


def test_all_problems_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, training__stpes=3, model__n_heads=5, optimizer__lr="fast")
    assert main(["--job.config_file", str(config), "--training.seq_len", "0"]) == 1
    message = capsys.readouterr().err
    for word in ("training.stpes", "optimizer.lr"):
        assert word in message


GOOD = "some text that can be read " * 20
BAD_LINES = [*(line for line, _ in HOSTILE.values())]


def write_bad(folder: Path, kind: str) -> tuple[list[str], list[str]]:
    """Data with bad records in front of the good ones: what names the files, and the places of the bad records."""
    folder.mkdir()
    if kind == "txt":
        (folder / "0.txt").write_bytes(b"\xff\xfe")
        (folder / "1.txt").touch()  # an empty document is none that is bad
        for i in range(2, 20):
            (folder / f"{i:02}.txt").write_text(GOOD)
        return [str(folder / "*")], ["0.txt: not UTF-8"]
    if kind == "parquet":
        texts = pa.array([GOOD.encode(), None, b"\xff", *[GOOD.encode()] * 20]).view(pa.string())
        pq.write_table(pa.table({"text": texts}), folder / "a.parquet")
        return [str(folder / "*")], ["a.parquet: row 1: the column 'text' is null", "a.parquet: row 2: not UTF-8"]
    good = json.dumps({"text": GOOD}).encode()
    content = b"\n".join([good, *BAD_LINES, *[good] * 20, b""])
    (folder / f"a.{kind}").write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    return [str(folder / "*")], [f"a.{kind}:{i + 2}: " for i in range(len(BAD_LINES))]


@pytest.mark.parametrize(
    ("kind", "reader"),
    [
        ("jsonl", "auto"),
        ("jsonl", "cached"),
        *(pytest.param(kind, "auto", marks=pytest.mark.slow) for kind in ("txt", "jsonl.gz", "parquet")),
    ],
)
def test_bad_records_of_every_kind_stop_a_run_or_are_named_and_counted(
    kind: str, reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, places = write_bad(tmp_path / "data", kind)
    config = write_config(tmp_path, paths=paths[0], data__reader=reader, data__shuffle=False)
    assert main(["--job.config_file", str(config)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[rank0]")]
    assert line.startswith(f"titanlite: {tmp_path}/data/{places[0]}")
    assert line.endswith('data.on_bad_record = "skip" would leave it out and count it')
    assert main(["--job.config_file", str(config), "--data.on_bad_record=skip"]) == 0
    told = capsys.readouterr().err
    assert all(f"bad record left out: {tmp_path}/data/{place}" in told for place in places[:20])
    ledger = json.loads((tmp_path / "run/checkpoint/step-00000008/manifest.json").read_text())["meta"]["ledger"]
    assert ledger["bad_records"] == len(places)
    assert ledger["document_first"] < 20  # so that all of this was one epoch
    assert len(metrics(tmp_path / "run")) == 8


@pytest.mark.parametrize("reader", ["streamed", "cached"])
def test_too_many_bad_records_stop_a_run(reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, _ = write_bad(tmp_path / "data", "jsonl")
    values = {"data__reader": reader, "data__on_bad_record": "skip", "data__shuffle": False}
    config = write_config(tmp_path, paths=paths[0], **values)
    assert main(["--job.config_file", str(config), f"--data.max_bad_records={len(BAD_LINES) - 1}"]) == 1
    assert f"data.max_bad_records = {len(BAD_LINES) - 1}: look at the data, or raise it" in capsys.readouterr().err
    assert main(["--job.config_file", str(config), f"--data.max_bad_records={len(BAD_LINES)}"]) == 0


LARGE = """
import sys
from titanlite.config.sections import DataConfig
from titanlite.data import corpus
from titanlite.data.cache.writer import write_cache
from titanlite.data.corpus import open_corpus, open_rows
from titanlite.tokenizer import Tokenizer

def peak():  # in KiB; ru_maxrss would be that of the process that started this one
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

before = peak()
corpus.write_cache = lambda source, tokenizer, cache, _, *rest: write_cache(source, tokenizer, cache, 0, *rest)
tokenizer = Tokenizer.load(sys.argv[1])
data = DataConfig(paths=("a.jsonl",), reader=sys.argv[2], cache_dir="cache", shuffle=False, on_bad_record="skip")
opened = open_corpus(data, tokenizer, seq_len=2048, seed=0)
rows = open_rows(opened, data, eos_id=tokenizer.eos_id, num_rows=1)
while rows.take().counters[0][-1] < 2:  # the last of the three documents
    pass
print((peak() - before) // 1024, rows.ledgers()["data"].bad_records)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize(("reader", "is_bad"), [("streamed", False), ("cached", False), ("streamed", True)])
def test_a_line_of_200_mb_is_trained_or_left_out_in_the_memory_of_a_few(
    reader: str, is_bad: bool, tmp_path: Path
) -> None:
    line = json.dumps({"text": "word " * 40_000_000}).encode()
    good = json.dumps({"text": "a text " * 1000}).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, line[:-1] if is_bad else line, good]))
    command = [sys.executable, "-c", LARGE, str(SHIPPED), reader]
    environment = os.environ | {"PYTHONPATH": str(SHIPPED.parents[1])}
    output = subprocess.run(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    print(f"{reader}, bad {is_bad}: {output.split()[0]} MiB")
    assert int(output.split()[0]) < 1100
    assert int(output.split()[1]) == is_bad


def test_skipped_updates_are_bounded_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate that explodes after the first step: the second is skipped, and so is every later one, up to the bound."""
    config = write_config(
        tmp_path,
        training__on_nonfinite="skip",
        training__max_skipped_steps=3,
        training__max_norm=0.0,
        optimizer__lr=1e30,
    )
    assert main(["--job.config_file", str(config)]) == 1
    told = capsys.readouterr().err
    assert "4 updates were left out, more than training.max_skipped_steps = 3" in told
    assert [row["grad_norm"] for row in metrics(tmp_path / "run")][1:] == [None] * 4

"""Data that fail while a run reads them: one line with file and record on all ranks, and an exact resume.

Real gloo ranks, real files, which one rank damages between two steps.
"""

import contextlib
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

from tests.support.gloo import free_port, ranks
from tests.support.tiny_run import NUM_DOCUMENTS, fingerprints, text, write_config
from titanlite.config import load_config
from titanlite.config.sections import SourceConfig
from titanlite.data import feed
from titanlite.data.cache.writer import write_cache
from titanlite.data.source import RecordError, Source, open_source
from titanlite.tokenizer import Tokenizer
from titanlite.train.__main__ import main
from titanlite.train.run import Run

ROOT = Path(__file__).parents[2]
STEPS = 60  # of several windows, of which the first one or two are read ahead when the fault happens
SECONDS = 60  # within which all ranks have ended; the tests' collectives wait for 120


def write_data(folder: Path, kind: str) -> str:
    """The documents of tests.support.tiny_run in one format; returns what names the files."""
    folder.mkdir()
    texts = [text(number) for number in range(NUM_DOCUMENTS)]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    if kind == "txt":
        for number, t in enumerate(texts):
            (folder / f"{number:02}.txt").write_text(t)
    elif kind == "parquet":
        pq.write_table(pa.table({"text": texts}), folder / "a.parquet", row_group_size=4)
    else:
        (folder / f"a.{kind}").write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    return str(folder / f"*.{kind}")


def configured(folder: Path, kind: str) -> Path:
    return write_config(folder, paths=write_data(folder / "data", kind), training__steps=STEPS, checkpoint__interval=2)


def replace(path: Path) -> None:
    (path.parent / "new").write_bytes(path.read_bytes()[::-1])
    (path.parent / "new").replace(path)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        content = file.read()
        file.seek(0)
        file.write(content[50:] + content[:50])


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"text": "one more"}\n')


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    """A bit of the tokens of a shard."""
    with path.open("r+b") as file:
        file.seek(500)
        byte = file.read(1)[0]
        file.seek(500)
        file.write(bytes([byte ^ 8]))


def write_cache_of(config: Path) -> None:
    """Ranks of tests may not start processes; a training run does."""
    parsed = load_config(["--job.config_file", str(config)])
    source = open_source("data", SourceConfig(parsed.data.paths), parsed.data.cache_dir)
    write_cache(source, Tokenizer.load(parsed.tokenizer.path), parsed.data.cache_dir, 0, True)


class Fault(NamedTuple):
    kind: str
    change: Callable[[Path], None]
    told: str
    folder: str = "data"


RECORD = {
    "txt": r"\d\d\.txt",
    "jsonl": r"a\.jsonl:\d+",
    "parquet": r"a\.parquet: row \d+",
    "jsonl.gz": r"a\.jsonl\.gz:\d+",
}
GONE, CHANGED = "No such file or directory", "the file has changed since the start of the run"
DAMAGED = r"/\S*tokens-\w+\.shard: this shard of the token cache is damaged or gone"

FAULTS = {
    "texts vanish": Fault("txt", Path.unlink, GONE),
    "a file is replaced": Fault("jsonl", replace, CHANGED),
    "a file shrinks": Fault("jsonl", cut, CHANGED),
    "a bit of a shard flips": Fault("jsonl.gz", flip, DAMAGED, "cache"),
}
MORE_FAULTS = {
    "a shard is cut off": Fault("jsonl.gz", empty, DAMAGED, "cache"),
    "a row group is overwritten": Fault("parquet", overwrite, CHANGED),
    "a text is overwritten": Fault("txt", overwrite, CHANGED),
    "a file vanishes": Fault("jsonl", Path.unlink, GONE),
    "a file is overwritten": Fault("jsonl", overwrite, CHANGED),
    "a file grows": Fault("jsonl", append, CHANGED),
    "a parquet file vanishes": Fault("parquet", Path.unlink, GONE),
    "a parquet file is replaced": Fault("parquet", replace, CHANGED),
    "a parquet file shrinks": Fault("parquet", cut, CHANGED),
    "a shard vanishes": Fault("jsonl.gz", Path.unlink, DAMAGED, "cache"),
    "an index is cut off": Fault("jsonl", empty, r"its index .* was changed during the run", "cache"),
}


def train(config: Path, damage: Callable[[], None] = lambda: None) -> tuple[int, str, float]:
    """`main`, where rank 0 damages something after step 3: exit code, what was printed, when it ended. Chunks are
    small, so that not everything was read by then."""
    finish_step, printed = Run.finish_step, io.StringIO()

    def finish(run: Run, *args: Any) -> None:
        finish_step(run, *args)
        if run.trainer.step == 3 and dist.get_rank() == 0:
            damage()

    with (
        patch.object(Run, "finish_step", finish),
        patch.multiple(feed, CHUNK_BYTES=200, _ORDER_DOCUMENTS=10),
        contextlib.redirect_stderr(printed),
    ):
        return main(["--job.config_file", str(config)]), printed.getvalue(), time.monotonic()


def train_with_fault(config: Path, name: str) -> tuple[int, str, float]:
    fault = {**FAULTS, **MORE_FAULTS}[name]
    began = 0.0

    def damage() -> None:
        nonlocal began
        began = time.monotonic()
        folder = config.parent / fault.folder
        for path in folder.glob("*.[si][hn]*" if fault.folder == "cache" else "*"):  # shards and indices, no locks
            fault.change(path)

    code, told, ended = train(config, damage)
    return code, told, ended - began if began else 0.0


def ended_alike(ended: list[tuple[int, str, float]], told: str, folder: Path) -> None:
    """All ranks with exit code 1, and one line by rank 0, which is also the run's status."""
    assert [code for code, _, _ in ended] == [1, 1]
    lines = [line for line in ended[0][1].splitlines() if line.startswith("titanlite: ")]
    assert len(lines) == 1
    assert "Traceback" not in ended[0][1]
    assert re.search(told, lines[0]), lines[0]
    assert not [line for line in ended[1][1].splitlines() if line.startswith("titanlite: ")]
    status = json.loads((folder / "run/status.json").read_text())
    assert status["state"] == "failed"
    assert status["reason"].endswith(lines[0].removeprefix("titanlite: "))
    assert 3 <= status["step"] < STEPS
    assert max(seconds for _, _, seconds in ended) < SECONDS


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Fingerprints of a run without fault: the same for every format."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(["--job.config_file", str(configured(folder, "txt"))]) == 0
    return fingerprints(folder / "run")


@pytest.mark.parametrize(
    "name", [*FAULTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_FAULTS)], ids=str
)
def test_files_that_fail_are_named_on_all_ranks_and_the_resume_is_exact(
    name: str, tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    fault = {**FAULTS, **MORE_FAULTS}[name]
    config = configured(tmp_path, fault.kind)
    if fault.kind == "jsonl.gz":
        write_cache_of(config)
    shutil.copytree(tmp_path / "data", tmp_path / "kept")
    ended = ranks(2).run(train_with_fault, config, name)
    ended_alike(ended, rf"/data/{RECORD[fault.kind]}: {fault.told}", tmp_path)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "kept").rename(tmp_path / "data")
    if fault.change is flip:  # a start looks at tokens only where it needs them: the line said what to do
        assert "delete it, and the next start writes it anew" in ended[0][1]
        for path in (tmp_path / "cache").glob("*.shard"):
            path.unlink()
    if fault.kind == "jsonl.gz":
        write_cache_of(config)
    assert [code for code, _, _ in ranks(2).run(train, config)] == [0, 0]
    assert fingerprints(tmp_path / "run") == undisturbed


class Panic(BaseException):
    """What Rust code raises through its bindings: no Exception."""


def train_with_broken_thread(config: Path, how: str) -> tuple[int, str, float]:
    """`main`, where reading breaks on rank 1."""
    texts, calls = Source.texts, iter(range(1000))
    raised = {"no memory": MemoryError(), "panic": Panic("called `Result::unwrap()` on an `Err` value")}

    def broken(source: Source, documents: np.ndarray) -> Iterator[str | RecordError]:
        for each in texts(source, documents):
            if threading.current_thread() is not threading.main_thread() and next(calls) >= 5:
                raise raised.get(how, SystemExit(3))  # threads end by the latter without a word
            yield each

    with contextlib.ExitStack() as stack:
        if dist.get_rank() == 1:
            stack.enter_context(patch.object(Source, "texts", broken))
        start = time.monotonic()
        code, told, ended = train(config)
    return code, told, ended - start


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("no memory", r"/data/\d\d\.txt: MemoryError$"),
        ("panic", r"/data/\d\d\.txt: Panic: called `Result::unwrap\(\)` on an `Err` value$"),
        ("exit", "SystemExit: 3$"),
    ],
)
def test_a_thread_that_breaks_on_one_rank_ends_all_of_them(how: str, told: str, tmp_path: Path) -> None:
    ended = ranks(2).run(train_with_broken_thread, configured(tmp_path, "txt"), how)
    assert [code for code, _, _ in ended] == [1, 1]
    lines = [line for line in ended[0][1].splitlines() if line.startswith("titanlite: ")]
    assert len(lines) == 1
    assert re.search(told, lines[0]), lines[0]
    assert max(seconds for _, _, seconds in ended) < SECONDS


@pytest.mark.slow
def test_torchrun_ends_with_the_line_and_goes_on_when_the_file_is_back(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data/a.jsonl"
    path.write_text("".join(json.dumps({"text": text(number) * 9}) + "\n" for number in range(2000)))
    config = write_config(
        tmp_path,
        paths=str(path),
        data__num_workers=0,  # 32 steps are read ahead
        training__steps=10_000,
        training__seq_len=256,
        training__global_batch_size=32,
        training__local_batch_size=16,
        checkpoint__interval=5,
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command += ["-m", "titanlite.train", "--job.config_file", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("w") as out, subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out) as job:
        while job.poll() is None and not (tmp_path / "run/checkpoint/step-00000010").exists():
            time.sleep(0.05)
        path.rename(tmp_path / "away")
        assert job.wait(100) == 1
    lines = [line for line in log.read_text().splitlines() if line.startswith("titanlite: ")]
    assert len(lines) == 1
    assert re.fullmatch(rf"titanlite: {path}:\d+: No such file or directory", lines[0])
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "failed"
    (tmp_path / "away").rename(path)
    before = fingerprints(tmp_path / "run")
    last = max(before)
    assert main(["--job.config_file", str(config), "--training.steps", str(last + 2)]) == 0
    assert fingerprints(tmp_path / "run").items() >= before.items()

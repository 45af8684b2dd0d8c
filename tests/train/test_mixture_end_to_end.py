"""A mixture of four formats as a user trains it: killed, resumed on other ranks and by the other reader, to the end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.tiny_run import SENTENCE, descendants, fingerprints, metrics, write_config

ROOT = Path(__file__).parents[2]
STEPS = 300
SHARES = {"books": 0.25, "code": 0.05, "tables": 0.3, "web": 0.4}
DECK = 20


def texts(seed: int, number: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(SENTENCE.split(), k=rng.choice((0, 3, 20, 90)))) for _ in range(number)]


def write_sources(folder: Path) -> dict[str, str]:
    """Four formats; returns a pattern for each source."""
    zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    (folder / "books").mkdir(parents=True)
    for k, text in enumerate(texts(1, 60)):
        (folder / "books" / f"{k:03}.txt").write_text(text)
    (folder / "code.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in texts(2, 9)))
    pyarrow.parquet.write_table(pa.table({"text": texts(3, 200)}), folder / "tables.parquet", row_group_size=32)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(4, 300))
    (folder / "web.jsonl.zst").write_bytes(zstd.compress(lines.encode()))
    names = {"books": "books/*.txt", "code": "code.jsonl", "tables": "*.parquet", "web": "web.jsonl.zst"}
    return {name: str(folder / pattern) for name, pattern in names.items()}


def write_mixture(folder: Path) -> Path:
    config = write_config(folder, training__steps=STEPS, checkpoint__interval=40, optimizer__lr=1e-3)
    text = "\n".join(line for line in config.read_text().splitlines() if not line.startswith("paths = "))
    for name, pattern in write_sources(folder / "sources").items():
        field = 'text_field = "content"' if name == "code" else ""
        text += f'\n[data.sources.{name}]\npaths = ["{pattern}"]\nweight = {SHARES[name]}\n{field}\n'
    config.write_text(text)
    return config


def start(config: Path, run: Path, num_ranks: int, *overrides: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    arguments = ["-m", "titanlite.train", "--job.config_file", str(config), "--job.dump_folder", str(run), *overrides]
    with open(run.with_suffix(f".{num_ranks}.log"), "ab") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment, stderr=log)


def kill_after(job: "subprocess.Popen[bytes]", run: Path, step: int) -> None:
    cursors = run / "cursor.jsonl"
    while not cursors.exists() or cursors.read_bytes().count(b"\n") < step:
        assert job.poll() is None
        time.sleep(0.02)
    for process in descendants(job.pid):
        os.kill(process, signal.SIGKILL)
    job.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_killed_twice_and_resumed_on_other_ranks_and_readers(tmp_path: Path, packing: str) -> None:
    config = write_mixture(tmp_path)
    assert start(config, tmp_path / "whole", 1, f"--data.packing={packing}").wait() == 0
    expected = fingerprints(tmp_path / "whole")
    assert len(expected) == STEPS

    run = tmp_path / "killed"
    kill_after(start(config, run, 2, f"--data.packing={packing}"), run, 110)
    assert not (run / "status.json").read_text().count("finished")
    kill_after(start(config, run, 1, f"--data.packing={packing}"), run, 210)
    cached = (f"--data.packing={packing}", "--data.reader=cached", "--data.num_workers=2")
    assert start(config, run, 4, *cached).wait() == 0
    assert fingerprints(run) == expected

    manifests = [
        json.loads((f / f"checkpoint/step-{STEPS:08}/manifest.json").read_text()) for f in (run, tmp_path / "whole")
    ]
    assert manifests[0]["meta"]["cursor"] == manifests[1]["meta"]["cursor"]
    ledgers = {name: source["ledger"] for name, source in manifests[0]["meta"]["cursor"]["sources"].items()}
    num_rows = 8 * STEPS
    assert num_rows % DECK == 0
    for name, source in manifests[0]["meta"]["cursor"]["sources"].items():
        assert source["row"] == round(SHARES[name] * num_rows)  # the deck is exact
    for ledger in ledgers.values():
        assert ledger["tokens_read"] == ledger["targets"] + ledger["document_first"] + ledger.get("carried", 0)
        assert ledger["document_first"] > 0
    corpus = json.loads((run / "corpus.json").read_text())["sources"]
    assert {name: source["reader"] for name, source in corpus.items()} == dict.fromkeys(SHARES, "cached")
    readers = json.loads((tmp_path / "whole/corpus.json").read_text())["sources"]
    assert {name for name, source in readers.items() if source["reader"] == "cached"} == {"web"}
    events = EventAccumulator(str(run / "tb")).Reload()
    assert events.Scalars("source/books/targets")[-1].value == np.float32(ledgers["books"]["targets"])
    assert metrics(run)[-1]["tokens"] == sum(ledger["targets"] for ledger in ledgers.values())

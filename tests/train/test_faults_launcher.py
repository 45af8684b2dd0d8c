"""A stop that reaches run_train.sh while a run starts: its exit code 75, and the same command goes on exactly.

Real scripts, launchers and signals; test_faults_process.py has the stops of later moments.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.gloo import ranks
from tests.support.lives import LONG, until
from tests.support.tiny_run import descendants, fingerprints, text, write_config
from titanlite.train.__main__ import main

ROOT = Path(__file__).parents[2]
RUN = {"metrics__enable_tensorboard": False, "training__local_batch_size": 8}

# In each rank, and in no other Python: the first step goes on for 12 s after its rank was signalled, as one that
# compiles does.
LONG_FIRST_STEP = """
import os

if "RANK" in os.environ:
    import signal, time
    from titanlite.trainer import Trainer

    right = Trainer.train_step

    def train_step(self, *arguments):
        if self.step == 0:
            heard, handle = [], signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda *call: (heard.append(call), handle(*call)))
            open(os.path.join({folder!r}, "in step 1 of rank " + os.environ["RANK"]), "w").close()
            while not heard:
                self.on_micro_batch()
                time.sleep(0.02)
            time.sleep(12)
        return right(self, *arguments)

    Trainer.train_step = train_step
"""


@contextmanager
def run_train(config: Path, log: Path, site: Path | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    """The script, of two ranks. site: of a sitecustomize.py."""
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {"CONFIG_FILE": str(config), "NGPU": "2", "PYTHONPATH": f"{site or ROOT}{os.pathsep}{ROOT}"}
    with log.open("ab") as out:
        script = subprocess.Popen([ROOT / "run_train.sh"], env=environment, stdout=out, stderr=out)
    try:
        yield script
    finally:
        for pid in descendants(script.pid) if script.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        script.wait(LONG)


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run/status.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_stop_during_the_very_first_step_saves_it_and_a_requeue_goes_on(
    number: signal.Signals, tmp_path: Path
) -> None:
    config, log = write_config(tmp_path, **RUN), tmp_path / "log"
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(LONG_FIRST_STEP.format(folder=str(tmp_path)))
    with run_train(config, log, tmp_path / "site") as script:
        until(lambda: len(list(tmp_path.glob("in step 1 of rank *"))) == 2, "the first step")
        assert not (tmp_path / "run/cursor.jsonl").read_bytes()
        script.send_signal(number)
        assert script.wait(LONG) == 75, log.read_text()
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("preempted", 1)
    assert os.listdir(tmp_path / "run/checkpoint") == ["step-00000001"]
    assert list(fingerprints(tmp_path / "run")) == [1]
    assert "SIGTERM to rank " in log.read_text()
    assert "saving a checkpoint and stopping" in log.read_text()
    assert "Traceback" not in log.read_text()
    with run_train(config, log, tmp_path / "site") as script:
        assert script.wait(LONG) == 0, log.read_text()
    assert f"resuming from {tmp_path}/run/checkpoint/step-00000001" in log.read_text()
    whole = write_config(tmp_path / "whole", paths=str(tmp_path / "corpus/*.txt"), **RUN)
    assert ranks(2).run(main, ["--job.config_file", str(whole)]) == [0, 0]
    assert (tmp_path / "run/cursor.jsonl").read_bytes() == (tmp_path / "whole/run/cursor.jsonl").read_bytes()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole/run")


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stop_while_a_token_cache_is_written_keeps_its_shards_and_the_next_start_trains_the_same_rows(
    tmp_path: Path,
) -> None:
    records, log = tmp_path / "records.jsonl", tmp_path / "log"
    with records.open("w") as out:  # of 7 shards, which take some seconds each
        for number in range(50_000):
            out.write(json.dumps({"text": f"{number} " + text(number % 50) * 4}) + "\n")
    config = write_config(tmp_path, paths=str(records), **RUN, data__reader="cached")
    shards = tmp_path / "cache"
    with run_train(config, log) as script:
        until(lambda: list(shards.glob("*.shard")), "the first shard")
        script.send_signal(signal.SIGTERM)
        assert script.wait(LONG) == 75, log.read_text()
    kept = {path: path.stat().st_mtime_ns for path in shards.glob("*.shard")}
    assert 0 < len(kept) < 7
    assert not list(shards.glob("*.tmp"))
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("preempted", 0)
    assert status(tmp_path)["reason"].startswith("SIGTERM to rank ")
    assert status(tmp_path)["reason"].endswith(": stopped while the token cache of source 'data' was written")
    assert status(tmp_path)["reason"] in log.read_text()
    assert "Traceback" not in log.read_text()
    with run_train(config, log) as script:
        assert script.wait(LONG) == 0, log.read_text()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    whole = write_config(tmp_path / "whole", paths=str(records), **RUN, data__reader="streamed")
    assert ranks(2).run(main, ["--job.config_file", str(whole)]) == [0, 0]
    assert fingerprints(tmp_path / "run") == fingerprints(tmp_path / "whole/run")

"""The README tells the truth: its commands run, its keys exist, its files are there."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_run import descendants, fingerprints, metrics
from titanlite.config import load_config
from titanlite.config.schema import SCHEMA

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
OURS = README[: README.index("## Coming from torchtitan")]
COMMANDS = re.findall(r"^    ((?:[A-Z_]+=\S+ )*(?:torchrun|\./run_train\.sh) ?.*)$", OURS, re.MULTILINE)
COMMANDS += re.findall(r"^\| `((?:[A-Z_]+=\S+ )*\./run_train\.sh ?.*?)`", OURS, re.MULTILINE)


def split(command: str) -> tuple[dict[str, str], list[str]]:
    """Environment and words of a command line."""
    words = shlex.split(command)
    environment = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    return environment, words[len(environment) :]


def test_every_command_has_a_valid_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert len(COMMANDS) >= 9
    for command in COMMANDS:
        environment, words = split(command)
        if "--help" in words:
            continue
        if words[0] == "torchrun":
            monkeypatch.setenv("WORLD_SIZE", words[1].removeprefix("--nproc_per_node="))
            load_config(words[words.index("titanlite.train") + 1 :])
        else:
            monkeypatch.setenv("WORLD_SIZE", environment.get("NGPU", "2"))
            config_file = environment.get("CONFIG_FILE", "train_configs/debug.toml")
            load_config(["--job.config_file", config_file, *words[1:]])


def test_every_key_and_file_exists() -> None:
    keys = re.findall(r"`(?:--)?([a-z_]+)\.([a-z_]+)(?: = [^`]*)?`", OURS)
    assert len(keys) > 15
    for section, key in keys:
        if section in SCHEMA and f"{section}.{key}" not in ("metrics.jsonl", "tokenizer.model"):  # files
            assert key in SCHEMA[section], f"{section}.{key}"
    for path in re.findall(r"[`(]((?:\./|\w+/)*\w+\.(?:sh|py|md|slurm)|\w+/\w+\.toml)[`)]", README):
        assert (ROOT / path).exists(), path


def run_train(folder: Path, *overrides: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """./run_train.sh, as the README shows it, into another folder."""
    return subprocess.run(
        [ROOT / "run_train.sh", "--job.dump_folder", str(folder), *overrides],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def debug_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("debug") / "run"
    done = run_train(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_command_trains(debug_run: Path) -> None:
    rows = metrics(debug_run)
    assert rows[-1]["step"] == 100
    assert sum(row["loss"] for row in rows[-10:]) / 10 < rows[0]["loss"] - 2.5
    assert json.loads((debug_run / "checkpoint/step-00000100/manifest.json").read_text())["meta"]["step"] == 100
    assert list((debug_run / "tb").iterdir())
    again = run_train(debug_run)
    assert again.returncode == 0
    assert "is finished at step 100" in again.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_ranks_see_and_learn_the_same(debug_run: Path, tmp_path: Path) -> None:
    for name, ngpu, degree in (("one", "1", 1), ("four", "4", 2)):
        overrides = ("--training.steps", "5", "--parallelism.tensor_parallel_degree", str(degree))
        assert run_train(tmp_path / name, *overrides, NGPU=ngpu).returncode == 0
    one, four = metrics(tmp_path / "one"), metrics(tmp_path / "four")
    assert fingerprints(tmp_path / "one") == fingerprints(tmp_path / "four")
    assert list(fingerprints(tmp_path / "one").values()) == list(fingerprints(debug_run).values())[:5]
    assert one[0]["loss"] == pytest.approx(four[0]["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_after_step_50_and_restart_on_one_rank(debug_run: Path, tmp_path: Path) -> None:
    job = subprocess.Popen(
        [ROOT / "run_train.sh", "--job.dump_folder", str(tmp_path / "run")],
        env={**os.environ, "PYTHON": sys.executable},
        stderr=subprocess.DEVNULL,
    )
    cursors = tmp_path / "run/cursor.jsonl"
    while not cursors.exists() or cursors.read_bytes().count(b"\n") < 52:
        assert job.poll() is None
        time.sleep(0.1)
    for process in descendants(job.pid):
        os.kill(process, signal.SIGKILL)
    job.wait()
    assert run_train(tmp_path / "run", NGPU="1").returncode == 0
    assert fingerprints(tmp_path / "run") == fingerprints(debug_run)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_the_script_saves_and_the_next_start_goes_on(
    number: signal.Signals, debug_run: Path, tmp_path: Path
) -> None:
    steps = ["--training.steps", "30"]
    job = subprocess.Popen(
        [ROOT / "run_train.sh", "--job.dump_folder", str(tmp_path / "run"), *steps],
        env={**os.environ, "PYTHON": sys.executable},
        stderr=subprocess.DEVNULL,
        # As in a terminal: a suite in the background ignores SIGINT, and a shell cannot trap what it inherits ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    cursors = tmp_path / "run/cursor.jsonl"
    while not cursors.exists() or cursors.read_bytes().count(b"\n") < 5:
        assert job.poll() is None
        time.sleep(0.1)
    job.send_signal(number)
    assert job.wait() == 75
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "preempted"
    assert (tmp_path / f"run/checkpoint/step-{status['step']:08d}/manifest.json").exists()
    assert run_train(tmp_path / "run", *steps).returncode == 0
    assert list(fingerprints(tmp_path / "run").values()) == list(fingerprints(debug_run).values())[:30]

"""README and docs tell the truth: their commands run, their keys exist, their files are there."""

import contextlib
import gzip
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.tiny_run import descendants, fingerprints, logged_steps, metrics
from titanlite.config import load_config
from titanlite.config.schema import SCHEMA
from titanlite.config.sections import DataConfig
from titanlite.data.corpus import open_corpus
from titanlite.data.mixture import Deck

ROOT = Path(__file__).parent.parent
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
OURS = "\n".join(text for path, text in PAGES.items() if path.stem != "from-torchtitan")
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
    rooms = [ROOT, ROOT / "titanlite", *(ROOT / "titanlite").iterdir()]  # the design names files within their room
    for path in re.findall(
        r"`((?:\./|[\w-]+/)*[\w-]+\.(?:sh|py|md|svg|slurm)|\w+/\w+\.toml)`", "\n".join(PAGES.values())
    ):
        assert any((room / path).exists() for room in rooms), path


def test_every_link_leads_somewhere() -> None:
    """A link to a heading too, as GitHub and mkdocs name it."""
    links = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^):]+)\)", text)]
    assert len(links) > 25
    for page, link in links:
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles], link


@pytest.mark.slow
def test_the_docs_build_without_a_warning(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "promises" / "index.html").exists()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_verb_is_there_with_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"^    python -m (titanlite\.\w+) (.*)$", OURS, re.MULTILINE)
    verbs = ("cache", "show", "parity", "verify", "plan", "generate", "convert")
    assert {name for name, _ in commands} == {f"titanlite.{verb}" for verb in verbs}
    for name, words in commands:
        with contextlib.suppress(SystemExit):
            assert importlib.import_module(f"{name}.__main__").main(["--help"]) == 0
        usage = capsys.readouterr().out
        options = [word for word in shlex.split(words) if word.startswith("--")]
        assert all(option in usage for option in options), (name, options)


def tables(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", OURS, re.MULTILINE | re.DOTALL)


def test_the_loop_runs_and_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (example,) = tables("python")
    *loop, last = example.rstrip().splitlines()
    assert len(loop) <= 13
    names: dict[str, Any] = {}
    exec("\n".join(loop), names)
    tenth, eleventh = names["batch"], eval(last.split("#")[0], names)
    assert names["tokens"].shape == names["labels"].shape == (8, 512)
    assert tenth.row_index.tolist() == list(range(72, 80))
    assert eleventh.row_index.tolist() == list(range(80, 88))
    *_, expected = islice(names["loader"], 11)  # iterating anew begins anew
    assert eleventh.rows.tolist() == expected.rows.tolist()
    names["loader"].close()


def weights_in(toml: str) -> dict[str, float]:
    tables = (table.split("]", 1) for table in toml.split("[data.sources.")[1:])
    return {name: float(re.search(r"^weight = (\S+)", keys, re.MULTILINE)[1]) for name, keys in tables}  # type: ignore[index]


def test_every_toml_example_is_a_valid_configuration(tmp_path: Path) -> None:
    examples = tables("toml")
    for k, example in enumerate(examples):
        (tmp_path / f"{k}.toml").write_text(example)
        config = load_config(["--job.config_file", str(tmp_path / f"{k}.toml")])
        assert {name: source.weight for name, source in config.data.sources.items()} == weights_in(example)
    (weights,) = filter(None, map(weights_in, examples))
    number = int(re.search(r"every deck \(here of (\d+) rows\)", OURS)[1])  # type: ignore[index]
    assert Deck(weights, 0).num_rows == number


def test_formats_are_read_as_the_table_says(tmp_path: Path) -> None:
    """A file of each suffix in the table; the reader that "auto" takes is the table's."""
    table = OURS[OURS.index("| files | a document is |") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    suffixes = {suffix: row for row in rows for suffix in re.findall(r"`(\.[a-z.]+)`", row[0])}
    assert set(suffixes) == {".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"}
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two", "three")).encode()
    zstd = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    for suffix, (_, unit, read) in suffixes.items():
        path = tmp_path / f"a{suffix}"
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two", "three"]}), path)
        else:
            pack = {".jsonl.gz": gzip.compress, ".jsonl.zst": zstd.compress}.get(suffix, bytes)
            path.write_bytes(pack(b"one" if suffix == ".txt" else lines))
        data = DataConfig(paths=(str(path),), cache_dir=str(tmp_path / "cache"))
        manifest = open_corpus(data, ByteTokenizer(), seq_len=4, seed=0).manifest["sources"]["data"]
        assert manifest["num_documents"] == (1 if unit.startswith("a file") else 3), suffix
        assert manifest["reader"] == ("cached" if read.startswith("through the token cache") else "streamed"), suffix


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
    rows, last = logged_steps(debug_run), metrics(debug_run)[-1]
    assert rows[-1]["step"] == last["step"] == 100
    assert last["validation_loss"] < rows[0]["loss"] - 2.5
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
    one, four = logged_steps(tmp_path / "one"), logged_steps(tmp_path / "four")
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

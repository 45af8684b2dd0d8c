"""python -m titanlite.cache: what it writes, what it says, and what a run makes of it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.make_tokenizers import SHIPPED
from tests.support.token_caches import leftovers, shard_files, write_jsonl
from titanlite.cache.__main__ import main
from titanlite.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A mixture of a jsonl file, a compressed one and a text."""
    write_jsonl(tmp_path / "a.jsonl", [f"number {i} is a document" for i in range(50)])
    write_jsonl(tmp_path / "b.jsonl.gz", ["na\u00efve", ""])
    (tmp_path / "c.txt").write_text("a text\n")
    path = tmp_path / "config.toml"
    path.write_text(
        f'[tokenizer]\npath = "{SHIPPED}"\n[data]\ncache_dir = "{tmp_path}/cache"\n'
        f'[data.sources.many]\npaths = ["{tmp_path}/a.jsonl"]\nweight = 0.5\n'
        f'[data.sources.few]\npaths = ["{tmp_path}/b.jsonl.gz", "{tmp_path}/c.txt"]\nweight = 0.5\n'
    )
    return path


def table(output: str) -> dict[str, dict[str, str]]:
    """Rows by source."""
    header, *rows = output.replace("bad records", "bad_records").replace("text bytes", "text_bytes").splitlines()[:-1]
    return {row.split()[0]: dict(zip(header.split(), row.split(), strict=True)) for row in rows}


def test_it_writes_every_source_and_tells_what_they_hold(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--job.config_file", str(config), "--processes", "2"]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == f"token cache: {config.parent}/cache"
    rows = table(output)
    encode = Tokenizer.load(str(SHIPPED)).encode_document
    many = sum(len(encode(f"number {i} is a document")) for i in range(50))
    few = sum(len(encode(text)) for text in ("na\u00efve", "", "a text\n"))
    expected = {"many": ("1", "50", many, 50 * 22 + 40), "few": ("2", "3", few, 6 + 7)}
    for name, (files, documents, tokens, num_bytes) in expected.items():
        row = rows[name]
        assert (row["files"], row["documents"], row["bad_records"]) == (files, documents, "0")
        assert row["tokens"] == f"{tokens:,}"
        assert row["text_bytes"] == f"{num_bytes:,}"
        assert row["bytes/token"] == f"{num_bytes / tokens:.2f}"
        assert int(row["tokens/s"].replace(",", "")) > 0
    written = {path: path.stat().st_mtime_ns for path in shard_files(config.parent)}
    assert len(written) == 2
    assert leftovers(config.parent) == []
    assert main(["--job.config_file", str(config), "--processes=1"]) == 0
    again = table(capsys.readouterr().out)
    assert {path: path.stat().st_mtime_ns for path in shard_files(config.parent)} == written
    assert again["many"]["tokens/s"] == "-"
    assert again["many"]["tokens"] == rows["many"]["tokens"]


def test_bad_records_stop_it_or_are_counted(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (config.parent / "a.jsonl").open("a") as file:
        file.write("{\n")
    arguments = ["--job.config_file", str(config), "--processes", "1"]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert error.startswith(f"titanlite: {config.parent}/a.jsonl:51: bad JSON")
    assert 'data.on_bad_record = "skip"' in error
    assert captured.out == ""
    assert main([*arguments, "--data.on_bad_record", "skip"]) == 0
    assert table(capsys.readouterr().out)["many"]["bad_records"] == "1"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--processes", "0"], "--processes 0: give a number of processes, 1 or more"),
        (["--processes", "two"], "--processes two: give a number of processes, 1 or more"),
        (["--data.cache_dirr", "x"], "did you mean --data.cache_dir?"),
        (["--data.cache_dir", "/dev/null/x"], "data.cache_dir = '/dev/null/x': cannot write"),
        (["--tokenizer.path", "/nowhere"], "tokenizer.path"),
        (["--data.sources.many.paths", "/nowhere/*.txt"], "data.sources.many.paths: /nowhere/*.txt matches no file"),
    ],
)
def test_a_mistake_is_one_line(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    assert main(["--job.config_file", str(config), *arguments]) == 1
    assert problem in capsys.readouterr().err.splitlines()[-1]


def test_help_names_its_option_and_all_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert "python -m titanlite.cache" in output
    assert "--processes int" in output
    assert "--data.cache_dir" in output


def start(config: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "titanlite.cache", "--job.config_file", str(config), *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )


def test_the_command_starts_without_torch_and_ctrl_c_is_one_line(config: Path) -> None:
    texts = ["the quick brown fox jumps over the lazy dog " * 2000] * 400
    (config.parent / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    process = start(config, "--processes", "2")
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert any("shards to" in line for line in lines)
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert "numpy" in maps
    assert "libtorch" not in maps
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    rest = list(lines)
    assert process.wait(30) == 130
    assert rest[-1] == "titanlite: stopped; what was written stays, and the next start goes on from there\n"
    assert not [line for line in rest if "Traceback" in line]
    assert not [name for name in leftovers(config.parent) if name.endswith(".tmp")]
    process.communicate()

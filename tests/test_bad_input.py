"""What a user gets wrong ends in one line that names the key or file, the value and the fix, and in exit code 1."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.make_tokenizers import single_bytes, write_tokenizer
from tests.tiny_run import metrics, write_config
from titanlite.train import main


def write_jsonl(path: Path, lines: list[str]) -> str:
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


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


def test_bad_records_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [json.dumps({"text": "some text that can be read " * 20})] * 30
    lines = [good[0], '{"text": ', good[0], '{"body": 1}', *good]
    paths = [write_jsonl(tmp_path / "x.jsonl", lines)]
    config = write_config(tmp_path, data__paths=paths, data__on_bad_record="skip", data__shuffle=False)
    assert main(["--job.config_file", str(config)]) == 0
    told = capsys.readouterr().err
    assert "x.jsonl:2" in told
    assert "x.jsonl:4" in told
    manifest = json.loads((tmp_path / "run/checkpoint/step-00000008/manifest.json").read_text())
    assert manifest["meta"]["ledger"]["bad_records"] == 2
    assert len(metrics(tmp_path / "run")) == 8


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

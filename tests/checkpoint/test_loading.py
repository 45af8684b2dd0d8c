"""Which checkpoint is meant and what it says, on checkpoints that runs and imports of titanlite wrote."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.gloo import ranks
from tests.support.tiny_run import write_config
from titanlite.checkpoint import CheckpointError, Meta
from titanlite.convert import __main__ as convert
from titanlite.generate import __main__ as generate
from titanlite.loading import find_checkpoint
from titanlite.tokenizer import Tokenizer
from titanlite.train.__main__ import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `python -m titanlite.train`."""
    config = write_config(tmp_path_factory.mktemp("run"), training__steps=2)
    assert ranks(1).run(main, ["--job.config_file", str(config)]) == [0]
    return config.parent / "run"


@pytest.fixture(scope="module")
def swapped(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's tokenizer with two of its ranks swapped: as many ids, of the same special tokens."""
    folder = Path(shutil.copytree(run.parent / "tokenizer", tmp_path_factory.mktemp("other") / "tokenizer"))
    model = folder / "tokenizer.model"
    ranks_of = dict(line.split() for line in model.read_text().splitlines())
    ranks_of["YQ=="], ranks_of["Yg=="] = ranks_of["Yg=="], ranks_of["YQ=="]  # a and b
    model.write_text("".join(f"{token} {rank}\n" for token, rank in ranks_of.items()))
    right, other = (Tokenizer.load(str(path)) for path in (run.parent / "tokenizer", folder))
    assert other.encode("abc").tolist() == right.encode("bac").tolist()
    assert other.vocab_size == right.vocab_size
    return folder


def meta_of(step: Path) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((step / "manifest.json").read_text())["meta"]
    return meta


def test_another_tokenizer_than_the_runs_is_refused(
    run: Path, swapped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    generating = ["--checkpoint", str(run), "--prompt", "the model", "--max_new_tokens=1"]
    exporting = ["to-hf", str(run), str(out)]
    for command, argv in ((generate.main, generating), (convert.main, exporting)):
        assert command([*argv, "--tokenizer", str(swapped)]) == 1
        captured = capsys.readouterr()
        assert f"the tokenizer in '{swapped}' (fingerprint " in captured.err
        assert f"is not the one that {run}/checkpoint/step-00000002 was trained with" in captured.err
        assert captured.out == ""
    assert not out.exists()
    assert generate.main(generating) == 0
    assert convert.main(exporting) == 0


def test_all_that_a_run_and_an_import_say_is_read_again(run: Path, tmp_path: Path) -> None:
    assert convert.main(["to-hf", str(run), str(tmp_path / "hf")]) == 0
    assert convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    for step, tokenizer in (
        (run / "checkpoint/step-00000002", run.parent / "tokenizer"),
        (tmp_path / "ours/step-00000000", tmp_path / "ours/tokenizer"),
    ):
        found = find_checkpoint(str(step), {})
        assert found.path == str(step)
        assert found.meta.to_json() == meta_of(step)
        assert found.meta.tokenizer == Tokenizer.load(str(tokenizer)).fingerprint


def test_what_earlier_versions_wrote_is_read(run: Path) -> None:
    """They had no key for the tokenizer: a run's lay in the cursor, an import's in the corpus."""
    now = meta_of(run / "checkpoint/step-00000002")
    fingerprint = now.pop("tokenizer")
    assert Meta.from_json("x", now).tokenizer == fingerprint[:32]
    imported = {"step": 0, "config": now["config"], "corpus": {"tokenizer": fingerprint}, "imported": "from a folder"}
    assert Meta.from_json("x", imported).tokenizer == fingerprint
    with pytest.raises(CheckpointError, match="^x: its manifest holds no usable config$"):
        Meta.from_json("x", {"step": 1})


def test_of_a_run_the_newest_is_meant_that_has_not_been_refused(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.copytree(copy / "checkpoint/step-00000002", copy / "checkpoint/step-00000007")
    for meant in (copy, copy / "checkpoint"):
        assert find_checkpoint(str(meant), {}).path == str(copy / "checkpoint/step-00000007")
        assert find_checkpoint(str(meant), {}, step=2).path == str(copy / "checkpoint/step-00000002")
    refused: dict[str, str] = {}
    (copy / "checkpoint/step-00000007/manifest.json").unlink()
    assert find_checkpoint(str(copy), refused).path == str(copy / "checkpoint/step-00000002")
    assert list(refused) == [str(copy / "checkpoint/step-00000007")]
    with pytest.raises(CheckpointError, match=r"no valid checkpoint of step 3 \(there are: \[2, 7\]\)"):
        find_checkpoint(str(copy), {}, step=3)

"""`verify checkpoint` passes what a run saved, and names the file where a single bit of it is another."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.checkpoint.test_checkpoint_faults import Planted, seal
from tests.support.gloo import ranks
from tests.support.tiny_run import write_config
from titanlite.checkpoint import audit_checkpoint
from titanlite.train import __main__ as train
from titanlite.verify.__main__ import main

NEWEST = "step-00000004"
FILES = (".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json")


def _train(config: str) -> int:
    return train.main(["--job.config_file", config])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks, with the checkpoints of steps 2 and 4. Copy it."""
    folder = tmp_path_factory.mktemp("run")
    config = write_config(folder, training__steps=4, checkpoint__interval=2, job__description="a run to verify")
    assert ranks(2).run(_train, str(config)) == [0, 0]
    return folder / "run"


@pytest.fixture
def step(run: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint of step 4."""
    shutil.copytree(run / "checkpoint" / NEWEST, tmp_path / NEWEST)
    return tmp_path / NEWEST


def verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["checkpoint", str(folder)])
    told = capsys.readouterr()
    return code, told.out + told.err


def problems(path: Path) -> list[str]:
    return audit_checkpoint(str(path)).problems


def test_what_a_run_saved_passes_and_is_described(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = verify(run / "checkpoint" / NEWEST, capsys)
    assert code == 0
    described = {line.split()[0]: line.split(maxsplit=1)[1] for line in told.splitlines() if line.startswith("  ")}
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert described["run"] == f"{run} a run to verify"
    assert described["step"] == f"4, {last['tokens']:,} target tokens trained"
    assert described["saved"].endswith("Z on dp_replicate 1 x dp_shard 2 x tp 1")
    assert described["by"] == f"format 1, torch {torch.__version__}, python {sys.version.split()[0]}"
    num_tensors = len(dcp.FileSystemReader(run / "checkpoint" / NEWEST).read_metadata().state_dict_metadata)
    size = sum((run / "checkpoint" / NEWEST / name).stat().st_size for name in FILES if name != "manifest.json")
    assert described["holds"] == f"{num_tensors} tensors in 3 files, {size / 1e6:,.1f} MB"
    assert told.splitlines()[-1] == "1 checkpoint: all right"


def test_all_checkpoints_of_a_run_are_checked(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (run, run / "checkpoint"):
        code, told = verify(folder, capsys)
        assert code == 0
        assert [line.rpartition("/")[2] for line in told.splitlines() if line[0] == "/"] == ["step-00000002", NEWEST]
    shutil.copytree(run, tmp_path / "run")
    os.truncate(tmp_path / "run/checkpoint/step-00000002/__1_0.distcp", 100)
    (tmp_path / f"run/checkpoint/{NEWEST}/__0_0.distcp").unlink()
    code, told = verify(tmp_path / "run", capsys)
    assert code == 1
    assert "step-00000002/__1_0.distcp: has 100 bytes, the manifest says" in told
    assert f"{NEWEST}/__0_0.distcp: missing" in told
    assert told.splitlines()[-1] == "2 checkpoints: 2 DAMAGED"


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_file_is_found_by_name(step: Path, name: str) -> None:
    content = (step / name).read_bytes()
    chance = random.Random(name)
    last = 8 * len(content) - 1
    for bit in [0, 7, last - 7, last, *(chance.randrange(last) for _ in range(60))]:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (step / name).write_bytes(flipped)
        found = problems(step)
        assert len(found) == 1, bit
        assert found[0].startswith(f"{step / name}: "), bit
    (step / name).write_bytes(content)
    assert problems(step) == []


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def one_byte_less(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def one_byte_more(file: Path) -> None:
    with open(file, "ab") as stream:
        stream.write(b"\0")


def into_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def link(file: Path) -> None:
    file.rename(file.parent.parent / "elsewhere")
    file.symlink_to(file.parent.parent / "elsewhere")


@pytest.mark.parametrize("damage", [truncate, one_byte_less, one_byte_more, Path.unlink, into_a_folder, link])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_or_missing_file_is_found_by_name(
    step: Path, name: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(step / name)
    code, told = verify(step, capsys)
    assert code == 1
    assert f"  WRONG    {step / name}: " in told
    assert told.count("WRONG") == 1
    assert told.splitlines()[-1] == "1 checkpoint: 1 DAMAGED"


def test_every_problem_is_named_at_once(step: Path) -> None:
    one_byte_less(step / "__0_0.distcp")
    (step / "__1_0.distcp").unlink()
    (step / "notes.txt").write_text("mine")
    moved = step.rename(step.with_name("step-00000005"))
    found = problems(moved)
    assert [problem.split(": ")[0].removeprefix(str(moved)) for problem in found] == [
        "/__0_0.distcp",
        "/__1_0.distcp",
        "/notes.txt",
        "",
    ]
    assert found[2].endswith("notes.txt: not in manifest.json: no file of this checkpoint")
    assert found[3].endswith("manifest.json says that this is step 4: was it renamed?")
    shutil.rmtree(moved)


def test_a_checkpoint_under_another_name_passes(step: Path) -> None:
    assert problems(step.rename(step.with_name("backup of the best"))) == []


def rewrite_metadata(step: Path, change: Callable) -> None:
    """Change DCP's metadata and make a manifest that fits, as a writer with a bug would."""
    metadata = dcp.FileSystemReader(step).read_metadata()
    change(metadata)
    metadata.storage_meta = None
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(step, step=4)


def test_every_tensor_must_be_what_the_metadata_says(step: Path) -> None:
    key = "model.layers.1.attention.wk.weight"

    def another_dtype(metadata: dcp.metadata.Metadata) -> None:
        metadata.state_dict_metadata[key].properties.dtype = torch.float16

    def another_place(metadata: dcp.metadata.Metadata) -> None:
        place = next(p for index, p in metadata.storage_data.items() if index.fqn == key and p.relative_path[2] == "1")
        place.offset += 8

    rewrite_metadata(step, lambda metadata: None)
    assert problems(step) == []
    rewrite_metadata(step, another_dtype)
    found = problems(step)
    assert [problem.split(": ")[0] for problem in found] == [f"{step}/__{rank}_0.distcp" for rank in (0, 1)]
    assert all(f"{key} at byte" in problem and "torch.float16" in problem for problem in found)
    rewrite_metadata(step, another_place)
    assert any(f"__1_0.distcp: {key} at byte" in problem and "cannot be read" in problem for problem in problems(step))


def test_an_object_in_the_place_of_a_tensor_is_refused_and_not_unpickled(step: Path, tmp_path: Path) -> None:
    for content, told in (
        (Planted(str(tmp_path / "proof")), "Weights only load failed"),
        ([1], "is no tensor but a list"),
    ):
        torch.save(content, step / "__1_0.distcp")
        size = (step / "__1_0.distcp").stat().st_size

        def point_at_it(metadata: dcp.metadata.Metadata, size: int = size) -> None:
            for place in metadata.storage_data.values():
                if place.relative_path == "__1_0.distcp":
                    place.offset, place.length = 0, size

        rewrite_metadata(step, point_at_it)
        found = problems(step)
        assert found
        assert all("__1_0.distcp: " in problem and told in problem for problem in found)
    assert not (tmp_path / "proof").exists()


def test_progress_counts_every_byte_and_every_tensor(step: Path) -> None:
    counts: list[int] = []
    audit = audit_checkpoint(str(step), counts.append)
    places = dcp.FileSystemReader(step).read_metadata().storage_data.values()
    assert audit.num_bytes == sum((step / name).stat().st_size for name in FILES if name != "manifest.json")
    assert sum(counts) == audit.num_bytes + sum(place.length for place in places)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["checkpoint"], "takes one folder, not 0 arguments"),
        (["checkpoint", "a", "b"], "takes one folder, not 2 arguments"),
        (["checkpoint", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["checkpiont", "a"], "'checkpiont' is nothing to verify: name one of checkpoint, isolation"),
        ([], "'' is nothing to verify"),
        (["isolation", "--model.dmi=3"], "unknown key --model.dmi: did you mean --model.dim?"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert told in captured.err
    assert captured.err.count("\n") == 1


def test_a_folder_without_checkpoints_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = verify(tmp_path, capsys)
    assert code == 1
    assert f"{tmp_path}/manifest.json: missing, so {tmp_path} is not a complete checkpoint" in told


def test_help_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    script = (
        "import sys; from titanlite.verify.__main__ import main; print(main(['--help'])); print('torch' in sys.modules)"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert told[-2:] == ["0", "False"]
    assert "usage: python -m titanlite.verify checkpoint DIR" in told


def test_no_process_group_and_no_model_is_needed(run: Path) -> None:
    script = (
        "import sys; from titanlite.verify.__main__ import main; import torch.distributed as dist\n"
        "dist.init_process_group = dist.new_group = None\n"
        f"assert main(['checkpoint', {str(run)!r}]) == 0\n"
        "assert not [name for name in sys.modules if name.startswith(('titanlite.model', 'titanlite.parallel'))]"
    )
    subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)

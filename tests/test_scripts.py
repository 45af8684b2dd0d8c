"""The scripts that users start, as far as they go without training: set-up, help, refusals and exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from titanlite.config.schema import SCHEMA

ROOT = Path(__file__).parent.parent
SCRIPTS = ["run_train.sh", "run_tests.sh", ".ci/run", "scripts/environment.sh", "multinode_trainer.slurm"]


def run(
    *command: str | Path, cwd: Path = ROOT, timeout: float = 60, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run with this interpreter as the caller's Python, and without what torchrun or the user may have set."""
    names = ("NGPU", "CONFIG_FILE", "LOG_RANK", "WORLD_SIZE", "RANK", "OMP_NUM_THREADS")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    env = {**clean, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=timeout, env=env)


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax(script: str) -> None:
    assert run("bash", "-n", ROOT / script).stderr == ""
    assert os.access(ROOT / script, os.X_OK) or script in ("scripts/environment.sh", "multinode_trainer.slurm")


def test_ci_runs_the_tests_as_the_readme_says() -> None:
    assert '/../run_tests.sh" "$@"' in (ROOT / ".ci/run").read_text()
    assert ".ci/run" in (ROOT / ".github/workflows/tests.yml").read_text()
    tests = (ROOT / "run_tests.sh").read_text()
    for command in ("ruff check .", "ruff format --check .", "mypy", 'pytest --numprocesses=2 --dist=loadfile "$@"'):
        assert f'"$python" -m {command}\n' in tests


def test_help_is_quick_and_complete_from_any_folder(tmp_path: Path) -> None:
    bare = time.monotonic()
    run(sys.executable, "-c", "pass")
    start = time.monotonic()
    shown = run(ROOT / "run_train.sh", "--training.steps", "3", "--help", cwd=tmp_path)
    seconds, bare = time.monotonic() - start, start - bare
    assert (shown.returncode, shown.stderr) == (0, "")
    assert seconds < bare + 2
    for section, fields in SCHEMA.items():
        for key in fields:
            assert f"--{section}.{key} " in shown.stdout
    for variable in ("NGPU", "CONFIG_FILE", "LOG_RANK", "PYTHON"):
        assert re.search(rf"^  {variable} +\w", shown.stdout, re.MULTILINE)
    assert run(ROOT / "run_train.sh", "-h").stdout == shown.stdout


def test_help_needs_no_installation(tmp_path: Path) -> None:
    """An interpreter without site-packages has no torch, and is enough."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')
    python.chmod(0o755)
    shown = run(ROOT / "run_train.sh", "--help", PYTHON=str(python))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "--optimizer.lr number" in shown.stdout


def test_a_wrong_config_is_told_once_before_torchrun(tmp_path: Path) -> None:
    wrong = run(ROOT / "run_train.sh", "--training.stpes", "5", cwd=tmp_path)
    message = "command line: unknown key --training.stpes: did you mean --training.steps?\n"
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (1, "", message)
    ranks = run(ROOT / "run_train.sh", NGPU="3")
    assert ranks.returncode == 1
    assert re.fullmatch(r"training\.global_batch_size = 8 rows cannot be dealt to 3 .*\n", ranks.stderr)


def test_the_config_file_is_found_from_the_current_folder_first(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[training]\nsteps = 'x'\n")
    mine = run(ROOT / "run_train.sh", cwd=tmp_path, CONFIG_FILE="mine.toml")
    assert mine.stderr == f'{tmp_path}/mine.toml:2: training.steps must be an integer, not "x"\n'
    missing = run(ROOT / "run_train.sh", cwd=tmp_path, CONFIG_FILE="no.toml")
    assert missing.stderr == "job.config_file = 'no.toml': there is no such file\n"


@pytest.mark.parametrize("ngpu", ["0x", "-1", "two", "1.5", "00"])
def test_ngpu_must_be_a_number(ngpu: str) -> None:
    refused = run(ROOT / "run_train.sh", NGPU=ngpu)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert f"NGPU = '{ngpu}'" in refused.stderr


@pytest.mark.parametrize(
    ("visible", "ngpu", "expected"),
    [
        (None, None, "NGPU = 5: only 4 GPUs"),
        ("0,2", None, "NGPU = 5: only 2 GPUs"),
        ("0,-1,2", None, "NGPU = 5: only 1 GPUs"),
        ("GPU-ab,GPU-cd,MIG-e", None, "NGPU = 5: only 3 GPUs"),
        ("", "5", "global_batch_size = 8 rows cannot be dealt to 5"),  # no GPU: as many CPU ranks as wanted
    ],
)
def test_gpus_are_counted_as_cuda_counts_them(
    tmp_path: Path, visible: str | None, ngpu: str | None, expected: str
) -> None:
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: X (UUID: $i)"; done\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NGPU": "5"}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    assert expected in run(ROOT / "run_train.sh", **environment).stderr


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ((3, 8, 10), "is Python 3.8, and titanlite needs 3.10 or newer: set PYTHON to one"),
        ((2, 7, 18), "is Python 2.7, and titanlite needs 3.10 or newer: set PYTHON to one"),
    ],
)
def test_an_old_python_is_refused_in_one_line(tmp_path: Path, version: tuple[int, ...], message: str) -> None:
    """This interpreter, made to say that it is older; and one that does not start; and none."""
    (tmp_path / "usercustomize.py").write_text(f"import sys\nsys.version_info = {version}\n")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.version_info = {version}\n")
    for script in ("run_train.sh", "run_tests.sh"):
        old = run(ROOT / script, PYTHONPATH=str(tmp_path))
        assert (old.returncode, old.stderr) == (1, f"{script}: {sys.executable} {message}\n")


def test_a_missing_python_is_told_in_one_line() -> None:
    missing = run(ROOT / "run_train.sh", PYTHON="no-such-python")
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
    assert "there is no no-such-python: install Python 3.10 or newer" in missing.stderr
    broken = run(ROOT / "run_train.sh", PYTHON="false")
    assert (broken.returncode, broken.stderr.count("\n")) == (1, 1)


# The set-up of .venv, with what pip would install left out: a package without dependencies, and no network


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A copy of what the set-up reads, and an interpreter that has nothing installed."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/environment.sh", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\nversion = '1'\n")
    (tmp_path / "constraints.txt").write_text("")
    (tmp_path / "setup.sh").write_text(
        'set -euo pipefail\nroot=$PWD\n. scripts/environment.sh\nuse_environment json\necho "using $python"\n'
    )
    return tmp_path


def set_up(bare: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    environment = {"PYTHONPATH": "", **environment}  # through which it might find titanlite
    return run("bash", "setup.sh", cwd=bare, PYTHON=str(base), PIP_NO_INDEX="1", **environment)


@pytest.mark.slow
def test_an_interrupted_installation_is_repaired_and_a_finished_one_kept(bare: Path) -> None:
    stamp = bare / ".venv/titanlite-installed"
    failed = set_up(bare)  # the build needs setuptools, and there is no network
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == "setup.sh: the installation failed (see above): start again to repeat it"
    assert failed.stderr.startswith("setup.sh: installing titanlite and torch into .venv")
    kept = bare / ".venv/kept"
    kept.touch()
    set_up(bare)
    assert kept.exists(), "pip takes back what fails: the folder is sound"
    stamp.write_text("unfinished\n")  # as a kill in the middle leaves it
    set_up(bare)
    assert not kept.exists(), "made anew"
    checksum = run("bash", "-c", "cat pyproject.toml constraints.txt | cksum", cwd=bare).stdout.strip()
    stamp.write_text(f"{checksum} {bare}\n")
    assert set_up(bare).stdout == f"using {bare}/.venv/bin/python\n"
    (bare / "constraints.txt").write_text("# changed\n")
    assert "installing" in set_up(bare).stderr


def test_no_venv_module_is_told_in_one_line(bare: Path) -> None:
    (bare / "sitecustomize.py").write_text("import sys\nsys.modules['ensurepip'] = None\n")
    refused = set_up(bare, PYTHONPATH=str(bare))
    assert refused.returncode == 1
    assert refused.stderr.endswith("has no venv module: install it (Debian and Ubuntu: apt install python3-venv)\n")
    assert refused.stderr.count("\n") == 1


# How a run ends


@pytest.mark.parametrize(
    ("state", "torchrun", "asked", "expected"),
    [
        ("finished", 0, "no", 0),
        ("finished", 1, "yes", 0),  # the signal came after the last step
        ("preempted", 0, "yes", 75),
        ("preempted", 1, "no", 75),  # torchrun was signalled too
        ("failed", 1, "yes", 1),
        ("running", 1, "yes", 75),  # killed before it could say so
        ("starting", 1, "yes", 75),
        ("running", 1, "no", 1),
        (None, 0, "no", 0),  # nothing to do: finished before
        (None, 1, "no", 1),
        (None, 1, "yes", 75),  # stopped before the first step
    ],
)
@pytest.mark.parametrize("earlier", [None, "finished", "preempted", "failed"])
def test_exit_code(
    tmp_path: Path, earlier: str | None, state: str | None, torchrun: int, asked: str, expected: int
) -> None:
    """What an earlier run left in status.json says nothing about this one, even in the same words."""
    status = tmp_path / "status.json"

    def write(state: str) -> None:
        (tmp_path / "new").write_text(json.dumps({"state": state, "reason": '"state": "failed"'}, indent=2))
        os.replace(tmp_path / "new", status)

    if earlier:
        write(earlier)
    code = 'before=$(status_mark "$1"); echo; read -r; run_exit_code "$1" "$before" $2 $3'
    command = ["bash", "-euc", f". {ROOT}/scripts/environment.sh; {code}", "bash", str(status), str(torchrun), asked]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout
        assert shell.stdout.readline() == "\n"  # the run begins
        if state:
            write(state)
        out, _ = shell.communicate("\n")
    assert out == f"{expected}\n"

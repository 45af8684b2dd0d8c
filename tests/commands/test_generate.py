"""python -m titanlite.generate on checkpoints that 2 x 2 ranks saved: alone, under tensor parallelism, and in error."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.test_decode import without_cache
from tests.support.cases import some_quick
from tests.support.gloo import ranks
from tests.support.make_tokenizers import single_bytes, write_tokenizer
from tests.support.tiny_run import state_of, text, write_config
from titanlite.checkpoint import Checkpointer, CheckpointError, Meta, read_manifest
from titanlite.config import Config, load_config
from titanlite.generate import __main__ as generate
from titanlite.generate.__main__ import main
from titanlite.loading import Found, config_of, load_model
from titanlite.model.documents import Examples
from titanlite.model.transformer import Llama
from titanlite.parallel.mesh import build_mesh
from titanlite.tokenizer import Tokenizer
from titanlite.trainer import Trainer

ROOT = Path(__file__).parents[2]
PROMPTS = ["the model", "a", text(3)[:150]]
SCALED = {"model__rope_scaling_factor": 4.0, "model__rope_original_max_seq_len": 32}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"model__tie_embeddings": True, "training__dtype": "float64"},
    "biases-scaled": {"model__attention_bias": True, "model__mlp_bias": True, **SCALED},
}


def save(config_file: str, shard: int, tp: int, ends: bool = True) -> None:
    """Two training steps, with a checkpoint as a job writes it after each. Unless it `ends`, eos has a logit of 0."""
    config = load_config(["--job.config_file", config_file])
    tokenizer = Tokenizer.load(config.tokenizer.path)
    trainer = Trainer(config, build_mesh("cpu", 1, shard, tp))
    folder = str(Path(config.job.dump_folder) / "checkpoint")
    checkpointer = Checkpointer(folder, keep_latest_k=0, async_save=False)
    for step in (1, 2):
        rows = torch.randint(256, (2, 65), generator=torch.Generator().manual_seed(trainer.mesh.dp_rank))
        trainer.train_step(Examples.by_eos(rows, tokenizer.eos_id), 4 * 64)
        if not ends:  # on one rank, whose part is the whole
            trainer.model.output.weight.detach().to_local()[tokenizer.eos_id] = 0.0  # type: ignore[attr-defined]
        meta = Meta(step, asdict(config), tokenizer.fingerprint)
        checkpointer.save(step, trainer.state(), meta.to_json())
    checkpointer.wait()


def saved(folder: Path, variant: str) -> Path:
    """The run folder."""
    options = {"model__vocab_size": 258, "model__init_std": 0.3, "training__local_batch_size": 2, **VARIANTS[variant]}
    config = write_config(folder, **options)
    ranks(4).run(save, str(config), 2, 2)
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("plain"), "plain")


def arguments(run: Path, *more: str, prompts: list[str] = PROMPTS) -> list[str]:
    given = [part for prompt in prompts for part in ("--prompt", prompt)]
    return ["--checkpoint", str(run), *given, "--max_new_tokens=20", "--dtype=float64", *more]


def printed(*argv: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(list(argv)) == 0
    return out.getvalue()


def plain_model(run: Path, scratch: Path) -> Llama:
    """In float64, from tensors that torch alone read."""
    config = load_config(["--job.config_file", str(run.parent / "config.toml")])
    state = state_of(run / "checkpoint" / "step-00000002", scratch)
    weights = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
    model = Llama(config.model).double()
    if config.model.tie_embeddings:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    model.load_state_dict(weights, strict=True)
    return model


@pytest.mark.parametrize("variant", some_quick(VARIANTS, "plain"))
def test_a_checkpoint_of_4_ranks_gives_the_same_tokens_on_1_and_on_2(variant: str, tmp_path: Path) -> None:
    run = saved(tmp_path, variant)
    alone = printed(*arguments(run, "--json"))
    first, second = ranks(2).run(printed, *arguments(run, "--json"))
    assert (first, second) == (alone, "")
    model = plain_model(run, tmp_path)
    made = [json.loads(line) for line in alone.splitlines()]
    for prompt, one in zip(PROMPTS, made, strict=True):
        prompt_ids = Tokenizer.load(str(tmp_path / "tokenizer")).encode_document(prompt)[:-1].tolist()
        ids, _ = without_cache(model, prompt_ids, 20)
        kept = ids[: ids.index(257)] if 257 in ids else ids
        assert one["tokens"] == kept
        assert one["finish"] == ("eos" if 257 in ids else "length")
        assert one["num_prompt_tokens"] == len(prompt) + 1
    drawing = ("--json", "--temperature=1.2", "--top_k=50", "--top_p=0.95", "--seed=3")
    drawn = printed(*arguments(run, *drawing))
    assert drawn != alone
    assert ranks(2).run(printed, *arguments(run, *drawing))[0] == drawn
    assert printed(*arguments(run, *drawing, "--batch_size=1")) == drawn
    (last,) = printed(*arguments(run, *drawing, prompts=PROMPTS[2:])).splitlines()
    assert drawn.splitlines()[2] == last


def weights_on(run: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    degree = torch.distributed.get_world_size()
    model = load_model(run, build_mesh("cpu", 1, 1, degree), dtype).model
    assert not any(p.requires_grad for p in model.parameters())
    return {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in model.named_parameters()}


def test_weights_are_those_of_the_checkpoint_in_the_asked_type(run: Path, tmp_path: Path) -> None:
    state = state_of(run / "checkpoint" / "step-00000002", tmp_path)
    for dtype in (None, torch.bfloat16):
        for found in (*ranks(1).run(weights_on, str(run), dtype), *ranks(2).run(weights_on, str(run), dtype)):
            assert {f"model.{name}" for name in found} == {name for name in state if name.startswith("model.")}
            for name, weight in found.items():
                assert torch.equal(weight, state[f"model.{name}"].to(dtype or torch.float32))


def test_no_optimiser_state_is_read_and_nothing_in_the_run_changes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    load = Checkpointer.load
    monkeypatch.setattr(
        Checkpointer, "load", lambda self, path, t, prefix: asked.extend(t) or load(self, path, t, prefix)
    )
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    printed(*arguments(run))
    assert asked
    assert all(name.startswith("model.") for name in asked)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_the_command_prints_json_and_its_speed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"prompt": "two\\nlines"}\n"\\u00e9"\n')
    step = run / "checkpoint" / "step-00000002"
    command = [sys.executable, "-m", "titanlite.generate", *arguments(step, "--json", prompts=["a"])]
    result = subprocess.run(
        [*command, "--prompt-file", str(tmp_path / "more.jsonl")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    made = [json.loads(line) for line in result.stdout.splitlines()]
    assert [one["prompt"] for one in made] == ["a", "two\nlines", "\u00e9"]
    assert (
        result.stdout.splitlines()
        == printed(*arguments(run, "--json", prompts=["a", "two\nlines", "\u00e9"])).splitlines()
    )
    last = result.stderr.splitlines()[-1]
    num_new = sum(len(one["tokens"]) + (one["finish"] == "eos") for one in made)
    assert last.startswith(f"titanlite: {num_new} new tokens in ")
    assert "tokens/s (of the time, 15 tokens of prompts took " in last


def test_tokens_stream_and_a_closed_pipe_ends_it(tmp_path: Path) -> None:
    """A million tokens would take minutes: what comes early was streamed."""
    config = write_config(tmp_path, model__init_std=0.3)
    ranks(1).run(save, str(config), 1, 1, ends=False)
    command = [sys.executable, "-m", "titanlite.generate", "--checkpoint", str(tmp_path / "run"), "--prompt", "the m"]
    command += ["--max_new_tokens", "1000000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5) == b"the m"
        while (line := process.stderr.readline()) and b"tokens, with the longest prompt" not in line:
            pass
        assert b"up to 1000006 tokens, with the longest prompt and --max_new_tokens 1000000, are more than" in line
        assert process.stdout.read(5)
        process.stdout.close()
        assert process.wait() == 0
        assert process.stderr.read() == b""


def test_a_run_folder_means_its_newest_valid_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    first = printed(*arguments(run / "checkpoint" / "step-00000001"))
    second = printed(*arguments(run / "checkpoint" / "step-00000002"))
    assert first != second
    assert printed(*arguments(copied)) == printed(*arguments(copied / "checkpoint")) == second
    damaged = copied / "checkpoint" / "step-00000002"
    flip(max(damaged.glob("*.distcp"), key=lambda path: path.stat().st_size))
    for folder in (copied, copied / "checkpoint"):
        assert printed(*arguments(folder)) == first
        assert f"checkpoint {damaged} is damaged and passed over: " in capsys.readouterr().err
    (damaged / "manifest.json").unlink()
    assert printed(*arguments(copied)) == first
    assert sorted(os.listdir(copied / "checkpoint")) == ["step-00000001", "step-00000002"]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def failed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of ours on standard error, the log apart."""
    capsys.readouterr()
    assert main(list(argv)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("titanlite: ")]
    assert "Traceback" not in err
    return line


def test_a_checkpoint_that_cannot_be_used_is_named_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failed(capsys, *arguments(tmp_path / "none")).startswith(f"titanlite: {tmp_path}/none: no such folder")
    (tmp_path / "empty").mkdir()
    told = failed(capsys, *arguments(tmp_path / "empty"))
    assert told.startswith(f"titanlite: {tmp_path}/empty: no valid checkpoint: ")
    assert "manifest.json: missing" in told
    damaged = tmp_path / "step-00000001"
    shutil.copytree(run / "checkpoint" / "step-00000001", damaged)
    shard = next(damaged.glob("*.distcp"))
    flip(shard)
    told = failed(capsys, *arguments(damaged))
    assert str(shard) in told
    assert "has checksum" in told


def test_a_tokenizer_that_does_not_fit_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    special = {"<|begin|>": 256, "<|end|>": 257}
    other = write_tokenizer(tmp_path / "other", single_bytes(), special, bos_token="<|begin|>", eos_token="<|begin|>")
    told = failed(capsys, *arguments(run, "--tokenizer", str(other)))
    assert f"the tokenizer in '{other}' (fingerprint " in told
    assert "is not the one that" in told
    told = failed(capsys, *arguments(run, "--tokenizer", str(tmp_path / "gone")))
    assert "No such file or directory" in told
    assert told.endswith("or name the folder of the run's tokenizer with --tokenizer")
    assert printed(*arguments(run, "--tokenizer", str(run.parent / "tokenizer"))) == printed(*arguments(run))


def refusal(*argv: str) -> tuple[int, str]:
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = main(list(argv))
    return code, err.getvalue()


def test_ranks_that_cannot_share_the_heads_are_told_how_many_can(run: Path) -> None:
    (code, told), *others = ranks(4).run(refusal, *arguments(run))
    assert code == 1
    assert "4 ranks do not divide model.n_kv_heads = 2" in told
    assert told.splitlines()[-1].endswith("start 1 or 2")
    assert [code for code, _ in others] == [1, 1, 1]
    assert not any("titanlite: " in said for _, said in others)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "the following arguments are required: --checkpoint"),
        (["--checkpoint", "x"], "nothing to continue: give --prompt TEXT or --prompt_file FILE"),
        (["--checkpoint", "x", "--prompt", "a", "--topk", "3"], "unrecognized arguments: --topk 3"),
        (
            ["--checkpoint", "x", "--prompt", "a", "--max_new_tokens", "0"],
            "--max_new_tokens 0: give a number from 1 on",
        ),
        (["--checkpoint", "x", "--prompt", "a", "--batch_size", "x"], "argument --batch_size: invalid int value: 'x'"),
        (["--checkpoint", "x", "--prompt", "a", "--temperature", "nan"], "--temperature nan: give a finite number"),
        (["--checkpoint", "x", "--prompt", "a", "--temperature", "-1"], "--temperature -1.0: give a finite number"),
        (["--checkpoint", "x", "--prompt", "a", "--top_p", "0"], "--top_p 0.0: give a probability above 0"),
        (["--checkpoint", "x", "--prompt", "a", "--top_k", "5"], "--top_k 5 has no effect on greedy choice"),
        (["--checkpoint", "x", "--prompt", "a", "--seed", "0"], "--seed 0 has no effect on greedy choice"),
        (["--checkpoint", "x", "--prompt", "a", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--checkpoint", "x", "--prompt_file", "none.txt"], "--prompt_file none.txt: No such file or directory"),
    ],
)
def test_a_mistake_in_the_command_line_is_one_line(
    argv: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = failed(capsys, *argv)
    assert told in line


def test_help_explains_every_option_without_torch() -> None:
    program = "import sys; from titanlite.generate.__main__ import main\n"
    program += "try: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    for option in ("checkpoint", "prompt", "prompt_file", "max_new_tokens", "temperature", "top_k", "top_p", "seed"):
        assert f"--{option} " in result.stdout
    for option in ("json", "dtype", "device", "tokenizer", "batch_size"):
        assert f"--{option}" in result.stdout


def test_the_tokenizers_pad_changes_nothing(tmp_path: Path) -> None:
    """No pad, pad == eos, and one of its own, which prompts of three lengths are never padded with in any case."""
    special = {"<|begin|>": 256, "<|end|>": 257, "<|pad|>": 258}
    outputs = set()
    for number, pad in enumerate([{}, {"pad_token": "<|end|>"}, {"pad_token": "<|pad|>"}]):
        folder = tmp_path / str(number)
        names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", **pad}
        write_tokenizer(folder / "tokenizer", single_bytes(), special, **names)
        ranks(1).run(save, str(write_config(folder, model__init_std=0.3)), 1, 1)
        outputs.add(printed(*arguments(folder / "run")))
    assert len(outputs) == 1


def test_a_config_is_read_as_far_as_this_version_knows_it(run: Path) -> None:
    def of(saved: dict[str, Any]) -> Config:
        return config_of(Found("x", Meta(1, saved)))

    saved_config = read_manifest(str(run / "checkpoint" / "step-00000001"))["meta"]["config"]
    written = load_config(["--job.config_file", str(run.parent / "config.toml")])
    assert of(saved_config) == written
    newer = json.loads(json.dumps(saved_config))
    newer["training"]["of_later"], newer["later"] = 1, {"key": "value"}
    del newer["metrics"]
    assert of(newer).model == written.model
    newer["model"]["of_later"] = True
    for saved, told in (
        (newer, "x: its config has model.of_later, which this titanlite does not know"),
        ({}, "x: its manifest holds no usable config"),
        ({**saved_config, "model": {"dim": "wide"}}, "x: its manifest holds no usable config"),
    ):
        with pytest.raises(CheckpointError, match=told):
            of(saved)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nand more"), 1, "titanlite: CUDA out of memory. Use a smaller"),
        (KeyboardInterrupt(), 130, "\ntitanlite: interrupted"),
    ],
    ids=["memory", "interrupt"],
)
def test_what_ends_it_is_told(
    error: BaseException, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: Any) -> None:
        raise error

    monkeypatch.setattr(generate, "run", run)
    assert main(["--checkpoint", "x", "--prompt", "y"]) == code
    assert capsys.readouterr().err.startswith(told)


@pytest.mark.slow
def test_what_run_train_trained_on_2_x_2_ranks_generates(tmp_path: Path) -> None:
    config = write_config(tmp_path, training__steps=4)
    environment = {
        **os.environ,
        "NGPU": "4",
        "CONFIG_FILE": str(config),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    degrees = ["--parallelism.tensor_parallel_degree", "2", "--parallelism.data_parallel_shard_degree", "2"]
    subprocess.run(["./run_train.sh", *degrees], cwd=ROOT, env=environment, check=True, capture_output=True)
    for_two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    outputs = [
        subprocess.run(
            [*start, "-m", "titanlite.generate", *arguments(tmp_path / "run", "--json")],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for start in ([sys.executable], for_two)
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0].splitlines()) == len(PROMPTS)

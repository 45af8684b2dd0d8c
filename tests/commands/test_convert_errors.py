"""What titanlite.convert refuses, in one line and leaving nothing behind: hostile, damaged and foreign folders."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands.test_convert import convert, random_llama
from tests.commands.test_generate import save
from tests.support.gloo import ranks
from tests.support.tiny_run import write_config
from titanlite.convert import safetensors
from titanlite.convert.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    ranks(1).run(save, str(write_config(folder, training__local_batch_size=2)), 1, 1)
    return folder / "run"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of several shards."""
    folder = tmp_path_factory.mktemp("hf") / "hf"
    random_llama(folder)
    return folder


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "hf"))


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one line."""
    assert main([str(word) for word in argv]) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("[rank")]
    assert captured.out == ""
    assert len(lines) == 1, lines
    assert lines[0].startswith("titanlite: ")
    return lines[0]


def config_of(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))


def rope(**changes: Any) -> dict[str, Any]:
    whole = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_parameters": whole | {"original_max_position_embeddings": 32} | changes}


CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown keys": (
        {"sliding_window": 128, "qk_norm": True},
        ["sliding_window = 128: not understood", "qk_norm = True: not understood"],
    ),
    "quantised": ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    "code of its own": ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, ["auto_map"]),
    "another architecture": ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, ["Qwen2", "model_type"]),
    "another activation": ({"hidden_act": "gelu"}, ["hidden_act = 'gelu'"]),
    "head_dim": ({"head_dim": 16}, ["q_proj.weight has shape [32, 32] instead of [64, 32]"]),
    "heads": ({"num_key_value_heads": 3}, ["n_kv_heads = 3 does not divide"]),
    "no size": ({"hidden_size": None}, ["no hidden_size"]),
    "a size that is a text": ({"hidden_size": "32"}, ["hidden_size = '32': must be int"]),
    "yarn": (rope(rope_type="yarn"), ["rope_type = 'yarn'"]),
    "a rope key": (rope(beta_fast=32), ["rope: beta_fast = 32: not understood"]),
    "half a scaling": (rope(factor=None), ["no rope: factor"]),
    "partial rotary": (rope(partial_rotary_factor=0.5), ["partial_rotary_factor = 0.5"]),
    "other shapes": ({"intermediate_size": 64}, ["mlp.up_proj.weight has shape [48, 32] instead of [64, 32]"]),
    "fewer layers": ({"num_hidden_layers": 1}, ["model.layers.1.mlp.up_proj.weight is not expected"]),
    "more layers": ({"num_hidden_layers": 3}, ["model.layers.2.mlp.up_proj.weight is missing"]),
    "not tied": ({"tie_word_embeddings": False}, ["lm_head.weight is missing"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_titanlite_is_not(name: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, told = CONFIGS[name]
    config_of(copy, **changes)
    line = refused(capsys, "from-hf", copy, copy.parent / "out")
    assert all(part in line for part in told), line
    assert os.listdir(copy.parent) == ["hf"]


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def garble_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = first_shard(folder).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    first_shard(folder).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def some(header: dict[str, Any]) -> dict[str, Any]:
    return header[sorted(name for name in header if name != "__metadata__")[0]]


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    content = json.loads((folder / safetensors.INDEX).read_text())
    change(content["weight_map"])
    (folder / safetensors.INDEX).write_text(json.dumps(content))


def set_tied_head(folder: Path) -> None:
    tensors = load_file(first_shard(folder))
    save_file(tensors | {"lm_head.weight": torch.zeros(260, 32)}, first_shard(folder), {"format": "pt"})
    change_index(folder, lambda index: index.update({"lm_head.weight": first_shard(folder).name}))


def only_pickles(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(folder.parent / "ran"))))


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickles only": (
        only_pickles,
        "its weights are pickled (pytorch_model.bin), and reading a pickle can run any code",
    ),
    "a pickle under a safe name": (
        lambda f: first_shard(f).write_bytes(pickle.dumps(Bomb(str(f.parent / "ran"))) * 9),
        "no safetensors file",
    ),
    "cut short": (lambda f: os.truncate(first_shard(f), first_shard(f).stat().st_size - 4), "cut short"),
    "nearly empty": (lambda f: first_shard(f).write_bytes(b"\x01"), "cut short"),
    "a huge header": (lambda f: first_shard(f).write_bytes(b"\xff" * 64), "do not hold a header"),
    "no JSON": (lambda f: first_shard(f).write_bytes(b"\x08" + b"\0" * 7 + b"[[[[[[[["), "Expecting value"),
    "overlapping tensors": (
        lambda f: garble_header(f, lambda h: h.update(twin=some(h))),
        "overlap or leave a gap",
    ),
    "offsets that lie": (lambda f: garble_header(f, lambda h: some(h).update(data_offsets=[0, 4])), "its shape"),
    "negative offsets": (lambda f: garble_header(f, lambda h: some(h).update(data_offsets=[-4, 4])), "garbled"),
    "a quantised tensor": (lambda f: garble_header(f, lambda h: some(h).update(dtype="I8")), "'I8'"),
    "no offsets": (lambda f: garble_header(f, lambda h: some(h).pop("data_offsets")), "garbled"),
    "a missing shard": (lambda f: first_shard(f).unlink(), "No such file"),
    "a path out": (
        lambda f: change_index(f, lambda index: index.update({"model.norm.weight": "../x.safetensors"})),
        "'../x.safetensors', which is no file of this folder",
    ),
    "an index that lies": (
        lambda f: change_index(f, lambda index: index.update({"model.norm.weight": first_shard(f).name})),
        "model.norm.weight is in",
    ),
    "a tensor beyond the index": (
        lambda f: change_index(f, lambda index: index.pop("model.norm.weight")),
        "nothing of",
    ),
    "an index that is a list": (lambda f: (f / safetensors.INDEX).write_text("[1]"), "no index of weights"),
    "another tied head": (set_tied_head, "lm_head.weight is not model.embed_tokens.weight"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "merge it into its base"),
    "a config that is no object": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "a config of brackets": (lambda f: (f / "config.json").write_text("[" * 100_000), "not JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_do_not_fit_or_could_run(name: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, told = FILES[name]
    damage(copy)
    assert told in refused(capsys, "from-hf", copy, copy.parent / "out")
    assert os.listdir(copy.parent) == ["hf"]  # nothing was written, and nothing ran


def test_code_in_a_folder_is_not_run(copy: Path, tmp_path: Path) -> None:
    """Python files and pickles that lie beside good weights, as a downloaded folder may have them."""
    for name in ("modeling_llama.py", "configuration_llama.py", "tokenization.py", "generate.py"):
        (copy / name).write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    (copy / "custom_generate").mkdir()
    (copy / "custom_generate" / "generate.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(tmp_path / "ran"))))
    (copy / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization.T", null]}}')
    convert("from-hf", copy, tmp_path / "ours")
    assert sorted(os.listdir(tmp_path)) == ["hf", "ours"]


def test_checkpoints_that_cannot_be_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "no such folder" in refused(capsys, "to-hf", tmp_path / "absent", out)
    damaged = Path(shutil.copytree(run / "checkpoint" / "step-00000002", tmp_path / "damaged"))
    file = next(damaged.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert re.search(r"distcp: has checksum \w+, the manifest says", refused(capsys, "to-hf", damaged, out))
    assert "--tokenizer" in refused(capsys, "to-hf", run, out, "--tokenizer", tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["damaged"]
    out.mkdir()
    assert "exists already" in refused(capsys, "to-hf", run, out)
    assert "no such folder: make it" in refused(capsys, "to-hf", run, tmp_path / "absent" / "out")


def test_a_comparison_that_fails_leaves_nothing(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that are no numbers have no logits to compare."""
    tensors = load_file(first_shard(copy))
    next(iter(tensors.values())).fill_(torch.nan)
    save_file(tensors, first_shard(copy), {"format": "pt"})
    line = refused(capsys, "from-hf", copy, copy.parent / "out")
    assert "differ by up to nan" in line
    assert os.listdir(copy.parent) == ["hf"]


def test_command_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, told in (
        ([], "required"),
        (["to-hf", "x"], "required: OUT"),
        (["to-gguf", "x", "y"], "invalid choice"),
        (["to-hf", "x", "y", "--shard_size=big"], "'big' is no size"),
        (["to-hf", "x", "y", "--shard_size=0"], "'0' is no size"),
        (["to-hf", "x", "y", "--dtype=int8"], "invalid choice"),
        (["from-hf", str(tmp_path / "absent"), "y"], "no such folder"),
    ):
        assert told in refused(capsys, *argv)
    for argv in (["--help"], ["to-hf", "--help"], ["from-hf", "--help"]):
        with pytest.raises(SystemExit, match="^0$"):
            main(argv)
    assert "(default: 5GB)" in capsys.readouterr().out


WITHOUT = """
import sys
from importlib.machinery import PathFinder
class Nowhere:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "tokenizers", "safetensors", "huggingface_hub"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Nowhere)
import importlib.util
find_spec = importlib.util.find_spec
def none(name, package=None):
    try:
        return find_spec(name, package)
    except ModuleNotFoundError:
        return None
importlib.util.find_spec = none
from titanlite.convert.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_it_works_without_hugging_faces_packages(run: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for argv in (["to-hf", str(run), "hf"], ["from-hf", "hf", "ours"]):
        command = [sys.executable, "-W", "error", "-c", WITHOUT, *argv]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert "computed by titanlite's own reader" in result.stdout
        assert "tokenizers package is not installed" in result.stdout
    convert("to-hf", tmp_path / "ours", tmp_path / "again", "--check=transformers")
    for name in os.listdir(tmp_path / "hf"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()

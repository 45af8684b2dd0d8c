"""python -m titanlite.convert on checkpoints that 2 x 2 ranks saved and on random LLaMAs of transformers, which share
no line with ours: logits, text, loss, gradients and bits."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.commands.test_generate import plain_model, save
from tests.model.test_hugging_face import rotate_pairs
from tests.support.cases import some_quick
from tests.support.gloo import ranks
from tests.support.tiny_run import metrics, state_of, text, write_config
from titanlite.checkpoint import Checkpointer, audit_checkpoint, read_manifest
from titanlite.config import load_config
from titanlite.convert.__main__ import main
from titanlite.generate import __main__ as generate
from titanlite.model.attention import build_documents
from titanlite.model.documents import IGNORE_INDEX, Examples, labels
from titanlite.parallel.mesh import build_mesh
from titanlite.tokenizer import Tokenizer
from titanlite.train import __main__ as train
from titanlite.trainer import Trainer

ROOT = Path(__file__).parents[2]
VARIANTS: dict[str, dict[str, Any]] = {
    "padded-vocabulary": {"model__vocab_size": 272},
    "tied": {"model__tie_embeddings": True},
    "biases-scaled": {
        "model__attention_bias": True,
        "model__mlp_bias": True,
        "model__head_dim": 12,
        "model__rope_scaling_factor": 4.0,
        "model__rope_original_max_seq_len": 32,
    },
}


def convert(*argv: str | Path) -> str:
    """What it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(word) for word in argv]) == 0
    return out.getvalue()


def saved(folder: Path, variant: str) -> Path:
    """The run folder of two steps on 2 x 2 ranks."""
    options = {"model__vocab_size": 258, "model__init_std": 0.2, "training__local_batch_size": 2, **VARIANTS[variant]}
    ranks(4).run(save, str(write_config(folder, **options)), 2, 2)
    return folder / "run"


@pytest.fixture(scope="module", params=some_quick(VARIANTS, "padded-vocabulary"))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    """Of the run, in several files."""
    told = convert("to-hf", run, run.parent / "hf", "--shard_size=40KB")
    assert "transformers 5" in told
    assert "tokenizers 0" in told
    return run.parent / "hf"


def opened(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer, as anyone opens them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def test_a_checkpoint_of_4_ranks_has_the_same_logits_in_transformers(run: Path, exported: Path, tmp_path: Path) -> None:
    theirs, tokenizer = opened(exported)
    ids = tokenizer(" ".join(map(text, range(10)))).input_ids[:1000]
    rows = torch.tensor(ids).view(20, 50)
    ours = plain_model(run, tmp_path).float()  # put together by torch alone
    wanted = ours.output(ours(rows, build_documents(rows, 257, "dense")))
    assert len(ids) == 1000
    assert wanted.abs().max() > 0.5
    assert (theirs(rows).logits - wanted).abs().max() < 1e-5
    assert len(list(exported.glob("model-*.safetensors"))) > 2
    assert theirs.dtype == torch.float32


def test_greedy_text_is_the_same(run: Path, exported: Path) -> None:
    theirs, tokenizer = opened(exported)
    prompt = tokenizer(text(3)[:60], return_tensors="pt")
    out = theirs.generate(**prompt, max_new_tokens=200, do_sample=False, pad_token_id=0)
    wanted = out[0, prompt.input_ids.shape[1] :].tolist()
    printed = io.StringIO()
    argv = ["--checkpoint", str(run), "--prompt", text(3)[:60], "--max_new_tokens=200", "--json", "--dtype=float32"]
    with contextlib.redirect_stdout(printed):
        assert generate.main(argv) == 0
    made = json.loads(printed.getvalue())
    assert made["tokens"] == wanted[: len(made["tokens"])]
    assert len(made["tokens"]) == 200 or wanted[len(made["tokens"])] == 257


def test_there_and_back_is_the_same_bit_for_bit(run: Path, exported: Path, tmp_path: Path) -> None:
    told = convert("from-hf", exported, tmp_path / "back")
    step = tmp_path / "back" / "step-00000000"
    before, after = state_of(run / "checkpoint" / "step-00000002", tmp_path), state_of(step, tmp_path)
    weights = {name for name in before if name.startswith("model.")}
    assert set(after) == weights
    assert all(torch.equal(before[name], after[name]) for name in weights)
    assert audit_checkpoint(str(step)).problems == []
    assert sorted(os.listdir(tmp_path / "back")) == ["config.toml", "step-00000000", "tokenizer"]
    toml = (tmp_path / "back" / "config.toml").read_text()
    assert toml in told
    config = load_config(["--job.config_file", str(tmp_path / "back" / "config.toml")])
    assert config.model == load_config(["--job.config_file", str(run.parent / "config.toml")]).model
    fingerprints = [Tokenizer.load(str(run.parent / "tokenizer")).fingerprint, Tokenizer.load(config.tokenizer.path)]
    assert fingerprints[0] == fingerprints[1].fingerprint  # type: ignore[union-attr]
    argv = ["--prompt", "the model", "--max_new_tokens=20", "--checkpoint"]
    texts = [io.StringIO(), io.StringIO()]
    for printed, checkpoint in zip(texts, (run, tmp_path / "back"), strict=True):
        with contextlib.redirect_stdout(printed):
            assert generate.main([*argv, str(checkpoint)]) == 0
    assert texts[0].getvalue() == texts[1].getvalue()


def test_weight_files_are_what_the_library_reads(exported: Path) -> None:
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    seen: dict[str, Tensor] = {}
    for file in exported.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stream:
            for name in list(stream.keys()):
                seen[name] = stream.get_tensor(name)
                assert index["weight_map"][name] == file.name
        assert file.stat().st_size < 42_000
    assert set(index["weight_map"]) == set(seen)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in seen.values())


@pytest.mark.parametrize("check", ["transformers", "streamed"])
def test_bfloat16_is_the_rounded_checkpoint(run: Path, check: str, tmp_path: Path) -> None:
    told = convert("to-hf", run / "checkpoint" / "step-00000001", tmp_path / "hf", "--dtype=bfloat16", "--check", check)
    assert "both rounded to bfloat16" in told
    assert ("own reader" in told) == (check == "streamed")
    before = state_of(run / "checkpoint" / "step-00000001", tmp_path)
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="pt") as file:
        down, query = (
            file.get_tensor(f"model.layers.1.{name}.weight") for name in ("mlp.down_proj", "self_attn.q_proj")
        )
    assert torch.equal(down, before["model.layers.1.feed_forward.w2.weight"].bfloat16())
    assert torch.equal(query, rotate_pairs(before["model.layers.1.attention.wq.weight"].bfloat16(), 4))
    assert opened(tmp_path / "hf")[0].dtype == torch.bfloat16


def random_llama(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters=rope,
        tie_word_embeddings=True,
        initializer_range=0.3,
        rms_norm_eps=2e-5,
        **options,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(p, 1.0, 0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size="30KB")
    return model


def loss_and_gradients(config_file: str, rows: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Of one training step from checkpoint.init_from."""
    config = load_config(["--job.config_file", config_file])
    trainer = Trainer(config, build_mesh("cpu", 1, 2, 1))
    state = {name: tensor for name, tensor in trainer.state().items() if name.startswith("model.")}
    Checkpointer(config.job.dump_folder, keep_latest_k=0, async_save=False).load(
        config.checkpoint.init_from, state, prefix="model."
    )
    gradients: dict[str, Tensor] = {}

    def keep() -> None:
        for name, p in trainer.model.named_parameters():
            assert isinstance(p.grad, DTensor)
            gradients[name] = p.grad.full_tensor()

    trainer.on_gradients = keep
    num_targets = int((labels(rows, 257) >= 0).sum())
    mine = rows[trainer.mesh.dp_rank :: 2]
    return trainer.train_step(Examples.by_eos(mine, 257), num_targets).loss.item(), gradients


def test_a_random_llama_trains_with_the_loss_and_gradients_of_transformers(tmp_path: Path) -> None:
    theirs = random_llama(tmp_path / "hf", attention_bias=True, mlp_bias=True)
    told = convert("from-hf", tmp_path / "hf", tmp_path / "ours")
    assert "no tokenizer" in told
    written = load_config(["--job.config_file", str(tmp_path / "ours" / "config.toml")])
    model = {f"model__{key}": value for key, value in vars(written.model).items()}
    init_from = written.checkpoint.init_from
    config = write_config(tmp_path / "run", **model, checkpoint__init_from=init_from, training__local_batch_size=2)
    rows = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(0))
    (loss, gradients), _ = ranks(2).run(loss_and_gradients, str(config), rows)
    logits = theirs(rows[:, :-1]).logits
    wanted = F.cross_entropy(logits.flatten(0, 1), labels(rows, 257).flatten(), ignore_index=IGNORE_INDEX)
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-6)
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    pairs = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "layers.1.attention.wv.bias": "model.layers.1.self_attn.v_proj.bias",
        "layers.0.attention.wo.weight": "model.layers.0.self_attn.o_proj.weight",
        "layers.0.feed_forward.w1.weight": "model.layers.0.mlp.gate_proj.weight",
        "layers.0.feed_forward.w2.bias": "model.layers.0.mlp.down_proj.bias",
        "layers.1.feed_forward.w3.weight": "model.layers.1.mlp.up_proj.weight",
        "layers.1.attention_norm.weight": "model.layers.1.input_layernorm.weight",
        "layers.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
    }
    turned = {
        f"layers.0.attention.{ours}.{kind}": f"model.layers.0.self_attn.{other}_proj.{kind}"
        for ours, other in (("wq", "q"), ("wk", "k"))
        for kind in ("weight", "bias")
    }
    for ours, other in (pairs | turned).items():
        mine = gradients[ours]
        if ours in turned:
            mine = rotate_pairs(mine, 4 if "wq" in ours else 2)
        assert (mine - their_gradients[other]).norm() < 2e-5 * their_gradients[other].norm() + 1e-7, ours
    started = ranks(2).run(train.main, ["--job.config_file", str(config), "--training.steps=1"])
    assert started == [0, 0]
    assert metrics(tmp_path / "run" / "run")[0]["step"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights_become_float32_and_back_again(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = random_llama(tmp_path / "hf", dtype)
    convert("from-hf", tmp_path / "hf", tmp_path / "ours")
    state = state_of(tmp_path / "ours" / "step-00000000", tmp_path)
    assert torch.equal(state["model.tok_embeddings.weight"], theirs.model.embed_tokens.weight.float())
    assert "model.output.weight" not in state
    assert read_manifest(str(tmp_path / "ours" / "step-00000000"))["meta"]["config"]["training"]["dtype"] == "float32"
    # The checkpoint's config names no tokenizer of its own; bytes stand in for one.
    write_config(tmp_path / "bytes")
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    tokenizer = tmp_path / "bytes" / "tokenizer"
    convert("to-hf", tmp_path / "ours", tmp_path / "again", "--dtype", name, "--tokenizer", tokenizer)
    again = opened(tmp_path / "again")[0]
    assert all(torch.equal(p, q.to(p.dtype)) for p, q in zip(again.parameters(), theirs.parameters(), strict=True))


MEASURE = r"""
import re, sys, torch
def peak():  # getrusage would begin with that of the process that forked this one
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024
torch.ones(3, dtype=torch.uint8).numpy()
from titanlite.convert.__main__ import main
verb, source, out, *options = sys.argv[1:]
assert main([verb, f"small-{source}", f"small-{out}", *options]) == 0  # loads all code, and takes what any model takes
before = peak()
code = main([verb, source, out, *options])
print("PEAK", peak() - before)
sys.exit(code)
"""


@pytest.mark.slow
def test_memory_stays_below_a_shard_and_a_tensor(tmp_path: Path) -> None:
    """Of a model of 216 MB, both ways, with shards of 20 MB, the largest tensor 16.8 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 8192, "num_attention_heads": 8, "max_position_embeddings": 64}
    for name, dim, layers in (("small-hf", 16, 1), ("hf", 512, 11)):
        config = LlamaConfig(hidden_size=dim, intermediate_size=4 * dim, num_hidden_layers=layers, **sizes)
        model = LlamaForCausalLM(config)
        num_bytes = sum(p.nbytes for p in model.parameters())
        model.save_pretrained(tmp_path / name, max_shard_size="20MB")
    write_config(tmp_path / "bytes")
    largest, shard = 8192 * 512 * 4, 20e6
    assert num_bytes > 200e6
    to_hf = ["to-hf", "ours", "again", "--shard_size=20MB", "--tokenizer", "bytes/tokenizer"]
    for argv in (["from-hf", "hf", "ours"], to_hf):
        command = [sys.executable, "-c", MEASURE, *argv, "--check=streamed"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back: glibc would keep up to 32 MB a block
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr
        peak = int(result.stdout.rpartition("PEAK")[2])
        assert peak < shard + largest, (argv[0], peak / 1e6)
        print(argv[0], f"{peak / 1e6:.0f} MB")


@pytest.mark.slow
def test_what_the_training_verb_made_on_2_x_2_ranks_ships(tmp_path: Path) -> None:
    """The debug config with the shipped tokenizer, trained for a while by torchrun on the built-in corpus."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", "-m"]
    config = ["--job.config_file", str(ROOT / "train_configs" / "debug.toml"), "--training.steps=30"]
    folders = [f"--job.dump_folder={tmp_path / 'run'}", f"--data.cache_dir={tmp_path / 'cache'}"]
    layout = ["--parallelism.data_parallel_shard_degree=2", "--parallelism.tensor_parallel_degree=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, "titanlite.train", *config, *folders, *layout]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    convert(
        "to-hf", tmp_path / "run", tmp_path / "hf", "--shard_size=2MB", "--tokenizer", ROOT / "assets" / "tokenizer"
    )
    theirs, tokenizer = opened(tmp_path / "hf")
    source = Path(subprocess.__file__).read_text()
    rows = torch.tensor(tokenizer(source).input_ids[:1000]).view(2, 500)
    ours = Tokenizer.load(str(ROOT / "assets" / "tokenizer"))
    assert rows.flatten().tolist() == ours.encode_document(source)[:1000].tolist()
    (tmp_path / "config.toml").write_text((tmp_path / "run" / "config.toml").read_text())
    model = plain_model_of(tmp_path)
    with torch.no_grad():
        wanted = model.output(model(rows, build_documents(rows, ours.eos_id, "dense")))
        assert (theirs(rows).logits - wanted).abs().max() < 1e-5
    prompt = tokenizer("def main(argv):\n", return_tensors="pt")
    out = theirs.generate(**prompt, max_new_tokens=200, do_sample=False)[0, prompt.input_ids.shape[1] :].tolist()
    printed = io.StringIO()
    argv = ["--checkpoint", str(tmp_path / "run"), "--prompt", "def main(argv):\n", "--max_new_tokens=200", "--json"]
    with contextlib.redirect_stdout(printed):
        assert generate.main([*argv, "--tokenizer", str(ROOT / "assets" / "tokenizer")]) == 0
    made = json.loads(printed.getvalue())["tokens"]
    assert made == out[: len(made)]
    assert len(made) == 200 or out[len(made)] == ours.eos_id


def plain_model_of(folder: Path) -> Any:
    """As plain_model, for the step at which the debug config ends here."""
    from titanlite.model.transformer import Llama

    config = load_config(["--job.config_file", str(folder / "config.toml")])
    state = state_of(folder / "run" / "checkpoint" / "step-00000030", folder)
    model = Llama(config.model)
    model.load_state_dict({n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")})
    return model

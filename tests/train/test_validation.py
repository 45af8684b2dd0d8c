"""Validation against a loop over documents that shares no code with it, on every layout, and what it must not touch."""

import contextlib
import hashlib
import io
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.support.gloo import ranks
from tests.support.make_tokenizers import single_bytes, write_tokenizer
from tests.support.tiny_run import metrics, state_of, text, write_config
from titanlite.config import Config, load_config
from titanlite.data.corpus import open_corpus
from titanlite.data.loader import build_loader
from titanlite.data.validation_set import ValidationSet, build_validation_set, validation_sources
from titanlite.model.attention import Documents, realise
from titanlite.model.transformer import Llama
from titanlite.run.agreement import RunFailed
from titanlite.tokenizer import Tokenizer
from titanlite.train.__main__ import main
from titanlite.trainer import Trainer
from titanlite.validation import Polling, result
from titanlite.verify.__main__ import main as verify

FLOAT64 = {"training__dtype": "float64", "activation_checkpoint__mode": "selective"}
IDS = {byte[0]: rank for rank, byte in enumerate(single_bytes())}
HELD = {"data__held_out_fraction": 0.15, "validation__enable": True, "validation__freq": 3}


def started(config: Path, *overrides: str) -> tuple[int, str]:
    """Exit code of a run, and what it printed."""
    torch.manual_seed(0)  # as a new process begins, whatever this one has drawn
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        code = main(["--job.config_file", str(config), *overrides])
    return code, printed.getvalue()


def run_on(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results by rank; of a single one, from this process."""
    return ranks(world_size).run(function, *arguments) if world_size > 1 else [function(*arguments)]


def config_of(path: Path, *overrides: str) -> Config:
    return load_config(["--job.config_file", str(path), *overrides])


def build_set(config: Config, tokenizer: Tokenizer, dp_rank: int = 0, dp_degree: int = 1) -> ValidationSet:
    corpus = open_corpus(config.data, tokenizer, seq_len=config.training.seq_len, seed=config.training.seed)
    return build_validation_set(
        validation_sources(config.validation, config.data, tokenizer, corpus),
        config.data,
        tokenizer,
        seq_len=config.training.seq_len,
        batch_size=config.training.local_batch_size,
        dp_rank=dp_rank,
        dp_degree=dp_degree,
    )


def naive(
    config: Config, checkpoint: Path, texts: list[str], scratch: Path, prefix: str = "model."
) -> tuple[float, float]:
    """Loss and bits per byte of texts, each document alone through a plain model, in float64, with full logits.

    A document of more than seq_len + 1 tokens: seq_len targets at a time, with one token before them as context.
    """
    tokenizer, seq_len = Tokenizer.load(config.tokenizer.path), config.training.seq_len
    model = Llama(config.model).double()
    state = state_of(checkpoint, scratch)
    model.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    nats = targets = num_bytes = 0.0
    for document in texts:
        ids = torch.tensor([tokenizer.bos_id, *(IDS[byte] for byte in document.encode()), tokenizer.eos_id])
        num_bytes += len(document.encode())
        for first in range(0, len(ids) - 1, seq_len):
            piece = ids[first : first + seq_len + 1]
            with torch.no_grad():
                nats += F.cross_entropy(plain_logits(model, piece[:-1]), piece[1:], reduction="sum").item()
            targets += len(piece) - 1
    return nats / targets, nats / math.log(2) / num_bytes


def plain_logits(model: Llama, ids: Tensor) -> Tensor:
    """Of one document [S]: full causal attention, one position after the other; no mask, no rule, no chunks."""
    c = model.config
    size = c.dim // c.n_heads
    x = model.tok_embeddings.weight[ids]
    angles = torch.outer(torch.arange(len(ids)).double(), c.rope_theta ** -(torch.arange(0, size, 2).double() / size))

    def turn(heads: Tensor) -> Tensor:  # pairs of neighbours, as complex numbers
        pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + c.norm_eps).rsqrt() * weight

    for layer in model.layers.values():
        a, h = layer.attention, norm(x, layer.attention_norm.weight)
        q, k, v = ((h @ w.weight.T).unflatten(-1, (-1, size)).transpose(0, 1) for w in (a.wq, a.wk, a.wv))
        q, k = turn(q), turn(k)
        k, v = (t.repeat_interleave(c.n_heads // c.n_kv_heads, 0) for t in (k, v))
        scores = q @ k.transpose(1, 2) / size**0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ a.wo.weight.T
        f, h = layer.feed_forward, norm(x, layer.ffn_norm.weight)
        x = x + (F.silu(h @ f.w1.weight.T) * (h @ f.w3.weight.T)) @ f.w2.weight.T
    return norm(x, model.norm.weight) @ model.output.weight.T


def held_out_numbers(config: Config) -> list[int]:
    """By the definition in order.py, from the file names alone."""

    def splitmix64(x: int) -> int:
        z = (x + 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    found = []
    for number in range(40):
        key = hashlib.blake2b(f"data\0{number:02}.txt".encode(), digest_size=8).digest()
        if splitmix64(int.from_bytes(key, "little") ^ splitmix64(0)) < config.data.held_out_fraction * 2**64:
            found.append(number)
    return found


def validations(run: Path) -> dict[int, dict[str, Any]]:
    """By step; fails where a step has two."""
    rows = [row for row in metrics(run) if "validation_loss" in row]
    found = {row["step"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def trained(run: Path) -> dict[int, tuple[float, str]]:
    """Loss and batch fingerprint by step; fails where a step has two."""
    rows = [row for row in metrics(run) if "batch_fingerprint" in row]
    found = {row["step"]: (row["loss"], row["batch_fingerprint"]) for row in rows}
    assert len(found) == len(rows)
    return found


def validated(config: Path, *overrides: str) -> tuple[int, str]:
    return started(config, "--validation.only", *overrides)


LAYOUTS = {"1": (1, 1), "2": (2, 1), "3": (3, 1), "4": (4, 1), "2x2": (4, 2)}


def exact(config: Path, *overrides: str) -> list[Any]:
    """The results of a `--validation.only` on this rank, in all digits."""
    results: list[Any] = []

    def keep(*arguments: Any) -> Any:
        results.append(result(*arguments))
        return results[-1]

    with patch("titanlite.validation.result", keep):
        code, told = validated(config, *overrides)
    assert code == 0, told
    return results


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("layouts", [("1", "2"), pytest.param(tuple(LAYOUTS), marks=pytest.mark.slow)], ids=str)
def test_every_layout_gives_the_number_of_a_loop_over_documents(layouts: tuple[str, ...], tmp_path: Path) -> None:
    """11 documents are held out, two much longer than a row, in 67 rows."""
    path = write_config(tmp_path, training__global_batch_size=24, training__steps=4, **HELD, **FLOAT64)
    assert started(path)[0] == 0
    config, before = config_of(path), contents(tmp_path / "run")
    texts = [text(number) for number in held_out_numbers(config)]
    assert max(map(len, texts)) > 3 * config.training.seq_len
    loss, bits_per_byte = naive(config, tmp_path / "run/checkpoint/step-00000004", texts, tmp_path)
    tokenizer = Tokenizer.load(config.tokenizer.path)
    num_rows = build_set(config, tokenizer).num_rows
    for name in layouts:
        world_size, tp = LAYOUTS[name]
        dp = world_size // tp
        assert dp == 1 or num_rows % (dp * config.training.local_batch_size), name
        for (found,) in run_on(world_size, exact, path, f"--parallelism.tensor_parallel_degree={tp}"):
            assert found.validation_loss == pytest.approx(loss, rel=1e-9), name
            assert found.bits_per_byte == pytest.approx(bits_per_byte, rel=1e-9), name
            assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-9), name
            assert found.validation_targets == sum(len(t.encode()) + 1 for t in texts)
    assert contents(tmp_path / "run") == before
    logged = validations(tmp_path / "run")
    assert list(logged) == [3, 4]
    assert logged[4]["validation_loss"] == pytest.approx(loss, rel=1e-9)


def test_bits_per_byte_by_hand() -> None:
    """Three targets at 2 bits each, of which two stand for three bytes and one is an eos."""
    held = ValidationSet(np.empty(0), 1, 1, 3, 3, "")
    found = result(6 * math.log(2), held, step=1, tokens=1, seconds=0.0)
    assert found.validation_loss == pytest.approx(2 * math.log(2))
    assert found.perplexity == pytest.approx(4)
    assert found.bits_per_byte == pytest.approx(2)


@pytest.mark.parametrize("bos", [True, False])
def test_bytes_are_those_that_targets_stand_for(tmp_path: Path, bos: bool) -> None:
    """With a bos every byte has a target; without one a first token has none: here the first byte of each text."""
    texts = ["é", "", "ab", "x" * 100]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
    path = write_config(
        tmp_path,
        validation__enable=True,
        validation__paths=[str(tmp_path / "own.jsonl")],
        validation__text_field="body",
    )
    if not bos:
        write_tokenizer(tmp_path / "tokenizer", single_bytes(), {"<|end|>": 256}, eos_token="<|end|>")
    config = config_of(path)
    held = build_set(config, Tokenizer.load(config.tokenizer.path))
    assert held.num_documents == 4
    assert held.num_bytes == (104 if bos else 1 + 0 + 1 + 99)
    assert held.num_targets == (104 + 4 if bos else 104 + 4 - 4)


def final_state(run: Path, step: int, scratch: Path) -> dict[str, Tensor]:
    return state_of(run / f"checkpoint/step-{step:08d}", scratch)


def assert_same_training(one: Path, other: Path, step: int, scratch: Path) -> None:
    assert trained(one) == trained(other)
    expected, state = (final_state(run, step, scratch) for run in (one, other))
    assert expected.keys() == state.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    metas = [
        json.loads((run / f"checkpoint/step-{step:08d}/manifest.json").read_text())["meta"] for run in (one, other)
    ]
    for key in ("rng", "cursor", "ledger", "trained_targets"):
        assert metas[0][key] == metas[1][key], key


SAMPLES = {
    "validation__sample_prompts": ["the model", "a row of tokens"],
    "validation__sample_freq": 4,
    "validation__sample_tokens": 6,
}


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_with_and_without_it_is_the_same(tmp_path: Path, world_size: int) -> None:
    """Bit by bit, in steps that validate, sample and save, under FSDP with the weights gathered by either."""
    path = write_config(tmp_path, **{**HELD, **SAMPLES, "validation__freq": 2}, data__num_workers=2)
    for name, enable in (("with", "true"), ("without", "false")):
        overrides = (f"--job.dump_folder={tmp_path / name}", f"--validation.enable={enable}")
        for code, told in run_on(world_size, started, path, *overrides):
            assert code == 0, told
    assert list(validations(tmp_path / "with")) == [2, 4, 6, 8]
    assert validations(tmp_path / "without") == {}
    for step in (4, 8):
        assert_same_training(tmp_path / "with", tmp_path / "without", step, tmp_path)
    events = EventAccumulator(str(tmp_path / "with/tb")).Reload()
    assert [event.step for event in events.Scalars("bits_per_byte")] == [2, 4, 6, 8]
    assert [event.step for event in events.Tensors("sample/2/text_summary")] == [4, 8]


def test_the_average_is_validated_and_training_is_the_same(tmp_path: Path) -> None:
    settings = {**HELD, **SAMPLES, **FLOAT64, "training__ema_decay": 0.9, "validation__freq": 2}
    path = write_config(tmp_path, **settings)
    for name, use_ema in (("with", "true"), ("without", "false")):
        overrides = (f"--job.dump_folder={tmp_path / name}", f"--validation.use_ema={use_ema}")
        for code, told in run_on(2, started, path, *overrides):
            assert code == 0, told
    for step in (4, 8):
        assert_same_training(tmp_path / "with", tmp_path / "without", step, tmp_path)
    config = config_of(path)
    texts = [text(number) for number in held_out_numbers(config)]
    for name, prefix in (("with", "ema."), ("without", "model.")):
        for step in (4, 8):
            checkpoint = tmp_path / f"{name}/checkpoint/step-{step:08d}"
            loss, _ = naive(config, checkpoint, texts, tmp_path, prefix)
            assert validations(tmp_path / name)[step]["validation_loss"] == pytest.approx(loss, rel=1e-9)
    overrides = (f"--job.dump_folder={tmp_path / 'with'}", "--validation.use_ema=true")
    (found,) = exact(path, *overrides)
    assert found.validation_loss == pytest.approx(validations(tmp_path / "with")[8]["validation_loss"], rel=1e-12)


def numbers(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "validation_seconds"} for row in validations(run).values()]


def test_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    """It fails after a validation that no checkpoint has seen: the log is made again from the checkpoint on, whose
    own step was validated."""
    path = write_config(tmp_path, **{**HELD, "validation__freq": 2})
    assert started(path, f"--job.dump_folder={tmp_path / 'whole'}")[0] == 0
    train_step = Trainer.train_step

    def die(self: Trainer, *arguments: Any) -> Any:
        if self.step == 6:
            raise RunFailed("killed")
        return train_step(self, *arguments)

    with patch.object(Trainer, "train_step", die):
        assert started(path)[0] == 1
    assert list(validations(tmp_path / "run")) == [2, 4, 6]
    code, told = started(path)
    assert code == 0, told
    assert_same_training(tmp_path / "whole", tmp_path / "run", 8, tmp_path)
    assert [row["step"] for row in numbers(tmp_path / "run")] == [2, 4, 6, 8]
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


@pytest.mark.parametrize("step", [4, 8])
def test_a_stop_leaves_it_at_once_and_the_next_start_makes_up_for_it(tmp_path: Path, step: int) -> None:
    path = write_config(tmp_path, **{**HELD, "validation__freq": 4}, training__local_batch_size=1)
    polled = Polling.__call__
    calls = iter(range(10_000))

    def stop(self: Polling) -> bool:
        if next(calls) == 3 + 67 * (step // 4 - 1):  # in the fourth pass of 67
            os.kill(os.getpid(), signal.SIGTERM)
        return polled(self)

    with patch.object(Polling, "__call__", stop):
        code, told = started(path)
    assert (code, next(calls)) == (0, 4 + 67 * (step // 4 - 1)), told
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", step)
    assert list(validations(tmp_path / "run")) == [4][: step // 4 - 1]
    assert started(path)[0] == 0
    assert list(validations(tmp_path / "run")) == [4, 8]
    assert list(trained(tmp_path / "run")) == [*range(1, 9)]


def documents_of(rows: list[np.ndarray], tokenizer: Tokenizer) -> set[str]:
    """Texts of rows that hold whole documents."""
    found = set()
    for row in rows:
        for ids in np.split(row, np.flatnonzero(row == tokenizer.eos_id) + 1):
            if len(ids) > 1:
                found.add(tokenizer.decode(ids[1:-1]))
    return found


@pytest.mark.parametrize("reader", ["streamed", "cached"])
def test_what_is_validated_on_is_never_trained_on(tmp_path: Path, reader: str) -> None:
    """An epoch of the training, and the set: disjoint, and together the corpus."""
    (tmp_path / "distinct").mkdir()
    texts = {number: f"{number} {text(number)}" for number in range(40)}
    for number in texts:
        (tmp_path / f"distinct/{number:02}.txt").write_text(texts[number])
    path = write_config(tmp_path, paths=str(tmp_path / "distinct/*.txt"), **HELD, training__seq_len=4096)
    config = config_of(path, "--data.packing=best_fit", "--data.max_epochs=1", f"--data.reader={reader}")
    tokenizer = Tokenizer.load(config.tokenizer.path)
    loader = build_loader(config.data, tokenizer, seq_len=4096, global_batch_size=1, seed=0)
    rows: list[np.ndarray] = []
    with contextlib.closing(loader):
        for batch in loader:
            rows += [row.numpy() for row in batch.rows]
    epoch = documents_of(rows, tokenizer)
    held = documents_of([*build_set(config, tokenizer).rows.reshape(-1, 4097)], tokenizer)
    assert held == {texts[number] for number in held_out_numbers(config)}
    assert held.isdisjoint(epoch)
    assert held | epoch == set(texts.values())


def test_the_set_follows_from_the_documents_alone(tmp_path: Path) -> None:
    """Not from seed, order, packing, reader or threads; ranks share out its rows, and pad theirs to the same number."""
    path = write_config(tmp_path, **HELD, validation__max_documents=9)
    config = config_of(path)
    tokenizer = Tokenizer.load(config.tokenizer.path)
    whole = build_set(config, tokenizer)
    assert whole.num_documents == 9
    changes = ["training.seed=5", "data.shuffle=false", "data.packing=best_fit", "data.reader=cached"]
    for change in [*changes, "data.num_workers=3", "data.num_workers=0"]:
        assert build_set(config_of(path, f"--{change}"), tokenizer).digest == whole.digest, change
    shares = [build_set(config, tokenizer, rank, 3) for rank in range(3)]
    assert {str(share) for share in shares} == {str(whole)}
    assert len({share.rows.shape for share in shares}) == 1
    dealt = np.stack([share.rows for share in shares], 1).reshape(-1, 65)
    assert np.array_equal(dealt[: whole.num_rows], whole.rows.reshape(-1, 65)[: whole.num_rows])
    assert (dealt[whole.num_rows :] == tokenizer.eos_id).all()


def test_own_files_of_two_sources_and_bad_records(tmp_path: Path) -> None:
    good = [json.dumps({"text": f"document {i}"}) for i in range(5)]
    (tmp_path / "own.jsonl").write_text("\n".join([*good[:3], "{", *good[3:]]) + "\n")
    path = write_config(tmp_path, validation__enable=True, validation__paths=[str(tmp_path / "own.jsonl")])
    code, told = started(path)
    assert code == 1
    assert "own.jsonl:4: " in told
    assert 'data.on_bad_record = "skip" would leave it out' in told
    code, told = started(path, "--data.on_bad_record=skip", "--training.steps=1")
    assert code == 0, told
    assert "bad record left out of the validation" in told
    assert validations(tmp_path / "run")[1]["validation_targets"] == 5 * len("document 0") + 5


def test_held_out_documents_of_every_source_of_a_mixture(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text(100 + i)}) + "\n" for i in range(50)]
    (tmp_path / "web.jsonl").write_text("".join(lines))
    path = write_config(tmp_path, paths="PATHS", **HELD, validation__max_documents=3)
    (tmp_path / "books").mkdir()
    for i in range(20):
        (tmp_path / f"books/{i}.txt").write_text(text(i))
    tables = "".join(
        f'[data.sources.{name}]\npaths = ["{tmp_path / paths}"]\n'
        for name, paths in (("books", "books/*.txt"), ("web", "web.jsonl"))
    )
    path.write_text(path.read_text().replace('paths = ["PATHS"]\n', "") + tables)
    config = config_of(path)
    tokenizer = Tokenizer.load(config.tokenizer.path)
    assert build_set(config, tokenizer).num_documents == 6


def greedy(model: Llama, tokenizer: Tokenizer, prompt: str, num: int) -> str:
    ids = tokenizer.encode_document(prompt)[:-1].tolist()
    new: list[int] = []
    while len(new) < num and tokenizer.eos_id not in new:
        logits = plain_logits(model, torch.tensor([*ids, *new]))[-1, : tokenizer.vocab_size]
        new.append(int(logits.argmax()))
    return tokenizer.decode([i for i in new if i != tokenizer.eos_id])


@pytest.mark.parametrize(("world_size", "prefix"), [(1, "model."), (2, "model."), (1, "ema.")])
def test_samples_are_what_a_plain_model_says(tmp_path: Path, world_size: int, prefix: str) -> None:
    average = {"training__ema_decay": 0.9, "validation__use_ema": True} if prefix == "ema." else {}
    settings = {**HELD, **SAMPLES, **FLOAT64, **average, "training__mixed_precision_param": "float64"}
    path = write_config(tmp_path, **settings, training__steps=4)
    for code, told in run_on(world_size, started, path):
        assert code == 0, told
    config = config_of(path)
    tokenizer = Tokenizer.load(config.tokenizer.path)
    model = Llama(config.model).double()
    state = final_state(tmp_path / "run", 4, tmp_path)
    model.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    events = EventAccumulator(str(tmp_path / "run/tb")).Reload()
    for number, prompt in enumerate(SAMPLES["validation__sample_prompts"], 1):
        (event,) = events.Tensors(f"sample/{number}/text_summary")
        with torch.no_grad():
            expected = greedy(model, tokenizer, prompt, 6)
        assert event.tensor_proto.string_val[0].decode() == f"    **{prompt}**{expected}".replace("\n", "\n    ")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_compiled_blocks_and_every_kind_of_checkpointing(tmp_path: Path, mode: str) -> None:
    path = write_config(tmp_path, **{**HELD, **SAMPLES}, training__steps=4, activation_checkpoint__mode=mode)
    found = []
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        overrides = (f"--job.dump_folder={tmp_path / name}", f"--compile.enable={compiled}")
        # In a process of its own: dynamo warns while it compiles.
        ((code, told),) = ranks(1).run(started, path, *overrides, "--compile.backend=aot_eager")
        assert code == 0, told
        found.append(validations(tmp_path / name)[4]["validation_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def all_one_document(tokens: Tensor, eos_id: int, backend: str) -> Documents:
    return realise(torch.zeros_like(tokens), backend)


def test_isolation_is_proven_of_its_rows_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, **{**HELD, "data__held_out_fraction": 0.3}, training__local_batch_size=4)
    arguments = ["isolation", "--job.config_file", str(path)]
    assert verify(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("validation: pass ") and "over set " in line for line in lines)
    for backend in ("sdpa", "dense"):
        (row,) = [line.split() for line in lines if line.split()[:2] == ["validation", backend]]
        assert row[6:] == ["same", "same", "same", "-"]
    with patch("titanlite.verify.isolation.build_documents", all_one_document):
        assert verify(arguments) == 1
    assert "NOT ISOLATED: validation, sdpa: " in capsys.readouterr().out


MISTAKES: dict[str, tuple[list[str], str]] = {
    "nothing": (["--data.held_out_fraction=0"], "validation.enable = true, and there is nothing to validate on"),
    "only nothing": (
        ["--data.held_out_fraction=0", "--validation.only"],
        "validation.only = true, and there is nothing",
    ),
    "no file": (["--validation.paths=nowhere/*.txt"], "validation.paths: nowhere/*.txt matches no file"),
    "none held out": (["--data.held_out_fraction=1e-9"], "holds out none of 40 documents, so there is nothing"),
    "no text": (["--validation.paths={folder}/empty.txt"], "none of the 1 documents to validate on holds any text"),
    "no record": (["--validation.paths={folder}/none.jsonl"], "its files hold no record"),
    "trained on": (["--validation.paths={folder}/corpus/0*.txt"], "10 files of validation.paths are trained on too"),
    "unused": (["--validation.exclude=a"], 'validation.exclude = ["a"] has no effect while validation.paths = []'),
    "long samples": (
        ["--validation.sample_prompts=a", "--validation.sample_tokens=63"],
        "validation.sample_tokens = 63 and the longest of validation.sample_prompts make 65 tokens, more than",
    ),
    "tensor parallel": (
        ["--validation.sample_prompts=a", "--parallelism.tensor_parallel_degree=2"],
        "validation.sample_prompts with parallelism.tensor_parallel_degree = 2: training splits the sequence",
    ),
    "no average": (["--validation.use_ema=true"], "validation.use_ema = true, and training.ema_decay = 0.0 keeps no"),
    "no checkpoint": (["--validation.only"], "run/checkpoint has no valid checkpoint"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(tmp_path: Path, mistake: str) -> None:
    arguments, expected = MISTAKES[mistake]
    path = write_config(tmp_path, **HELD)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "none.jsonl").touch()
    code, told = started(path, *(argument.format(folder=tmp_path) for argument in arguments))
    assert code == 1
    (line,) = [line for line in told.splitlines() if not line.startswith("[rank0]")]
    assert expected in line
    assert not (tmp_path / "run/checkpoint").exists()


def test_only_refuses_documents_that_may_have_been_trained_on(tmp_path: Path) -> None:
    path = write_config(tmp_path, **HELD, training__steps=1)
    assert started(path)[0] == 0
    code, told = validated(path, "--data.held_out_fraction=0.2")
    assert code == 1
    assert "was trained with data.held_out_fraction = 0.15 and not 0.2" in told


def test_only_passes_over_a_damaged_checkpoint(tmp_path: Path) -> None:
    path = write_config(tmp_path, **HELD)
    assert started(path)[0] == 0
    next((tmp_path / "run/checkpoint/step-00000008").glob("*.distcp")).write_bytes(b"")
    before = contents(tmp_path / "run")
    code, told = validated(path)
    assert code == 0
    assert "step-00000008 is damaged and passed over" in told
    assert told.splitlines()[-1].startswith(f"{tmp_path}/run/checkpoint/step-00000004: step 4  validation loss ")
    assert contents(tmp_path / "run") == before


def test_copies_of_files_that_are_trained_on_are_told_of(tmp_path: Path) -> None:
    path = write_config(tmp_path, validation__enable=True, validation__paths=[str(tmp_path / "copy.txt")])
    (tmp_path / "copy.txt").write_text(text(3))
    code, told = started(path, "--training.steps=1")
    assert code == 0
    assert "copy.txt that of" in told

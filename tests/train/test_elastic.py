"""Runs that are stopped and killed and go on elsewhere, held against the stream as one process reads it in one go.

What is compared are the rows that the trainers were given: every row of the stream once and in order, whatever the
ranks, readers, threads, micro-batches and batch sizes of the lives of a run, and whichever way each of them ended.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.gloo import ranks
from tests.support.make_tokenizers import single_bytes, write_tokenizer
from tests.support.naive_stream import MASK, splitmix64
from tests.support.tiny_run import fingerprints, state_of, text, write_config
from titanlite.checkpoint import folder as checkpoint_folder
from titanlite.config import load_config
from titanlite.data import feed
from titanlite.data.loader import build_loader
from titanlite.tokenizer import Tokenizer
from titanlite.train.__main__ import main
from titanlite.train.run import Run, Step
from titanlite.trainer import StepResult, Trainer

SEQ_LEN, ROWS, STEPS, INTERVAL = 32, 32, 24, 5
UNIT = 8  # every batch size here is a multiple
TINY = {
    "model__dim": 16,
    "model__n_layers": 1,
    "model__ffn_dim": 16,
    "data__window_tokens": 128 * SEQ_LEN,
    "training__seq_len": SEQ_LEN,
    "training__global_batch_size": ROWS,
    "training__local_batch_size": 8,
    "training__steps": STEPS,
    "checkpoint__interval": INTERVAL,
    "metrics__enable_tensorboard": False,
}


def write_documents(folder: Path, *, mixture: bool, **overrides: Any) -> Path:
    """A config with about 13,000 tokens an epoch, in text files and in a jsonl file: one source, or two."""
    (folder / "books").mkdir(parents=True)
    for k in range(16):
        (folder / f"books/{k:02}.txt").write_text(text(k))
    (folder / "web.jsonl").write_text("".join(json.dumps({"text": text(k)}) + "\n" for k in range(100, 112)))
    paths = {"books": str(folder / "books/*.txt"), "web": str(folder / "web.jsonl")}
    config = write_config(folder, paths="PATHS", **{**TINY, **overrides})
    lines = config.read_text().replace('["PATHS"]', json.dumps(list(paths.values()))).splitlines()
    if mixture:
        lines = [line for line in lines if not line.startswith("paths = ")]
        for (name, path), weight in zip(paths.items(), (0.6, 0.4), strict=True):
            lines += [f"[data.sources.{name}]", f'paths = ["{path}"]', f"weight = {weight}"]
    config.write_text("\n".join(lines) + "\n")
    return config


# The stream, read by one process in one go


def digest(row: Tensor) -> int:
    return int.from_bytes(hashlib.blake2b(row.numpy().astype("<i4").tobytes(), digest_size=8).digest(), "little")


def fingerprint(digests: list[int]) -> str:
    """Of a step with these rows: the definition, in plain Python."""
    total = sum(splitmix64(number + position * 0x9E3779B97F4A7C15) for position, number in enumerate(digests))
    return f"{total & MASK:016x}"


@dataclass(frozen=True)
class Stream:
    """The first rows of the stream: a digest of each, and cursor and ledger behind every UNIT of them."""

    digests: list[int]
    cursors: list[dict[str, Any]]
    ledgers: list[dict[str, int]]

    def fingerprints(self, num_steps: int) -> dict[int, str]:
        """Of the first steps of ROWS rows."""
        steps = [self.digests[k * ROWS : (k + 1) * ROWS] for k in range(num_steps)]
        return {step: fingerprint(digests) for step, digests in enumerate(steps, 1)}


def read_stream(config_file: Path, num_rows: int, *overrides: str) -> Stream:
    config = load_config(["--job.config_file", str(config_file), *overrides, "--data.num_workers=0"])
    loader = build_loader(
        config.data,
        Tokenizer.load(config.tokenizer.path),
        seq_len=config.training.seq_len,
        global_batch_size=UNIT,
        seed=config.training.seed,
        dp_rank=0,
        dp_degree=1,
    )
    batches = list(islice(loader, num_rows // UNIT))
    loader.close()
    digests = [digest(row) for batch in batches for row in batch.rows]
    return Stream(digests, [json.loads(json.dumps(b.cursor)) for b in batches], [b.ledger for b in batches])


# A life of a run, and how it ends


@dataclass(frozen=True)
class Life:
    """From a start to an end, which comes at a step: finish, signal, or kill -9 in, after or while saving the step."""

    num_ranks: int = 1
    options: tuple[str, ...] = ()
    end: str = "finish"
    step: int = STEPS
    chunk_bytes: int = 2000
    """Text that a reading thread takes at once: the corpus is several such portions."""


def kill_myself(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def live(argv: list[str], life: Life, records: str) -> int:
    """`main` on this rank, which writes down the digests of the rows that it trained, and meets its end."""
    finish_step, update = Run.finish_step, Trainer._update

    def finish(run: Run, step: Step, result: StepResult) -> None:
        with open(f"{records}-{dist.get_rank()}.jsonl", "a") as file:
            digests = [digest(row) for row in step.batch.rows]
            file.write(json.dumps([run.trainer.step, run.mesh.dp_rank, digests]) + "\n")
        finish_step(run, step, result)
        if run.trainer.step == life.step:
            if life.end == "kill after":
                kill_myself()
            if life.end == "signal" and dist.get_rank() == dist.get_world_size() - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def die_in_step(trainer: Trainer, *arguments: Any) -> Any:
        return kill_myself() if trainer.step == life.step else update(trainer, *arguments)

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(Run, "finish_step", finish))
        stack.enter_context(patch.object(feed, "CHUNK_BYTES", life.chunk_bytes))
        if life.end == "kill in":
            stack.enter_context(patch.object(Trainer, "_update", die_in_step))
        if life.end == "kill saving":
            stack.enter_context(patch.object(checkpoint_folder, "commit", kill_myself))
        return main(argv)


def run_lives(config: Path, lives: list[Life], *overrides: str, in_process: bool = True) -> None:
    """One run, life after life; fails where one ends in another way than it should.

    in_process: a single rank that is not killed runs in this process, with as many threads as that has.
    """
    run = config.parent / "run"
    (config.parent / "records").mkdir()
    for number, life in enumerate(lives):
        argv = ["--job.config_file", str(config), *overrides, *life.options]
        arguments = (argv, life, str(config.parent / f"records/{number}"))
        if life.end.startswith("kill"):
            with pytest.raises(RuntimeError, match="exit code -9|Connection|peer"):
                ranks(life.num_ranks).run(live, *arguments)
            last = life.step - (life.end == "kill in")
        elif life.num_ranks == 1 and in_process:
            assert live(*arguments) == 0
            last = life.step
        else:
            assert set(ranks(life.num_ranks).run(live, *arguments)) == {0}
            last = life.step
        status = json.loads((run / "status.json").read_text())
        if not life.end.startswith("kill"):
            assert (status["state"], status["step"]) == ({"signal": "preempted"}.get(life.end, "finished"), last)
        assert cursor_log(run)[-1]["step"] == last


def cursor_log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "cursor.jsonl").read_text().splitlines()]


def trained_rows(records: Path) -> dict[int, list[int]]:
    """By step: the digests of the rows of all ranks, of the last life that made the step."""
    steps: dict[int, tuple[int, dict[int, list[int]]]] = {}
    for path in records.iterdir():
        life = int(path.name.split("-")[0])
        for line in path.read_text().splitlines():
            step, dp_rank, digests = json.loads(line)
            if step not in steps or steps[step][0] < life:
                steps[step] = life, {}
            if steps[step][0] == life:
                assert steps[step][1].setdefault(dp_rank, digests) == digests, "tensor-parallel peers share their rows"
    return {step: [d for _, part in sorted(parts.items()) for d in part] for step, (_, parts) in steps.items()}


def check_run(config: Path, stream: Stream) -> list[int]:
    """Every row of the stream was trained once, in order, and cursor and ledger are at each step those of the stream.

    Returns the rows behind each step.
    """
    run, trained = config.parent / "run", trained_rows(config.parent / "records")
    log, row = cursor_log(run), 0
    assert [line["step"] for line in log] == list(range(1, len(log) + 1)) == sorted(trained)
    for line in log:
        digests = stream.digests[row : line["row"]]
        row = line["row"]
        assert trained[line["step"]] == digests, f"step {line['step']}"
        assert line["batch_fingerprint"] == fingerprint(digests)
        cursor = stream.cursors[row // UNIT - 1]
        assert {key: line[key] for key in cursor} == cursor
    assert fingerprints(run) == {line["step"]: line["batch_fingerprint"] for line in log}
    manifest = json.loads((run / f"checkpoint/step-{len(log):08}/manifest.json").read_text())
    ledger = manifest["meta"]["ledger"]
    assert ledger == stream.ledgers[row // UNIT - 1]
    assert ledger["tokens_read"] == ledger["targets"] + ledger["document_first"] + ledger["carried"] + ledger["dropped"]
    assert manifest["meta"]["trained_targets"] == ledger["targets"]
    return [line["row"] for line in log]


# Any ranks, readers, threads, micro-batches and batch sizes

REPLICATE, TP = "--parallelism.data_parallel_replicate_degree=2", "--parallelism.tensor_parallel_degree=2"
LAYOUTS = [(1, ()), (2, ()), (2, (TP,)), (4, ()), (4, (TP,)), (4, (REPLICATE,))]
LAYOUTS_OF_8: list[tuple[int, tuple[str, ...]]] = [(8, ()), (8, (REPLICATE, TP))]


def draw_lives(rng: random.Random, layouts: list[tuple[int, tuple[str, ...]]]) -> tuple[list[Life], int]:
    """Five lives of a run, each on another layout, and the rows that it trains.

    Stopped and saved; killed behind a save; killed again before a new one; some steps of another batch size; the rest.
    """
    saved = rng.randint(2, 6)
    killed = rng.choice([step for step in range(saved + 2, saved + 7) if step % INTERVAL])
    resumed = max(saved, killed // INTERVAL * INTERVAL)
    again = resumed + 1
    other_rows, other_steps = rng.choice((8, 16, 24, 64)), rng.randint(2, 4)
    ends = [
        ("signal", saved),
        (rng.choice(("kill in", "kill after")), killed),
        ("kill saving" if again % INTERVAL == 0 else rng.choice(("kill in", "kill after")), again),
        ("signal", resumed + other_steps),
        ("finish", STEPS),
    ]
    lives = []
    for number, ((num_ranks, degrees), (end, step)) in enumerate(zip(layouts, ends, strict=True)):
        rows = other_rows if number == 3 else ROWS
        share = rows * (2 if TP in degrees else 1) // num_ranks
        options = (
            f"--training.global_batch_size={rows}",
            f"--training.local_batch_size={rng.choice([n for n in range(1, share + 1) if share % n == 0])}",
            f"--data.reader={rng.choice(('streamed', 'cached'))}",
            f"--data.num_workers={rng.randrange(4)}",
            f"--data.prefetch={rng.choice((0, 1, 2, 5))}",
            f"--checkpoint.async_mode={rng.choice(('disabled', 'async'))}",
        )
        lives.append(Life(num_ranks, degrees + options, end, step, rng.choice((500, 2000, 1 << 18))))
    return lives, ROWS * (STEPS - other_steps) + other_rows * other_steps


def check_scenario(folder: Path, seed: int, layouts: list[tuple[int, tuple[str, ...]]]) -> None:
    rng = random.Random(seed)
    held_out, window = (
        rng.choice((0.0, 0.15)),
        131 * TINY["training__seq_len"],
    )  # 131 rows, so that no step ends with one
    config = write_documents(
        folder, mixture=seed % 3 == 2, data__held_out_fraction=held_out, data__window_tokens=window
    )
    packing = f"--data.packing={('split', 'best_fit')[seed % 2]}"
    lives, num_rows = draw_lives(rng, rng.sample(layouts, len(layouts)))
    cached = read_stream(config, num_rows, packing, "--data.reader=cached")  # writes the cache, too
    stream = read_stream(config, num_rows, packing, "--data.reader=streamed")
    assert stream == cached
    run_lives(config, lives, packing)
    ends = check_run(config, stream)
    assert ends[-1] == num_rows
    resumed = [stream.cursors[ends[life.step - 1] // UNIT - 1]["sources"] for life in (lives[0], lives[3])]
    assert any(source["dealt"] for sources in resumed for source in sources.values())  # in the middle of a window
    manifests = json.loads((folder / "run/corpus.json").read_text())["sources"]
    for name, source in stream.cursors[-1]["sources"].items():  # restarts in the first epoch, an end in a later one
        epoch = (manifests[name]["num_documents"], 0)
        assert (resumed[0][name]["document"], 0) < epoch < (source["document"], source["offset"])


def test_a_run_goes_on_exactly_after_a_stop_and_a_kill(tmp_path: Path) -> None:
    """The short form of the scenarios below: two ranks, then one with another batch size, killed, then another."""
    config = write_documents(tmp_path, mixture=False)
    num_rows = ROWS * STEPS - 4 * 16
    stream = read_stream(config, num_rows)
    other = ("--data.num_workers=0", "--training.global_batch_size=16", "--training.local_batch_size=4")
    run_lives(
        config,
        [
            Life(2, ("--data.num_workers=3", "--data.prefetch=5"), "signal", 6),
            Life(1, other, "kill in", 12),
            Life(1, ("--data.prefetch=0", "--training.local_batch_size=32"), chunk_bytes=500),
        ],
    )
    ends = check_run(config, stream)
    assert ends == [*range(32, 193, 32), 208, 224, 240, 256, *range(288, num_rows + 1, 32)]
    assert stream.cursors[256 // UNIT - 1]["sources"]["data"]["offset"] > 0
    assert stream.ledgers[256 // UNIT - 1]["document_first"] < 28 < stream.ledgers[-1]["document_first"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(6))
def test_five_lives_on_any_layout_see_the_uninterrupted_stream(seed: int, tmp_path: Path) -> None:
    layouts = random.Random(seed).sample(LAYOUTS, 5)
    check_scenario(tmp_path, seed, layouts)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [6, 7])
def test_five_lives_with_eight_ranks_among_them(seed: int, tmp_path: Path) -> None:
    try:
        check_scenario(tmp_path, seed, [*LAYOUTS_OF_8, *random.Random(seed).sample(LAYOUTS, 3)])
    finally:
        ranks(8).close()


# The same layout: the same bits


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_weights_and_optimiser_are_the_same_bits_after_any_restarts(num_ranks: int, tmp_path: Path) -> None:
    """Stopped, killed in a step, in a save and between steps; streamed and cached, sync and async."""
    cached, streamed, later = "--data.reader=cached", "--data.reader=streamed", "--checkpoint.async_mode=async"
    lives = [
        Life(num_ranks, (streamed, "--data.num_workers=3"), "kill in", 7),
        Life(num_ranks, (cached, "--data.num_workers=0", later), "signal", 9),
        Life(num_ranks, (cached, "--data.prefetch=0"), "kill saving", 10),
        Life(num_ranks, (streamed, later), "kill after", 13),
        Life(num_ranks, (streamed, "--data.num_workers=2"), "kill after", 11),
        Life(num_ranks, (cached, "--data.prefetch=5"), "signal", 17),
        Life(num_ranks, (streamed,), "signal", STEPS - 1),
        Life(num_ranks, (streamed,)),
    ]
    folders = [tmp_path / "whole", tmp_path / "restarted"]
    configs = [write_documents(folder, mixture=False) for folder in folders]
    read_stream(configs[1], UNIT, cached)
    assert set(ranks(num_ranks).run(main, ["--job.config_file", str(configs[0])])) == {0}
    run_lives(configs[1], lives, in_process=False)
    whole, restarted = (state_of(folder / f"run/checkpoint/step-{STEPS:08}", folder) for folder in folders)
    assert whole.keys() == restarted.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, restarted[name]), name
    assert fingerprints(folders[1] / "run") == fingerprints(folders[0] / "run")


# What may not change


def other_tokenizer(folder: Path) -> list[str]:
    special = {"<|end|>": 256}
    return ["--tokenizer.path", str(write_tokenizer(folder / "other", single_bytes(), special, eos_token="<|end|>"))]


def option(text: str) -> Callable[[Path], list[str]]:
    return lambda _: [text]


def change_file(folder: Path) -> list[str]:
    path = folder / "books/07.txt"
    path.write_text(path.read_text()[:-1] + "!")  # of the same size
    return []


def remove_file(folder: Path) -> list[str]:
    (folder / "books/07.txt").unlink()
    return []


def add_record(folder: Path) -> list[str]:
    with open(folder / "web.jsonl", "a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    return []


REFUSED: list[tuple[Callable[[Path], list[str]], str]] = [
    (option("--training.seq_len=64"), "training.seq_len was 32 and is 64"),
    (option("--training.seed=1"), "training.seed was 0 and is 1"),
    (option("--data.packing=best_fit"), "data.packing was split and is best_fit"),
    (option("--data.held_out_fraction=0.25"), "data.held_out_fraction was 0.0 and is 0.25"),
    (option("--data.shuffle_block=4"), "data.shuffle_block (0: data.shuffle is off) was 16384 and is 4"),
    (option("--data.sources.web.weight=0.6"), "source web was 2 of 5 rows"),
    (option("--data.sources.web.weight=0"), "source web removed"),
    (other_tokenizer, "the tokenizer's fingerprint was"),
    (change_file, "changed: 07.txt"),
    (remove_file, "removed: 07.txt"),
    (add_record, "changed: web.jsonl"),
]


def contents(run: Path) -> dict[str, bytes]:
    """Of all files but those that tell what goes on now."""
    passing = ("status.json", ".claim")
    return {str(p): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in passing}


def told(argv: list[str]) -> tuple[int, str]:
    """Exit code of `main`, and what it printed that is no log line."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        code = main(argv)
    return code, "".join(line for line in printed.getvalue().splitlines(True) if not line.startswith("[rank"))


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_another_stream_is_refused_in_a_line_and_nothing_is_lost(num_ranks: int, tmp_path: Path) -> None:
    def start(*options: str) -> list[tuple[int, str]]:
        argv = ["--job.config_file", str(config), *options]
        return [told(argv)] if num_ranks == 1 else ranks(num_ranks).run(told, argv)

    config = write_documents(tmp_path, mixture=True, training__steps=6)
    run, texts = tmp_path / "run", [*(tmp_path / "books").iterdir(), tmp_path / "web.jsonl"]
    assert [code for code, _ in start("--training.steps=4")] == [0] * num_ranks
    before, corpus = contents(run), {path: path.read_bytes() for path in texts}
    for change, words in REFUSED:
        (code, line), *others = start(*change(tmp_path))
        assert code == 1
        assert others == [(1, "")] * (num_ranks - 1)
        assert line.startswith("titanlite: cannot resume in another token stream: ")
        assert words in line
        assert line.count("\n") == 1
        assert json.loads((run / "status.json").read_text())["state"] == "failed"
        assert contents(run) == before, words
        for path, content in corpus.items():
            path.write_bytes(content)
    assert [code for code, _ in start()] == [0] * num_ranks
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert fingerprints(run) == read_stream(config, 6 * ROWS).fingerprints(6)


# The end of the data


def run_until(end: dict[str, Any], num_ranks: int, *options: str) -> None:
    """Start the verb: it ends with exit code 0, and status.json tells that it finished in the given way."""
    argv = list(options)
    codes = [main(argv)] if num_ranks == 1 else ranks(num_ranks).run(main, argv)
    assert codes == [0] * num_ranks
    run = Path(argv[argv.index("--job.dump_folder") + 1])
    status = json.loads((run / "status.json").read_text())
    assert {key: status[key] for key in ("state", "step", "reason")} == {"state": "finished", **end}


@pytest.mark.parametrize("packing", ["split", pytest.param("best_fit", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "layouts",
    [[(1, ())], pytest.param([(2, ()), (4, (TP,)), (4, ())], marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)
def test_the_data_end_at_the_same_step_on_any_ranks_and_may_go_on(
    layouts: list[tuple[int, tuple[str, ...]]], packing: str, tmp_path: Path
) -> None:
    config = write_documents(tmp_path, mixture=False, data__packing=packing, training__steps=1000)
    stream = read_stream(config, 60 * ROWS, "--data.max_epochs=9")  # more than these rows take
    tokens = sum(len(text(k).encode()) + 2 for k in (*range(16), *range(100, 112)))
    # split: a row's last token is the next one's first, and must lie in the epoch, too.
    steps = [(n * tokens - 1) // SEQ_LEN // ROWS for n in (1, 2)]
    if packing == "best_fit":  # windows end with epochs, of 28 documents
        places = [(place["document"], place["dealt"]) for place in (c["sources"]["data"] for c in stream.cursors)]
        steps = [sum(place <= (n * 28, 0) for place in places) * UNIT // ROWS for n in (1, 2)]
    assert 5 < steps[0] < steps[1] // 2 + 1 < 30
    for number, (num_ranks, degrees) in enumerate(layouts):
        run = tmp_path / f"run{number}"
        options = ["--job.config_file", str(config), "--job.dump_folder", str(run), *degrees]
        for epoch in (1, 2):
            reason = f"the data ended: source 'data' has no row left after max_epochs = {epoch}"
            end = {"step": steps[epoch - 1], "reason": reason}
            run_until(end, num_ranks, *options, f"--data.max_epochs={epoch}")
            saved = contents(run / "checkpoint")
            run_until(end, num_ranks, *options, f"--data.max_epochs={epoch}")
            assert contents(run / "checkpoint") == saved
            assert fingerprints(run) == stream.fingerprints(steps[epoch - 1])
        if packing == "best_fit" and num_ranks == 1:  # without a limit, windows would end elsewhere
            code, line = told([*options, "--data.max_epochs=0"])
            assert code == 1
            assert "windows end with its epochs and is " in line

"""The validation loss after equal tokens: python -m benchmarks.learning [--quick] [--results FILE.jsonl] [--out FILE]

debug.toml's model is trained on rows from titanlite's own loader, and on three ways to order the same tokens:

  random    windows at random offsets into all tokens, full causal attention, every target counted (nanoGPT's way)
  shuffled  rows cut from the stream, in a random order over the whole corpus, an epoch at a time
  in order  rows cut from the stream, one after the other

on three corpora made of the standard library: its files (long), their paragraphs (short), and all files joined into
eight (huge). Initial weights, schedule, optimiser, batch and evaluation (held-out files, document masks) are the same.
Then: AdamW and Muon at four rates each, sizes of titanlite's windows, and the seconds until a loss is reached beside
litgpt's and transformers' loops on random offsets. Every run is a process of its own, with one thread, two at a time;
those that are timed have two threads and run alone. --results keeps each result, and a start goes on with what is
missing in it.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.common import circumstances, command_line, publish

ARMS = ("titanlite", "random", "shuffled", "in order")
CORPORA = {"long": "files", "short": "paragraphs", "huge": "eight documents"}
RATES = {"adamw": (1e-3, 2e-3, 3e-3, 6e-3), "muon": (4e-3, 8e-3, 1.6e-2, 3.2e-2)}
WINDOWS = (2**16, 2**18, 2**21)
TIMED = ("titanlite", "litgpt", "transformers")
BOUNDS = {"random": 0.03, "shuffled": 0.05}  # nats that titanlite may be above
CONFIG = Path(__file__).parent.parent / "train_configs/debug.toml"
QUICK = ("--model.dim=32", "--model.n_layers=1", "--model.ffn_dim=64", "--training.seq_len=128")


@dataclass(frozen=True)
class Run:
    """What is trained. Its results are found again by this."""

    part: str
    """"order", "optimizer", "window" or "time"."""
    corpus: str
    arm: str
    seed: int
    steps: int
    overrides: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return json.dumps(asdict(self))


def write_corpora(folder: Path, max_files: int) -> None:
    """jsonl files to train on, of each corpus, and to validate on: every 20th file, and its paragraphs."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
    paths = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))[:max_files]
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text("utf-8"))
        except UnicodeDecodeError:
            continue
    held = texts[10::20]
    trained = [text for i, text in enumerate(texts) if i % 20 != 10]
    joined = ["\n".join(trained[i::8]) for i in range(8)]
    documents = {"long": trained, "short": _paragraphs(trained), "huge": joined}
    documents |= {"held long": held, "held short": _paragraphs(held)}
    for name, contents in documents.items():
        lines = (json.dumps({"text": text}) + "\n" for text in contents if text.strip())
        (folder / f"{name}.jsonl").write_text("".join(lines))


def _paragraphs(texts: list[str], most: int = 1600) -> list[str]:
    """Runs of lines between blank ones, joined up to so many characters."""
    found = []
    for text in texts:
        begun = ""
        for part in text.split("\n\n"):
            if begun and len(begun) + len(part) > most:
                found.append(begun)
                begun = ""
            begun += part + "\n\n"
        found.append(begun)
    return found


def runs_of(quick: bool, steps: int, seeds: int) -> list[Run]:
    if quick:
        return [Run("order", "long", arm, 0, 4, QUICK) for arm in ARMS]
    seeds_of = {arm: 1 if arm == "in order" else seeds for arm in ARMS}  # the worst needs no second look
    orders = itertools.product(range(seeds), CORPORA, ARMS)
    runs = [Run("order", corpus, arm, seed, steps) for seed, corpus, arm in orders if seed < seeds_of[arm]]
    for name, rates in RATES.items():
        options = [(f"--optimizer.name={name}", f"--optimizer.lr={rate}") for rate in rates]
        runs += [Run("optimizer", "long", "titanlite", 0, steps, option) for option in options]
    runs += [Run("window", "long", "titanlite", 0, steps, (f"--data.window_tokens={size}",)) for size in WINDOWS]
    return runs + [Run("time", "long", arm, 0, steps) for arm in TIMED]


def train(run: Run, folder: Path) -> dict[str, Any]:
    """The run's curve: [step, loss, seconds of training so far]. Imports torch, so that a process does it."""
    import torch
    import torch.distributed as dist

    from titanlite.config import load_config
    from titanlite.tokenizer import Tokenizer

    held = "short" if run.corpus == "short" else "long"
    paths = [f"--data.paths={folder}/{run.corpus}.jsonl", f"--validation.paths={folder}/held {held}.jsonl"]
    sizes = ["--validation.max_documents=24", f"--data.cache_dir={folder}/cache", "--data.reader=cached"]
    if held == "short":
        sizes[0] = "--validation.max_documents=400"
    steps = [f"--training.steps={run.steps}", f"--training.seed={run.seed}", "--optimizer.lr=1e-3"]
    if run.part != "time":
        steps.append("--training.mixed_precision_param=bfloat16")
    arguments = ["--job.config_file", str(CONFIG), *paths, *sizes, *steps, *run.overrides]
    config = load_config(arguments)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(run.seed)
    tokenizer = Tokenizer.load(config.tokenizer.path)
    contender = Timed(run.arm, config, tokenizer) if run.part == "time" else Ordered(run.arm, config, tokenizer)
    curve, seconds = [[0, contender.validate(), 0.0]], 0.0
    freq = max(1, run.steps // (20 if run.part == "time" else 4))
    for step in range(1, run.steps + 1):
        rows = next(contender.rows)
        began = time.perf_counter()
        contender.step(rows, step)
        seconds += time.perf_counter() - began
        if step % freq == 0 or step == run.steps:
            curve.append([step, contender.validate(), seconds])
    return {"run": asdict(run), "curve": curve}


def tokens_of(config: Any, tokenizer: Any) -> Any:
    """An epoch of the corpus in the stream's order, int64 [tokens]."""
    import numpy as np
    import torch

    from titanlite.data.corpus import open_corpus

    corpus = open_corpus(config.data, tokenizer, seq_len=config.training.seq_len, seed=config.training.seed)
    source = corpus.sources["data"]
    documents = source.order.documents(np.arange(source.order.num_documents))
    lengths = source.reader.read(documents, np.ones(len(documents), bool)).lengths
    return torch.from_numpy(source.reader.tokens(documents, np.zeros_like(lengths), lengths).astype(np.int64))


def rows_of(arm: str, config: Any, tokenizer: Any) -> Iterator[Any]:
    """The rows of each step, int64 [rows, seq_len + 1]."""
    import torch

    from titanlite.data.loader import build_loader

    seq_len, rows = config.training.seq_len, config.training.global_batch_size
    seed = config.training.seed
    if arm == "titanlite":
        loader = build_loader(config.data, tokenizer, seq_len=seq_len, global_batch_size=rows, seed=seed)
        yield from (batch.rows for batch in loader)
        return
    tokens, generator = tokens_of(config, tokenizer), torch.Generator().manual_seed(seed)
    if arm == "random":
        while True:
            offsets = torch.randint(len(tokens) - seq_len, (rows,), generator=generator).tolist()
            yield torch.stack([tokens[offset : offset + seq_len + 1] for offset in offsets])
    cut = tokens.unfold(0, seq_len + 1, seq_len)
    while True:
        order = torch.randperm(len(cut), generator=generator) if arm == "shuffled" else torch.arange(len(cut))
        for first in range(0, len(cut) - rows + 1, rows):
            yield cut[order[first : first + rows]]


class Ordered:
    """titanlite's trainer on rows in some order."""

    def __init__(self, arm: str, config: Any, tokenizer: Any) -> None:
        import torch

        from titanlite.data.validation_set import build_validation_set, validation_sources
        from titanlite.parallel.mesh import build_mesh
        from titanlite.trainer import Trainer

        self.rows = rows_of(arm, config, tokenizer)
        # An id that never occurs begins no document: full causal attention, and every target counts.
        self.eos_id, self._true_eos_id = -1 if arm == "random" else tokenizer.eos_id, tokenizer.eos_id
        self.trainer = Trainer(config, build_mesh("cpu", 1, 1, 1))
        sources = validation_sources(config.validation, config.data, tokenizer, None)
        self._set = build_validation_set(
            sources,
            config.data,
            tokenizer,
            seq_len=config.training.seq_len,
            batch_size=config.training.local_batch_size,
            dp_rank=0,
            dp_degree=1,
        )
        self._held = torch.from_numpy(self._set.rows)

    def step(self, rows: Any, step: int) -> None:
        from titanlite.model.documents import Examples

        examples = Examples.by_eos(rows, self.eos_id)
        self.trainer.train_step(examples, int((examples.labels >= 0).sum()))

    def validate(self) -> float:
        from titanlite.validation import sum_of_losses

        trainer = self.trainer
        nats = sum_of_losses(
            trainer.model, self._held, trainer.mesh, self._true_eos_id, trainer.backend, goes_on=lambda: True
        )
        assert nats is not None
        return nats / self._set.num_targets


class Timed:
    """A contender of benchmarks.throughput on the rows that it is usually given: titanlite's on its loader's, peers on
    random offsets. Evaluated on rows that each hold the beginning of one held-out document, so that masks do not
    matter."""

    def __init__(self, arm: str, config: Any, tokenizer: Any) -> None:
        import torch

        from benchmarks.throughput import peers
        from benchmarks.throughput.work import Case
        from titanlite.config import ValidationConfig

        torch.set_num_threads(2)
        self._config, seq_len = config, config.training.seq_len
        self.rows = rows_of("titanlite" if arm == "titanlite" else "random", config, tokenizer)
        texts = [json.loads(line)["text"] for line in Path(config.validation.paths[0]).read_text().splitlines()]
        beginnings = [tokenizer.encode_document(text)[: seq_len + 1] for text in texts]
        whole = [torch.from_numpy(ids.astype("int64")) for ids in beginnings if len(ids) == seq_len + 1]
        self._held = torch.stack(whole[:40])
        self._ours = Ordered("titanlite", config, tokenizer) if arm == "titanlite" else None
        assert isinstance(config.validation, ValidationConfig)
        if arm != "titanlite":
            make = {"litgpt": peers.litgpt, "transformers": peers.transformers_loop}[arm]
            self._loop = make(Case(seq_len, None, model=config.model))

    def step(self, rows: Any, step: int) -> None:
        from titanlite.optim import learning_rate

        if self._ours is not None:
            self._ours.step(rows, step)
            return
        config = self._config
        for group in self._loop.optimizer.param_groups:
            group["lr"] = learning_rate(step, config.training.steps, config.optimizer.lr, config.lr_scheduler)
        self._loop.step(rows)

    def validate(self) -> float:
        import torch

        from titanlite.validation import sum_of_losses

        if self._ours is not None:
            trainer, rows = self._ours.trainer, self._held[None]
            nats = sum_of_losses(trainer.model, rows, trainer.mesh, -1, trainer.backend, goes_on=lambda: True)
            assert nats is not None
            return nats / self._held[:, 1:].numel()
        with torch.no_grad():
            losses = [float(self._loop.loss(self._loop.model, rows)) for rows in self._held.split(8)]
        return statistics.mean(losses)


def run_all(runs: list[Run], results: Path, folder: Path) -> list[dict[str, Any]]:
    """Those that `results` does not hold, in processes; all results, in the order of the runs."""
    kept = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    found = {json.dumps(result["run"]): result for result in kept}
    missing = [run for run in runs if run.key not in found]

    def in_process(run: Run, threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "benchmarks.learning", "--run", run.key, "--folder", str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            problem = done.stderr.strip().splitlines()[-1:]
            result: dict[str, Any] = {"run": asdict(run), "left_out": " ".join(problem)}
        else:
            result = json.loads(done.stdout.splitlines()[-1])
        found[run.key] = json.loads(json.dumps(result))
        with results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        told = result.get("left_out") or f"loss {result['curve'][-1][1]:.4f}"
        done_by_now = sum(r.key in found for r in runs)
        what = f"{run.part}  {run.corpus}  {run.arm}  seed {run.seed}"
        print(f"{done_by_now} of {len(runs)}  {what}  {told}", flush=True)

    for timed in (False, True):
        chosen = [run for run in missing if (run.part == "time") == timed]
        with ThreadPoolExecutor(1 if timed else 2) as pool:
            list(pool.map(in_process, chosen, itertools.repeat(2 if timed else 1)))
    return [found[run.key] for run in runs]


def final(results: list[dict[str, Any]], **wanted: Any) -> list[float]:
    """Losses at the end of the runs that are as wanted."""
    return [r["curve"][-1][1] for r in results if "curve" in r and all(r["run"][k] == v for k, v in wanted.items())]


def order_table(results: list[dict[str, Any]]) -> tuple[str, bool]:
    lines = ["| corpus | " + " | ".join(ARMS) + " | above random | above shuffled |", "|" + "---|" * (len(ARMS) + 3)]
    met = True
    for corpus, what in CORPORA.items():
        losses = {arm: final(results, part="order", corpus=corpus, arm=arm) for arm in ARMS}
        if not all(losses.values()):
            continue
        means = {arm: statistics.mean(values) for arm, values in losses.items()}
        cells = [f"{means[arm]:.3f} ({', '.join(f'{v:.3f}' for v in losses[arm])})" for arm in ARMS]
        above = {arm: means["titanlite"] - means[arm] for arm in BOUNDS}
        met = met and all(above[arm] <= bound for arm, bound in BOUNDS.items())
        cells += [
            f"{above[arm]:+.3f} (bound {bound:+.2f}: {'met' if above[arm] <= bound else 'missed'})"
            for arm, bound in BOUNDS.items()
        ]
        lines.append(f"| {corpus} ({what}) | {' | '.join(cells)} |")
    return "\n".join(lines), met


def other_tables(results: list[dict[str, Any]]) -> str:
    parts = ["", "## AdamW and Muon", "", "| optimiser | rate: loss | best |", "|---|---|---|"]
    for name, rates in RATES.items():
        losses = {
            rate: final(results, overrides=[f"--optimizer.name={name}", f"--optimizer.lr={rate}"]) for rate in rates
        }
        shown = "; ".join(f"{rate:g}: {values[0]:.3f}" for rate, values in losses.items() if values)
        best = min((values[0] for values in losses.values() if values), default=float("nan"))
        parts.append(f"| {name} | {shown} | {best:.3f} |")
    parts += ["", "## Windows", "", "| data.window_tokens | loss |", "|---|---|"]
    for size in WINDOWS:
        values = final(results, part="window", overrides=[f"--data.window_tokens={size}"])
        parts += [f"| {size:,} | {value:.3f} |" for value in values]
    timed = {r["run"]["arm"]: r for r in results if r["run"]["part"] == "time"}
    curves = {arm: r["curve"] for arm, r in timed.items() if "curve" in r}
    if curves:
        target = max(min(loss for _, loss, _ in curve) for curve in curves.values())
        parts += [
            "",
            f"## Seconds until a validation loss of {target:.3f}",
            "",
            "| contender | s | step |",
            "|---|---|---|",
        ]
        for arm, curve in curves.items():
            step, _, seconds = next(point for point in curve if point[1] <= target)
            parts.append(f"| {arm} | {seconds:.0f} | {step} |")
        parts += [f"- {arm} left out: {r['left_out']}" for arm, r in timed.items() if "left_out" in r]
    return "\n".join(parts)


def draw(results: list[dict[str, Any]], out: Path) -> None:
    """The mean curve of each arm, a panel for each corpus."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(CORPORA), figsize=(10.2, 3.1))
    colours = dict(zip(ARMS, ("#c0392b", "#2c3e50", "#8395a7", "#c8d6e5"), strict=True))
    for panel, corpus in zip(panels, CORPORA, strict=True):
        for arm in ARMS:
            wanted = ("order", corpus, arm)
            curves = [r["curve"] for r in results if (r["run"]["part"], r["run"]["corpus"], r["run"]["arm"]) == wanted]
            if curves:
                points = [(p[0][0], statistics.mean(q[1] for q in p)) for p in zip(*curves, strict=True)][1:]
                panel.plot(*zip(*points, strict=True), label=arm, color=colours[arm], linewidth=1.5)
        panel.set_title(f"{corpus}: {CORPORA[corpus]}", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.set_xlabel("step", fontsize=8)
    panels[0].set_ylabel("validation loss, nats", fontsize=8)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def main() -> int:
    parser = command_line(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="a tiny model for a few steps: does it run at all?")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps of each run (default 100)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the comparison of orders (default 3)")
    parser.add_argument("--results", type=Path, help="JSON lines to keep results in; default: a temporary file")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one run, in this process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        values = json.loads(arguments.run)
        run = Run(**values | {"overrides": tuple(values["overrides"])})
        print(json.dumps(train(run, arguments.folder)))
        return 0
    if arguments.out is not None:  # what it needs is asked for before an hour of work, and not after it
        if find_spec("matplotlib") is None:
            parser.error("--out draws a picture too: pip install matplotlib")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpora(folder, 120 if arguments.quick else 10**6)
        runs = runs_of(arguments.quick, arguments.steps, arguments.seeds)
        results = run_all(runs, arguments.results or folder / "results.jsonl", folder)
    orders, met = order_table(results)
    picture = ""
    if arguments.out is not None and not arguments.quick:
        draw(results, arguments.out.with_suffix(".svg"))
        picture = f"\n![loss curves]({arguments.out.with_suffix('.svg').name})\n"
    publish(
        f"""# The loss after equal tokens, CPU, {date.today()}

Validation loss in nats after {arguments.steps} steps of 8 rows of 512 tokens: mean (each seed).

{orders}
{picture}{other_tables(results)}

- Model: train_configs/debug.toml's, 2,884,736 parameters, bfloat16 over float32 weights, AdamW at 1e-3 where not said
  otherwise; held-out files of the standard library with document masks. Seconds: float32, 2 threads, alone, without
  evaluation, whose rows are the beginnings of single held-out files
{circumstances(" ".join(["python -m benchmarks.learning", *sys.argv[1:]]), "")}""",
        arguments.out,
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

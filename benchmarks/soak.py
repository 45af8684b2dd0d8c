"""Kill a training run at random moments, hundreds of times, and count: python -m benchmarks.soak [--kills N] [--out F]

Runs a tiny model under torchrun and kills -9 one rank, the launcher or everything at a random moment after the start:
while it imports, builds the index, loads, makes steps or saves (one half of the runs saves asynchronously). Then it
starts the run again, with nothing cleaned by hand, until it has finished; then the next run. Half of the runs keep two
ranks, and end with the weights and moments of an uninterrupted run, bit for bit; the others change between 1, 2 and 4
ranks. All end with its batch fingerprints, each step once. After every kill all processes must have ended by
themselves within a minute, and every checkpoint must be whole, byte for byte; the seconds of the slowest are told.

Exit code 0 only if all of that held after each kill. Two cores take about 15 seconds a kill.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from tqdm import tqdm

from benchmarks.common import circumstances, command_line, publish
from titanlite.checkpoint import audit_checkpoint, list_steps

STEPS, INTERVAL = 600, 10
SENTENCE = "a run that is killed at any moment goes on as if nothing had happened and loses no token of its data"
CONFIG = """\
[tokenizer]
path = "{tokenizer}"
[model]
dim = 32
n_layers = 2
n_heads = 4
n_kv_heads = 2
ffn_dim = 64
vocab_size = 8192
[data]
paths = ["{corpus}"]
cache_dir = "{cache}"
[training]
steps = {steps}
seq_len = 64
global_batch_size = 8
local_batch_size = 2
[optimizer]
lr = 0.01
[activation_checkpoint]
mode = "none"
[checkpoint]
interval = {interval}
[metrics]
log_freq = 1
[comm]
train_timeout_seconds = 60
"""
TARGETS = ("one rank", "launcher", "everything")
MAX_SECONDS_TO_END = 60.0


@dataclass
class Tally:
    """What was seen. `wrong` holds a line for each thing that must not happen."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By (target, what the run was doing)."""
    runs: Counter[str] = field(default_factory=Counter)
    lives: int = 0
    slowest_end: float = 0.0
    wrong: list[str] = field(default_factory=list)


def write_files(folder: Path) -> Path:
    """A corpus of 2,000 generated documents and a config; returns the config's path."""
    rng = random.Random(0)
    with (folder / "corpus.jsonl").open("w") as file:
        for _ in range(2000):
            file.write(
                json.dumps({"text": " ".join(rng.choices(SENTENCE.split(), k=rng.choice((1, 5, 40, 400))))}) + "\n"
            )
    config = folder / "config.toml"
    tokenizer = Path(__file__).resolve().parent.parent / "assets/tokenizer"
    cache, corpus = folder / "cache", folder / "corpus.jsonl"
    config.write_text(CONFIG.format(tokenizer=tokenizer, corpus=corpus, cache=cache, steps=STEPS, interval=INTERVAL))
    return config


def start(config: Path, run: Path, num_ranks: int, async_mode: str, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    command += ["-m", "titanlite.train", "--job.config_file", str(config), "--job.dump_folder", str(run)]
    command += ["--checkpoint.async_mode", async_mode]
    with log.open("ab") as output:
        return subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=output, start_new_session=True
        )


def processes_of(run: Path) -> list[int]:
    """Live processes with the run's folder in their command line, the launcher first."""
    listing = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,stat=,args="], capture_output=True, text=True, check=True)
    found = []
    for line in listing.stdout.splitlines():
        pid, state, command = line.split(None, 2)
        if f"--job.dump_folder {run}" in command and not state.startswith("Z"):
            found.append((" torch.distributed.run " not in command, int(pid)))
    return [pid for _, pid in sorted(found)]


def doing(run: Path) -> str:
    """What the run was about, as its folder tells."""
    checkpoints = run / "checkpoint"
    if checkpoints.exists() and any(name.startswith(".tmp-") for name in os.listdir(checkpoints)):
        return "saving"
    try:
        state = json.loads((run / "status.json").read_text())["state"]
    except FileNotFoundError:
        return "importing"
    return {"running": "steps", "starting": "loading"}.get(state, "importing")


def kill(target: str, run: Path, rng: random.Random) -> bool:
    """Kill -9; false where there was nothing to kill any more."""
    processes = processes_of(run)
    if not processes:
        return False
    chosen = {"launcher": processes[:1], "everything": processes}.get(target) or [
        rng.choice(processes[1:] or processes)
    ]
    for pid in chosen:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
    return True


def wait_for_the_end(run: Path, job: subprocess.Popen[bytes]) -> float:
    """Seconds until all processes of the run had ended; those that outlive the limit are killed."""
    began = time.monotonic()
    while left := processes_of(run):
        job.poll()
        if time.monotonic() - began > MAX_SECONDS_TO_END:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.1)
    job.wait()
    return time.monotonic() - began


def check_checkpoints(run: Path) -> list[str]:
    """What is wrong with the folders that count as checkpoints."""
    return [
        problem for path in list_steps(str(run / "checkpoint")).values() for problem in audit_checkpoint(path).problems
    ]


def one_life(run: Path, job: subprocess.Popen[bytes], target: str, rng: random.Random, tally: Tally, bar: tqdm) -> None:
    """Let the started run live for a random time, kill, wait, check."""
    job_began, cursors = time.monotonic(), run / "cursor.jsonl"
    before = cursors.stat().st_size if cursors.exists() else 0
    if rng.random() < 0.75:  # else anywhere in the start
        while job.poll() is None and (not cursors.exists() or cursors.stat().st_size <= before):
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 3.0))
    else:
        time.sleep(rng.uniform(0.0, 8.0))
    about = doing(run)
    killed = kill(target, run, rng)
    seconds = wait_for_the_end(run, job)
    if not killed:
        return
    tally.kills[target, about] += 1
    tally.slowest_end = max(tally.slowest_end, seconds)
    bar.update()
    place = f"{run.name}, {about}, {time.monotonic() - job_began:.1f} s after the start, {target} killed"
    if seconds > MAX_SECONDS_TO_END:
        tally.wrong.append(f"{place}: processes were alive after {seconds:.0f} s")
    tally.wrong += [f"{place}: {problem}" for problem in check_checkpoints(run)]


def fingerprints(run: Path) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["step"], []).append(row["batch_fingerprint"])
    return found


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """Weights and moments at the end, read by torch alone."""
    whole = run / "whole.pt"
    dcp_to_torch_save(run / f"checkpoint/step-{STEPS:08d}", whole)
    state: dict[str, torch.Tensor] = torch.load(whole)
    whole.unlink()
    return state


def check_end(run: Path, code: int, reference: Path, constant: bool) -> list[str]:
    """What is wrong with a run that has finished."""
    if code != 0:
        return [f"{run.name}: its last start ended with exit code {code}"]
    wrong = []
    if fingerprints(run) != fingerprints(reference):
        wrong.append(f"{run.name}: its batches are not those of an uninterrupted run, each once")
    if constant:
        own, exact = final_state(run), final_state(reference)
        wrong += [f"{run.name}: {name} differs" for name in exact if not torch.equal(own[name], exact[name])]
    return wrong


def soak(folder: Path, num_kills: int, seed: int) -> Tally:
    rng, tally, config = random.Random(seed), Tally(), write_files(folder)
    reference = folder / "uninterrupted"
    if code := start(config, reference, 2, "disabled", folder / "uninterrupted.log").wait():
        raise RuntimeError(f"the uninterrupted run ended with {code}: {(folder / 'uninterrupted.log').read_text()}")
    with tqdm(total=num_kills, unit="kill", disable=None) as bar:
        while tally.kills.total() < num_kills:
            number = tally.runs.total()
            constant, async_mode = number % 2 == 0, ("disabled", "async")[number // 2 % 2]
            run, log = folder / f"run-{number}", folder / f"run-{number}.log"
            for _ in range(rng.randint(6, 14)):
                if tally.kills.total() == num_kills:
                    break
                if rng.random() < 0.2:
                    for index in (folder / "cache").glob("*"):  # the next start builds it again
                        index.unlink()
                job = start(config, run, 2 if constant else rng.choice((1, 2, 4)), async_mode, log)
                tally.lives += 1
                one_life(run, job, rng.choice(TARGETS), rng, tally, bar)
            code = start(config, run, 2 if constant else rng.choice((1, 2, 4)), async_mode, log).wait()
            tally.lives += 1
            wrong = check_end(run, code, reference, constant)
            if code:
                print(log.read_text()[-4000:], file=sys.stderr)
            tally.wrong += wrong
            tally.runs["right" if not wrong else "wrong"] += 1
    return tally


def report(tally: Tally, arguments: argparse.Namespace) -> str:
    phases = sorted({phase for _, phase in tally.kills})
    lines = [f"| killed | {' | '.join(phases)} | all |", "|---|" + "---|" * (len(phases) + 1)]
    for target in TARGETS:
        counts = [tally.kills[target, phase] for phase in phases]
        lines.append(f"| {target} | {' | '.join(map(str, counts))} | {sum(counts)} |")
    total = tally.kills.total()
    harmless = total - len(tally.wrong)
    wrong = "".join(f"- WRONG: {line}\n" for line in tally.wrong)
    return f"""# Kills at random moments, CPU, {date.today()}

{chr(10).join(lines)}

{harmless} of {total} kills cost nothing but the steps since the last checkpoint, in {tally.lives} starts of
{tally.runs.total()} runs of {STEPS} steps with a checkpoint every {INTERVAL}: {tally.runs["right"]} runs ended with the
batches of an uninterrupted run, each once, and where they kept two ranks with its weights and moments, bit for bit.
Processes that were not killed had ended after {tally.slowest_end:.1f} s at most. What a run did when it was killed
is told by its folder.

{wrong}- Load at the end: {os.getloadavg()[0]:.1f}
{circumstances(f"python -m benchmarks.soak --kills {arguments.kills} --seed {arguments.seed}", "")}"""


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--kills", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        tally = soak(Path(folder), arguments.kills, arguments.seed)
    publish(report(tally, arguments), arguments.out)
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""How long a start takes, each beside its floor: python -m benchmarks.startup [--rounds N] [--out FILE]

Every command is a process of its own, and all take turns. The floor of a command that needs no torch is an empty
Python; that of the others is Python with the modules of torch that any FSDP2 trainer imports. The first step is of a
model of 0.1 M parameters on the built-in corpus, with its index built anew: what remains is titanlite's own.
"""

import os
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from benchmarks.common import circumstances, command_line, publish

TORCH = "import torch, torch.distributed.fsdp, torch.distributed.tensor.parallel, torch.distributed.checkpoint"
TINY = {
    "--model.dim": "64",
    "--model.n_layers": "2",
    "--model.n_heads": "2",
    "--model.n_kv_heads": "2",
    "--model.ffn_dim": "64",
    "--training.steps": "1",
    "--training.seq_len": "128",
    "--checkpoint.enable": "false",
}
PYTHON_FLOOR, TORCH_FLOOR = "python", "python + torch"


def commands(folder: str) -> dict[str, tuple[str, list[str]]]:
    """Floor and arguments of Python by name."""
    config = str(Path(__file__).resolve().parent.parent / "train_configs/debug.toml")
    tiny = [part for option in TINY.items() for part in option]
    data = ["--job.dump_folder", folder, "--data.cache_dir", folder]
    return {
        PYTHON_FLOOR: (PYTHON_FLOOR, ["-c", "pass"]),
        "import titanlite": (PYTHON_FLOOR, ["-c", "import titanlite"]),
        "train --help": (PYTHON_FLOOR, ["-m", "titanlite.train", "--help"]),
        "config check": (PYTHON_FLOOR, ["-m", "titanlite.config", "--job.config_file", config]),
        TORCH_FLOOR: (TORCH_FLOOR, ["-c", TORCH]),
        "train, until one step is done": (TORCH_FLOOR, ["-m", "titanlite.train", *tiny, *data]),
    }


def run(arguments: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a Python process; raises CalledProcessError where it fails."""
    begin, before = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    wall, after = time.perf_counter() - begin, os.times()
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr.decode()[-500:]}")
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return wall, cpu


def measure(rounds: int) -> dict[str, list[tuple[float, float]]]:
    times: dict[str, list[tuple[float, float]]] = {}
    for number in tqdm(range(rounds + 1), unit="round", leave=False, disable=None):
        with TemporaryDirectory() as folder:
            for name, (_, arguments) in commands(folder).items():
                seconds = run(arguments)
                if number:  # the first round reads everything from the disk
                    times.setdefault(name, []).append(seconds)
    return times


def table(times: dict[str, list[tuple[float, float]]]) -> str:
    lines = ["| | wall s, median (range) | CPU s, median | its floor | wall over the floor |", "|---|---|---|---|---|"]
    for name, (floor, _) in commands("").items():
        wall, cpu = zip(*times[name], strict=True)
        over = statistics.median(own - base for own, (base, _) in zip(wall, times[floor], strict=True))
        lines.append(
            f"| {name} | {statistics.median(wall):.2f} ({min(wall):.2f}-{max(wall):.2f}) | {statistics.median(cpu):.2f}"
            f" | {floor} | {'' if name == floor else f'{over:+.2f} s'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="counted starts of each (default 7)")
    arguments = parser.parse_args()
    times = measure(arguments.rounds)
    publish(
        f"""# Starting up, CPU, {date.today()}

{table(times)}

{arguments.rounds} starts of each, in turn, after one that is not counted.

{circumstances(f"python -m benchmarks.startup --rounds {arguments.rounds}", "")}""",
        arguments.out,
    )


if __name__ == "__main__":
    main()

"""Layouts as a user writes them, 2x2+ac=full, and the config of a run under each."""

import re
from dataclasses import dataclass
from pathlib import Path

from titanlite.config import Config, ConfigError, check, load_config

SYNTAX = """\
layouts, separated by commas; the first is the reference:
  DxT            D data-parallel ranks that share one sharded copy of the model (FSDP2), x T tensor-parallel ranks
  hsdpRxS[xT]    R replicas of a model that S ranks share (HSDP), x T tensor-parallel ranks
each with any of these options, as in 2x2+ac=full+workers=3+accumulate=2+compile
  +accumulate=N        each rank takes its rows of a step in N micro-batches
  +ac=MODE             activation_checkpoint.mode
  +workers=N           data.num_workers
  +compile[=BACKEND]   compile.enable
  +section.key=value   any other key of the config

--section.key VALUE sets a key of the config for all layouts (python -m titanlite.train --help lists them); `true` for
training.deterministic is the default here.
"""
SHORT = {"ac": "activation_checkpoint.mode", "workers": "data.num_workers"}
DTYPE_KEYS = ("training.dtype", "training.mixed_precision_param", "training.mixed_precision_reduce")


@dataclass(frozen=True)
class Layout:
    text: str
    world_size: int
    config: Config


def read_layouts(text: str, arguments: list[str], folder: Path, *, float64: bool) -> list[Layout]:
    """The layouts of a comma-separated list, with the configs of their runs: `arguments` is the config's command line.

    Each run gets a folder of its own in `folder`. Raises ValueError, in which layout and key are named.
    """
    texts = text.split(",")
    if len(texts) < 2:
        raise ValueError(f"--layouts {text}: name two or more, the first of which is the reference")
    ours = ["--training.deterministic=true"]  # the user's arguments come later, and win
    if float64:
        ours += [f"--{key}=float64" for key in DTYPE_KEYS]
    unread = ["checkpoint.enable", "metrics.enable_tensorboard", "profiling.enable_profiling"]
    ours_at_last = [f"--{key}=false" for key in (*unread, "profiling.enable_memory_snapshot")]
    ours_at_last += ["--checkpoint.resume=auto", "--validation.sample_prompts="]
    layouts = []
    for number, text in enumerate(texts):
        try:
            world_size, accumulate, of_layout = parse_layout(text)
            argv = [*ours, *arguments, *of_layout, *ours_at_last, f"--job.dump_folder={folder / str(number)}"]
            config = load_config(argv)
            if accumulate:
                config = load_config([*argv, f"--training.local_batch_size={micro_batch(config, accumulate)}"])
            if problems := check(config, world_size):
                raise ConfigError(problems)
        except ValueError as error:
            raise ValueError(f"layout {text}: {error}") from None
        layouts.append(Layout(text, world_size, config))
    return layouts


def parse_layout(text: str) -> tuple[int, int, list[str]]:
    """Number of ranks, number of micro-batches (0: not said) and config arguments of a layout."""
    degrees, *options = text.split("+")
    match = re.fullmatch(r"hsdp(\d+)x(\d+)(?:x(\d+))?|(\d+)x(\d+)", degrees)
    if not match:
        raise ValueError("write DxT or hsdpRxS[xT] and +options, as in 2x2, hsdp2x2 or 1x2+compile; see --help")
    r, s, t = (match[1], match[2], match[3] or "1") if match[1] else ("1", match[4], match[5])
    arguments = [
        f"--parallelism.data_parallel_replicate_degree={r}",
        f"--parallelism.data_parallel_shard_degree={s}",
        f"--parallelism.tensor_parallel_degree={t}",
    ]
    accumulate = 0
    for option in options:
        key, equals, value = option.partition("=")
        if key == "accumulate" and value.isdecimal() and int(value):
            accumulate = int(value)
        elif key == "compile":
            arguments += ["--compile.enable=true", *([f"--compile.backend={value}"] if equals else [])]
        elif key in SHORT or "." in key:
            arguments.append(f"--{SHORT.get(key, key)}={value}")
        else:
            raise ValueError(f"+{option} is no option: write ac=, accumulate=, workers=, compile or section.key=")
    return int(r) * int(s) * int(t), accumulate, arguments


def micro_batch(config: Config, num_micro_batches: int) -> int:
    """Rows of a micro-batch where a rank's rows of a step are taken in so many."""
    parallelism = config.parallelism
    dp_degree = parallelism.data_parallel_replicate_degree * parallelism.data_parallel_shard_degree
    rows = config.training.global_batch_size // dp_degree
    if rows % num_micro_batches:
        raise ValueError(f"accumulate={num_micro_batches} does not divide the {rows} rows that a rank takes")
    return rows // num_micro_batches

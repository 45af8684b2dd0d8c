"""A complete, tiny training run for tests: generated corpus, byte tokenizer, a model of a few thousand parameters."""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.support.make_tokenizers import single_bytes, write_tokenizer

SENTENCE = "the model reads a row of tokens and learns what comes next in this document but not in any other"
NUM_DOCUMENTS = 40


def text(number: int) -> str:
    """Document `number` of the generated corpus: 1 to 400 words."""
    rng = random.Random(number)
    return " ".join(rng.choices(SENTENCE.split(), k=rng.choice((1, 5, 40, 400))))


def write_corpus(folder: Path) -> str:
    """Forty text files; returns their glob."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(NUM_DOCUMENTS):
        (folder / f"{number:02}.txt").write_text(text(number))
    return str(folder / "*.txt")


def write_config(folder: Path, *, paths: str | None = None, **overrides: Any) -> Path:
    """A config file with its tokenizer and corpus in `folder`; overrides are `section__key=value`."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"<|begin|>": 256, "<|end|>": 257}
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        write_tokenizer(tokenizer, single_bytes(), special, bos_token="<|begin|>", eos_token="<|end|>")
    values: dict[str, dict[str, Any]] = {
        "job": {"dump_folder": str(folder / "run")},
        "tokenizer": {"path": str(tokenizer)},
        "model": {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 64, "vocab_size": 260},
        "data": {
            "paths": [paths or write_corpus(folder / "corpus")],
            "cache_dir": str(folder / "cache"),
            "window_tokens": 64 * overrides.get("training__seq_len", 64),  # the smallest window: runs meet many
        },
        "training": {"steps": 8, "seq_len": 64, "global_batch_size": 8, "local_batch_size": 2},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"interval": 4},
        "activation_checkpoint": {"mode": "none"},
        "metrics": {"log_freq": 1},
    }
    for name, value in overrides.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    lines = []
    for section, table in values.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items()), ""]
    path = folder / "config.toml"
    path.write_text("\n".join(lines))
    return path


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def logged_steps(run: Path) -> list[dict[str, Any]]:
    """Without the lines of validations."""
    return [row for row in metrics(run) if "batch_fingerprint" in row]


def fingerprints(run: Path) -> dict[int, str]:
    """By step; fails where a step stands twice."""
    rows = logged_steps(run)
    found = {row["step"]: row["batch_fingerprint"] for row in rows}
    assert len(found) == len(rows)
    return found


def descendants(pid: int) -> list[int]:
    """The process and all that it started, parents first."""
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listing.splitlines()]
    family = [pid]
    for parent in family:
        family += [child for child, its_parent in pairs if its_parent == parent]
    return family


def state_of(checkpoint: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read by torch alone."""
    whole = scratch / "whole.pt"
    dcp_to_torch_save(checkpoint, whole)
    state: dict[str, torch.Tensor] = torch.load(whole)
    return state

"""Continue prompts with a trained model: python -m titanlite.generate --checkpoint RUN --prompt "..."

Straight from a training run's checkpoint, whatever its layout. Under torchrun all ranks are tensor-parallel peers.
`--help` explains every option.
"""

import argparse
import math
import os
import sys
import time
from typing import TYPE_CHECKING

from titanlite.command import exit_code
from titanlite.config import OneLineParser
from titanlite.generate.text import Continuation, Printer, read_prompts

if TYPE_CHECKING:
    import torch

    from titanlite.loading import Pretrained

_TIMEOUT_SECONDS = 600
DESCRIPTION = """\
Continue prompts with the model of a training run's checkpoint, of whatever layout. Standard output gets each prompt
with its continuation; a single prompt's grows as tokens come, those of several come whole and in order. The log and the
speed go to standard error. Under torchrun every rank is a tensor-parallel peer:
  torchrun --nproc_per_node=2 -m titanlite.generate ...

A prompt begins as a document does in training: with bos, where the tokenizer has one. It is ordinary text: a special
token's name in it stands for its characters. The result for a prompt does not depend on the other prompts or on their
order (but for rounding: --dtype float64 leaves next to none). Positions beyond training.seq_len are computed, with a
warning: the model was not trained for them.
"""


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 a failure told in one line."""
    rank = int(os.environ.get("RANK", "0"))

    def work() -> bool:
        options = parse_arguments(sys.argv[1:] if argv is None else argv)
        prompts = all_prompts(options)
        # From here on torch is imported, which takes seconds: a mistake in the command line should not.
        import torch

        from titanlite.log import init_logging
        from titanlite.run.agreement import RunFailed

        init_logging(rank)
        try:
            run(options, prompts)
        except torch.OutOfMemoryError as error:  # perhaps of one rank alone
            text = str(error).splitlines()[0]
            print(f"titanlite: {text} Use a smaller --batch_size or more ranks", file=sys.stderr)
            return False
        except RunFailed as error:
            raise ValueError(error) from error
        return True

    return exit_code(work, speaks=rank == 0)  # else the same on every rank


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The options, checked. Raises ValueError, one line."""
    parser = OneLineParser(
        prog="python -m titanlite.generate",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="checkpoint folder (RUN/checkpoint/step-N), or a run's folder: its newest valid checkpoint",
    )
    add("--ema", action="store_true", help="take the average of the weights (training.ema_decay) in their place")
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be given several times")
    add(
        "--prompt_file",
        "--prompt-file",
        metavar="FILE",
        help="more prompts, one a line (- for standard input); in a .jsonl file a line is a JSON string, or an object"
        ' with the field "prompt". Empty lines are left out',
    )
    add("--max_new_tokens", type=int, default=128, metavar="N", help="tokens to add at most (default: 128)")
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: always the most probable token; else logits are divided by T and tokens are drawn (default: 0)",
    )
    add("--top_k", type=int, metavar="K", help="draw from the K most probable tokens only (default: all)")
    add(
        "--top_p",
        type=float,
        metavar="P",
        help="draw from the fewest tokens that have probability P together, after --top_k (default: 1, all)",
    )
    add(
        "--seed",
        type=int,
        metavar="SEED",
        help="of the draws; equal prompts in one call get different draws (default: 0)",
    )
    add("--batch_size", type=int, default=16, metavar="N", help="prompts that are continued at once (default: 16)")
    add(
        "--json",
        action="store_true",
        help="print one JSON object per prompt: prompt, text, finish (eos or length), tokens, num_prompt_tokens",
    )
    add("--tokenizer", metavar="DIR", help="where the run's tokenizer is now (default: tokenizer.path of its config)")
    types = ("auto", "bfloat16", "float32", "float64")
    add(
        "--dtype",
        choices=types,
        default="auto",
        help="of weights and activations; auto: of training's forward pass on this device (default: auto)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one (default)")
    options = parser.parse_args(argv)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    for name in ("max_new_tokens", "batch_size", "top_k"):
        value = getattr(options, name)
        if value is not None and not 1 <= value < 2**31:
            raise ValueError(f"--{name} {value}: give a number from 1 on")
    if not (options.temperature >= 0 and math.isfinite(options.temperature)):
        raise ValueError(f"--temperature {options.temperature}: give a finite number, 0 or above")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise ValueError(f"--top_p {options.top_p}: give a probability above 0, at most 1")
    if options.temperature == 0:
        for name in ("top_k", "top_p", "seed"):
            if (value := getattr(options, name)) is not None:
                raise ValueError(f"--{name} {value} has no effect on greedy choice: give --temperature too, as 1.0")


def all_prompts(options: argparse.Namespace) -> list[str]:
    """Those of the command line, then those of the file."""
    prompts = [*options.prompt, *(read_prompts(options.prompt_file) if options.prompt_file else [])]
    if not prompts:
        raise ValueError("nothing to continue: give --prompt TEXT or --prompt_file FILE")
    return prompts


def run(options: argparse.Namespace, prompts: list[str]) -> None:
    """Load, continue and print. Collective under torchrun."""
    import torch
    import torch.distributed as dist

    from titanlite.loading import load_model
    from titanlite.parallel.mesh import build_mesh
    from titanlite.run.joining import init_process_group

    device_type = options.device
    if device_type == "auto":
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    elif device_type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu")
    joined = init_process_group(device_type, _TIMEOUT_SECONDS)
    try:
        mesh = build_mesh(device_type, 1, 1, dist.get_world_size())
        dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
        pretrained = load_model(options.checkpoint, mesh, dtype, options.tokenizer, use_ema=options.ema)
        continue_all(pretrained, prompts, options, mesh.device)
    finally:
        if joined:
            dist.destroy_process_group()


def continue_all(
    pretrained: "Pretrained", prompts: list[str], options: argparse.Namespace, device: "torch.device"
) -> None:
    """Continue the prompts batch by batch; rank 0 prints them, and at the end the speed."""
    import torch.distributed as dist

    from titanlite.generate.sampling import Sampler, Sampling, generators
    from titanlite.log import logger
    from titanlite.model.decode import generate

    model, config, tokenizer, path = pretrained
    encoded = tokenizer.encode_prompts(prompts)
    longest = max(map(len, encoded)) + options.max_new_tokens
    dtype = str(model.norm.weight.dtype).removeprefix("torch.")
    logger.info("%s: %s on %d x %s", path, dtype, dist.get_world_size(), device.type)
    if longest > config.training.seq_len:
        logger.warning(
            "up to %d tokens, with the longest prompt and --max_new_tokens %d, are more than training.seq_len = %d: the"
            " model was not trained for such positions",
            *(longest, options.max_new_tokens, config.training.seq_len),
        )
    sampling = Sampling(options.temperature, options.top_k, options.top_p or 1.0, options.seed or 0)
    made = [Continuation(prompt, len(ids)) for prompt, ids in zip(prompts, encoded, strict=True)]
    drawing, unused_ids = generators(encoded, sampling.seed), tokenizer.unused_ids()
    printer = Printer(made, tokenizer, options.json) if dist.get_rank() == 0 else None
    seconds = prompt_seconds = 0.0
    num_new = 0
    for first in range(0, len(prompts), options.batch_size):
        batch, began = slice(first, first + options.batch_size), time.perf_counter()
        steps = generate(
            model,
            encoded[batch],
            max_new_tokens=options.max_new_tokens,
            eos_id=tokenizer.eos_id,
            choose=Sampler(sampling, drawing[batch], tokenizer.vocab_size, unused_ids),
            device=device,
        )
        for step, tokens in enumerate(steps):
            prompt_seconds += time.perf_counter() - began if step == 0 else 0.0
            for continuation, token in zip(made[batch], tokens, strict=True):
                if token is not None:
                    continuation.take(token, tokenizer.eos_id, options.max_new_tokens)
                    num_new += 1
            if printer:
                printer.update()
        seconds += time.perf_counter() - began
    if printer:
        print(
            f"titanlite: {num_new:,} new tokens in {seconds:.2f} s: {num_new / seconds:,.1f} tokens/s (of the time,"
            f" {sum(map(len, encoded)):,} tokens of prompts took {prompt_seconds:.2f} s)",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())

"""A checkpoint to a Hugging Face folder and back: python -m titanlite.convert to-hf|from-hf SOURCE OUT

`--help` explains it, `to-hf --help` and `from-hf --help` their options.
"""

import argparse
import re
import sys

from titanlite.command import exit_code
from titanlite.config import OneLineParser

DESCRIPTION = """\
Convert between titanlite's checkpoints and Hugging Face folders (LLaMA: config.json, safetensors, tokenizer.json).
Tensor by tensor, so that a model need not fit into memory. Before OUT appears under its name, it is reopened and its
logits on real text are compared with the source's; the largest difference is printed. Nothing that lies in a folder is
ever executed: pickled weights are refused.
"""
TO_HF = """\
Write the model of a checkpoint, of whatever layout, as a folder that AutoModelForCausalLM and AutoTokenizer open. Its
tokenizer gives the ids of training: a text begins with bos where the tokenizer has one, and a special token's name in a
text stands for its characters (split_special_tokens).
"""
FROM_HF = """\
Import a LLaMA in safetensors. OUT gets a checkpoint (step-00000000) that checkpoint.init_from and titanlite.generate
take, the tokenizer if it is a byte-level BPE, and config.toml to start a run from, which is printed too. A key of
config.json that is not understood, a tensor too many, missing or of another shape: refused, all of them at once.
"""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 a failure told in one line; OUT is not there then."""
    arguments = sys.argv[1:] if argv is None else argv
    return exit_code(lambda: convert(parse_arguments(arguments)), interrupted="interrupted, OUT is not written")


def convert(options: argparse.Namespace) -> bool:
    """Convert, and print what was compared."""
    # torch is imported here, which takes seconds: a mistake in the command line should not.
    import torch

    from titanlite.convert.conversion import from_hf, to_hf
    from titanlite.log import init_logging

    init_logging()
    if options.verb == "to-hf":
        dtype = getattr(torch, options.dtype)
        shard, tokenizer = options.shard_size, options.tokenizer
        lines = to_hf(options.source, options.out, dtype, shard, tokenizer, options.check, use_ema=options.ema)
    else:
        lines = from_hf(options.source, options.out, options.check)
    print("\n".join(lines))
    return True


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The options, checked. Raises ValueError, one line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog="python -m titanlite.convert", description=DESCRIPTION, formatter_class=layout)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="to-hf|from-hf")
    to_hf = verbs.add_parser("to-hf", help="checkpoint to folder", description=TO_HF, formatter_class=layout)
    to_hf.add_argument(
        "source", metavar="CHECKPOINT", help="RUN/checkpoint/step-N, or a run's folder: its newest valid checkpoint"
    )
    to_hf.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    to_hf.add_argument(
        "--ema", action="store_true", help="write the average of the weights (training.ema_decay) in their place"
    )
    to_hf.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the written weights (default: float32)"
    )
    to_hf.add_argument(
        "--shard_size",
        "--shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="bytes of a weight file at most, as 500MB; a larger tensor gets a file of its own (default: 5GB)",
    )
    to_hf.add_argument(
        "--tokenizer", metavar="DIR", help="where the run's tokenizer is now (default: tokenizer.path of its config)"
    )
    from_hf = verbs.add_parser("from-hf", help="folder to checkpoint", description=FROM_HF, formatter_class=layout)
    from_hf.add_argument("source", metavar="DIR", help="folder with config.json and safetensors files")
    from_hf.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    for verb in (to_hf, from_hf):
        verb.add_argument(
            "--check",
            choices=("auto", "transformers", "streamed"),
            default="auto",
            help="who computes the Hugging Face folder's logits. streamed: titanlite's own reader, layer by layer."
            " auto: transformers where it is installed and the model takes less than half the memory (default: auto)",
        )
    return parser.parse_args(argv)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B?)", text.upper())
    size = int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write a number and KB, MB, GB or TB, as 5GB")
    return size


if __name__ == "__main__":
    sys.exit(main())

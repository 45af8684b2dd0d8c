"""What a run will need, before it is launched: python -m titanlite.plan --job.config_file FILE --world_size N

`--help` explains every option.
"""

import argparse
import json
import sys

from titanlite.command import exit_code
from titanlite.config import ConfigError, OneLineParser, check, load_config

DESCRIPTION = """\
Parameters, memory of a rank for each way of activation checkpointing, size of a checkpoint, tokens, epochs and time of
a run. Needs no GPU, and memory for no tensor: it makes one step of the real training code on fake tensors, as the first
of N ranks that are not there. A deep model is extended from 2 and 3 layers.
"""
# Names that people say -> what torch.cuda.get_device_name says, by which titanlite.run.metrics knows peaks.
DEVICE_NAMES = {"A100": "A100-SXM4-80GB", "H100": "H100 80GB HBM3"}


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 planned, 1 a mistake told in one line."""
    return exit_code(lambda: run(*parse_arguments(sys.argv[1:] if argv is None else argv)))


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The verb's own options, checked, and the config's arguments. Raises ValueError, one line."""
    parser = OneLineParser(
        prog="python -m titanlite.plan",
        usage="%(prog)s --job.config_file FILE --world_size N [--mfu X] [--device NAME | --peak_tflops X] [--exact]"
        " [--json] [--section.key VALUE ...]",
        description=DESCRIPTION,
        epilog="--section.key VALUE overrides a key of the config: python -m titanlite.train --help explains them all.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--world_size", type=int, required=True, metavar="N", help="number of ranks, one for each device")
    add("--mfu", type=float, default=0.4, metavar="X", help="assumed share of the devices' peak (default: 0.4)")
    add(
        "--device",
        default="H100",
        metavar="NAME",
        help="A100, H100, H200, B200, L40S, ..., or as nvidia-smi names it; cpu: as titanlite trains there"
        " (default: H100)",
    )
    add("--peak_tflops", type=float, metavar="X", help="the device's dense bf16 peak, where it is not known by name")
    add("--exact", action="store_true", help="trace all layers instead of 2 and 3, which takes longer")
    add("--json", action="store_true", help="print one JSON object, sizes in bytes and times in seconds")
    options, arguments = parser.parse_known_args(argv)
    if not 1 <= options.world_size < 2**31:
        raise ValueError(f"--world_size {options.world_size}: give a number of ranks, 1 or more")
    if not 0 < options.mfu <= 1:
        raise ValueError(f"--mfu {options.mfu}: give a share of the peak above 0, at most 1")
    if options.peak_tflops is not None and not 0 < options.peak_tflops < 1e9:
        raise ValueError(f"--peak_tflops {options.peak_tflops}: give TFLOP/s of one device, above 0")
    return options, arguments


def run(options: argparse.Namespace, arguments: list[str]) -> bool:
    """Plan and print."""
    config = load_config(arguments)
    if problems := check(config, options.world_size):
        raise ConfigError(problems)
    # torch is imported here, which takes seconds: a mistake in the command line or the config should not.
    from tqdm import tqdm

    from titanlite.log import init_logging
    from titanlite.plan.facts import MODES, plan_facts
    from titanlite.plan.tables import tables
    from titanlite.run.metrics import peak_flops

    init_logging()
    peak = peak_flops(DEVICE_NAMES.get(options.device, options.device))
    if options.peak_tflops is not None:
        peak = options.peak_tflops * 1e12
    elif peak is None and options.device != "cpu":
        raise ValueError(f"--device {options.device}: its peak is not known; give it as --peak_tflops")
    with tqdm(total=(1 if options.exact else 2) * len(MODES), desc="tracing", leave=False, disable=None) as bar:
        facts = plan_facts(
            config,
            options.world_size,
            device=options.device,
            peak_flops=peak,
            mfu=options.mfu,
            exact=options.exact,
            progress=bar.update,
        )
    print(json.dumps(facts, indent=2) if options.json else tables(facts))
    return True


if __name__ == "__main__":
    sys.exit(main())

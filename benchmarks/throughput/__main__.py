"""titanlite's tokens per second beside its peers and its floors: python -m benchmarks.throughput [--quick] [--out FILE]

All contenders train the same LLaMA (dim 256, 6 layers, 8 heads, 4 key-value heads, SwiGLU 768, vocabulary 8192, untied:
8.9 M parameters) with AdamW and clipping on the same rows, step by step in turn, each in a process of its own, on the
CPU with two threads. All start from the same weights, and their first losses are compared. Peers: transformers (a plain
loop, one that knows the documents, and its Trainer), litgpt, torchtitan's model. Floors: a bare FSDP2 loop around
titanlite's model (it only makes a step), the matrix products alone, and those with the attention that the documents
need. The floors keep the memory that they free, as titanlite does.

Peers come with `pip install titanlite[benchmarks]`; one that is missing or fails is reported with its error.
Exit code 1: a bound is missed by more than the noise: the better quartile of the ratios of the rounds misses it too.
"""

import sys

from benchmarks.common import command_line, publish
from benchmarks.throughput.measure import contenders_of, peak_bytes, run_case
from benchmarks.throughput.report import Results, bounds, report
from benchmarks.throughput.work import Case, NumberFormat

QUICK = [
    Case(2048, None),
    Case(2048, 300),
    Case(2048, 300, "bfloat16"),
]
FORMATS: tuple[NumberFormat, ...] = ("float32", "bfloat16")
FULL = [
    *(Case(2048, mean, dtype) for dtype in FORMATS for mean in (None, 100, 300, 1000)),
    *(Case(8192, mean, dtype) for dtype in FORMATS for mean in (None, 300)),
    *(Case(2048, mean, processes=2) for mean in (None, 300)),
    *(Case(2048, None, dtype, compiled=True) for dtype in FORMATS),
]
WEIGHED = Case(2048, None)
QUICKLY_WEIGHED = ("titanlite", "transformers", "litgpt", "torchtitan")


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="three cases, three rounds: under 5 minutes on 2 idle cores"
    )
    parser.add_argument("--rounds", type=int, help="counted steps of each contender (default 7; 3 if quick)")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (3 if arguments.quick else 7)
    if rounds < 2:
        parser.error(f"--rounds {rounds}: quartiles need 2 or more")
    cases = [case for case in (QUICK if arguments.quick else FULL) if arguments.only in case.name]
    command = " ".join(["python -m benchmarks.throughput", *sys.argv[1:]])
    results = Results(rounds, {})
    for number, case in enumerate(cases, 1):
        print(f"case {number} of {len(cases)}: {case.name}", file=sys.stderr)
        results.cases[case] = run_case(case, rounds)
        if arguments.out is not None:  # half an hour of work
            arguments.out.write_text(report(results, command))
    weighed = [name for name in contenders_of(WEIGHED) if "GEMMs" not in name]
    for name in [name for name in weighed if name in QUICKLY_WEIGHED] if arguments.quick else weighed:
        print(f"memory of {name}", file=sys.stderr)
        results.memory[name] = peak_bytes(WEIGHED, name)
    publish(report(results, command), arguments.out)
    return 1 if any(bound.missed for bound in bounds(results)) else 0


if __name__ == "__main__":
    sys.exit(main())

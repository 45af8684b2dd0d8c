"""The tables of a report and the bounds that it is held to."""

import statistics
from dataclasses import dataclass, field
from datetime import date

from benchmarks.common import circumstances
from benchmarks.step_overhead import Seconds
from benchmarks.throughput.measure import PEERS, WARMUP_STEPS, Times
from benchmarks.throughput.work import Case

OURS = "titanlite"
SAME_LOSS = 2e-3
"""Relative: first losses from equal weights, where all attend over the whole row. bfloat16 rounds differently."""


@dataclass
class Results:
    rounds: int
    cases: dict[Case, dict[str, Times]]
    memory: dict[str, int | str] = field(default_factory=dict)
    """Peak bytes by contender, or its error."""


@dataclass(frozen=True)
class Bound:
    """A ratio that is to be at least (or, where `at_most`, at most) `limit`."""

    text: str
    ratios: tuple[float, float, float]
    """Lower quartile, median, upper quartile."""
    limit: float
    at_most: bool = False

    @property
    def missed(self) -> bool:
        """By more than the noise."""
        return self.ratios[0] > self.limit if self.at_most else self.ratios[2] < self.limit

    @property
    def verdict(self) -> str:
        met = self.ratios[1] <= self.limit if self.at_most else self.ratios[1] >= self.limit
        return "met" if met else "MISSED" if self.missed else "missed within the noise"


def bounds(results: Results) -> list[Bound]:
    """Those that the cases which were run can show."""
    found = []
    for case, times in results.cases.items():
        if not times[OURS].seconds:
            continue
        runs = {name: t.seconds for name, t in times.items() if t.seconds}
        peers = [name for name in runs if name in PEERS]
        if case.mean is None and not case.compiled and "bare FSDP2 loop" in runs:
            ratios = quartiles(runs["bare FSDP2 loop"], runs[OURS])
            found.append(Bound(f"{case.name}: tokens/s over a bare FSDP2 loop's", ratios, 0.97))
        limit = 1.0 if case.compiled else {2048: 1.3, 8192: 3.0}[case.seq_len] if case.mean == 300 else None
        if limit is not None and peers:
            fastest = min(peers, key=lambda name: statistics.median(s.wall for s in runs[name]))
            ratios = quartiles(runs[fastest], runs[OURS])
            found.append(Bound(f"{case.name}: tokens/s over the fastest peer's ({fastest})", ratios, limit))
        if case.mean == 300 and "GEMMs + needed attention" in runs:
            ratios = quartiles(runs[OURS], runs["GEMMs + needed attention"])
            found.append(Bound(f"{case.name}: seconds over those of GEMMs + needed attention", ratios, 1.35, True))
    weights = {name: size for name, size in results.memory.items() if name in PEERS and isinstance(size, int)}
    own = results.memory.get(OURS)
    if weights and isinstance(own, int):
        leanest = min(weights, key=weights.__getitem__)
        ratio = own / weights[leanest]
        found.append(Bound(f"peak memory over the leanest peer's ({leanest})", (ratio, ratio, ratio), 1.0, True))
    return found


def quartiles(above: list[Seconds], below: list[Seconds]) -> tuple[float, float, float]:
    """Of the ratios of wall seconds, round by round: what else the machine does hits both of a round."""
    low, middle, high = statistics.quantiles([a.wall / b.wall for a, b in zip(above, below, strict=True)], n=4)
    return low, middle, high


def _case_table(case: Case, times: dict[str, Times]) -> str:
    lines = [
        f"### {case.name[0].upper()}{case.name[1:]}",
        "",
        "| | wall ms | CPU ms | tokens/s | titanlite's tokens/s over its (quartiles) | first loss |",
        "|---|---|---|---|---|---|",
    ]
    own = times[OURS].seconds
    for name, result in times.items():
        if result.error:
            lines.append(f"| {name} | {result.error.replace('|', '/')} | | | | |")
            continue
        wall, cpu = (
            statistics.median(values) for values in zip(*((s.wall, s.cpu) for s in result.seconds), strict=True)
        )
        loss = "" if result.first_loss is None else f"{result.first_loss:.4f}"
        low, middle, high = quartiles(result.seconds, own) if own else (float("nan"),) * 3
        lines.append(
            f"| {name} | {wall * 1e3:.0f} | {cpu * 1e3:.0f} | {case.tokens / wall:,.0f}"
            f" | {middle:.2f} ({low:.2f}-{high:.2f}) | {loss} |"
        )
    return "\n".join(lines)


def report(results: Results, command: str) -> str:
    tables = "\n\n".join(_case_table(case, times) for case, times in results.cases.items())
    verdicts = "\n".join(
        f"| {b.text} | {b.ratios[1]:.2f} ({b.ratios[0]:.2f}-{b.ratios[2]:.2f})"
        f" | at {'most' if b.at_most else 'least'} {b.limit:.2f} | {b.verdict} |"
        for b in bounds(results)
    )
    memory = "\n".join(
        f"| {name} | {size if isinstance(size, str) else f'{size / 2**20:,.0f}'} |"
        for name, size in results.memory.items()
    )
    return f"""# Throughput beside peers and floors, CPU, {date.today()}

## Bounds

| | median (quartiles) | bound | |
|---|---|---|---|
{verdicts}

## Peak memory

MiB that a process of its own takes for weights, gradients, optimiser state and three steps of 2 rows of 2048, float32.

| | MiB |
|---|---|
{memory}

## Steps

Medians of {results.rounds} counted steps a contender after {WARMUP_STEPS} of warm-up, in turn; who begins a round
changes. First losses are those of rank 0's rows, titanlite's of all ranks'.

{tables}

{circumstances(command, "")}"""

"""Draw a result of benchmarks.throughput: python -m benchmarks.plot RESULT.md IMAGE.svg

A panel for each case of packed documents with a mean of 300 tokens on one process; a bar for each contender, and a line
where the matrix products and the attention that the documents need would be.
"""

import argparse
import re
from pathlib import Path

FLOOR = "GEMMs + needed attention"
LEFT_OUT = {FLOOR, "GEMMs only"}
COLUMNS = 2
OURS, THEIRS = "#c0392b", "#8395a7"


def read_cases(text: str) -> dict[str, dict[str, float]]:
    """Tokens per second by case and contender; those that failed have none."""
    cases: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        if line.startswith("### "):
            cases[line[4:]] = {}
        elif cases and (match := re.fullmatch(r"\| ([^|]+) \| [\d,]+ \| [\d,]+ \| ([\d,]+) \|.*", line)):
            cases[list(cases)[-1]][match[1]] = float(match[2].replace(",", ""))
    return cases


def draw(cases: dict[str, dict[str, float]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = -(-len(cases) // COLUMNS)
    figure, panels = pyplot.subplots(lines, COLUMNS, figsize=(6.8, 0.4 + 2.3 * lines), sharey=True, squeeze=False)
    names = [name for name in next(iter(cases.values())) if name not in LEFT_OUT]
    by_length = sorted(cases.items(), key=lambda item: int(item[0].split(",")[0].rsplit(" ", 1)[1]))
    for panel, (case, speeds) in zip(panels.flat, by_length, strict=False):
        values = [speeds.get(name, 0.0) for name in names]
        panel.barh(names, values, color=[OURS if name == "titanlite" else THEIRS for name in names])
        panel.axvline(speeds[FLOOR], color="black", linestyle="--", linewidth=1)
        rows, _, number_format, *_ = case.split(", ")
        panel.set_title(f"{rows}, {number_format}", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
    for panel in panels.flat[len(cases) :]:
        panel.remove()
    panels[0][0].invert_yaxis()
    figure.supxlabel("tokens/s; dashed: matrix products and needed attention alone", fontsize=8)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=summary, epilog=details)
    parser.add_argument("result", type=Path, help="a report that benchmarks.throughput wrote")
    parser.add_argument("image", type=Path, help="file to write; its suffix says which format")
    arguments = parser.parse_args()
    cases = read_cases(arguments.result.read_text())
    shown = {case: speeds for case, speeds in cases.items() if "mean 300" in case and FLOOR in speeds}
    if not shown:
        parser.error(f"{arguments.result}: has no case of documents of mean 300 with its floor")
    draw(shown, arguments.image)


if __name__ == "__main__":
    main()

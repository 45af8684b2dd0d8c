"""How every benchmark is asked, what it says of where it ran, and how it publishes its report."""

import argparse
import os
import platform
from pathlib import Path


def circumstances(command: str, work: str) -> str:
    """Lines of a report: hardware, with how the work used it, then versions, commit and command."""
    from titanlite.run.agreement import (
        describe_environment,  # imports torch, which processes that only tokenise do without
    )

    environment = describe_environment()
    changes = " with uncommitted changes" if environment["git_changes"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    return f"""\
- Hardware: {_cpu_name()}, {os.cpu_count()} cores{work}
- Versions: Python {environment["python"]}, {versions}
- Commit: {environment["git"]}{changes}
- Command: `{command}`
"""


def command_line(docstring: str | None) -> argparse.ArgumentParser:
    """Options of a program that its docstring explains; `--out` is where `publish` writes."""
    summary, _, details = (docstring or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=summary, epilog=details)
    parser.add_argument("--out", type=Path, help="write the report there too: benchmarks/results/DATE-NAME-DEVICE.md")
    return parser


def publish(report: str, out: Path | None) -> None:
    """Print a report, and write it to a file if one is named."""
    print(report)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(report)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

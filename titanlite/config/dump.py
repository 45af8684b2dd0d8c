"""A Config as text: complete TOML that loads back equal, and what changed against an earlier one."""

import json
from dataclasses import asdict
from typing import Any

from titanlite.config.schema import COMMAND_LINE_ONLY, to_tables
from titanlite.config.sections import Config


def toml_value(value: object) -> str:
    """One value as TOML. JSON's strings are TOML's, but for the delete character; its numbers and booleans are too."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def dump_toml(config: Config) -> str:
    """Every key, defaults too. Loads back equal but for the keys that a file cannot set: they are comments."""
    lines = ["# Every key of a titanlite run, defaults included. Start from it again with --job.config_file."]
    for table, values in to_tables(asdict(config)).items():
        lines += ["", f"[{table}]"]
        for key, value in values.items():
            line = f"{key} = {toml_value(value)}"
            lines.append(f"# {line}" if f"{table}.{key}" in COMMAND_LINE_ONLY else line)
    return "\n".join(lines) + "\n"


def diff(old: dict[str, Any], new: Config) -> list[str]:
    """What `new` changes against `old` (an asdict, perhaps read back from JSON), as `section.key: before -> after`."""
    before, after = _flat(old), _flat(asdict(new))
    absent = "(not known)"
    return [
        f"{name}: {before.get(name, absent)} -> {after.get(name, absent)}"
        for name in {**after, **before}
        if before.get(name) != after.get(name)
    ]


def _flat(config: dict[str, Any]) -> dict[str, str]:
    """Values as TOML by `section.key`: a list and a tuple of the same strings are the same."""
    tables = to_tables(config).items()
    return {f"{table}.{key}": toml_value(value) for table, values in tables for key, value in values.items()}

"""A Config as text: complete TOML that loads back equal, what changed against an earlier one, and every key's help."""

import ast
import itertools
import json
import shutil
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from titanlite.config.schema import COMMAND_LINE_ONLY, SCHEMA, SECTIONS, SOURCE, to_tables, type_name
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
    """What `new` changes against `old` (an asdict, perhaps read back from JSON), as `section.key: before -> after`.

    A key that an older version did not know changes nothing while it has its default.
    """
    before, after, defaults = _flat(old), _flat(asdict(new)), _flat(asdict(Config()))
    before |= {name: value for name, value in defaults.items() if name not in before}
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


USAGE = """\
usage: torchrun --nproc_per_node=N -m titanlite.train --job.config_file FILE [--section.key VALUE ...]

FILE is TOML, with the sections and keys below. A key's value comes from the command line, else from the file, else it
is the default shown here. --section.key=VALUE works too; booleans take true or false; several strings are separated by
commas, or given as a JSON array where one holds a comma: '["a,b.txt", "c/*.txt"]'. Every other key is an error.
"""


def help_text() -> str:
    """All of it, wrapped for the terminal's width (COLUMNS where there is none)."""
    width = max(60, min(shutil.get_terminal_size((120, 24)).columns, 120))
    meaning = field_docs()
    parts = [USAGE]
    for section, fields in SCHEMA.items():
        parts.append(f"[{section}]")
        if section == SOURCE:
            parts.append(_paragraph(meaning["data", "sources"], width, indent=2))
        for key, field in fields.items():
            parts.append(f"  --{section}.{key} {type_name(field)}   (default {toml_value(field.default)})")
            parts.append(_paragraph(meaning[section, key], width, indent=6))
        parts.append("")
    return "\n".join(parts).rstrip()


def _paragraph(text: str, width: int, indent: int) -> str:
    margin = " " * indent
    # A word stays whole, so that it can be found.
    return textwrap.fill(text, width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)


def field_docs() -> dict[tuple[str, str], str]:
    """The docstring below each field of a section, by table and key. Python drops them, so the source is read."""
    files = {str(sys.modules[table_type.__module__].__file__) for table_type in SECTIONS.values()}
    trees = [ast.parse(Path(file).read_text(encoding="utf-8")) for file in files]
    classes = {node.name: node.body for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    docs: dict[tuple[str, str], str] = {}
    for table, table_type in SECTIONS.items():
        for field, below in itertools.pairwise(classes[table_type.__name__]):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                docs[table, field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return docs

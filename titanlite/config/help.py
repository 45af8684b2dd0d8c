"""The text of `--help`: every key with its type, its default and the docstring that stands below it."""

import ast
import itertools
import shutil
import sys
import textwrap
from pathlib import Path

from titanlite.config.dump import toml_value
from titanlite.config.schema import SCHEMA, SECTIONS, SOURCE, type_name

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

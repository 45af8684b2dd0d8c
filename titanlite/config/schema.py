"""What a key may hold: the keys of every table, and how a TOML value or a command-line text becomes a value.

Owns names and types and nothing else: whether values fit together is checks.py's business.
"""

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from titanlite.config.sections import Config, DataConfig, Range, SourceConfig

SOURCES = "data.sources."
SOURCE = SOURCES + "NAME"  # stands for the table of each source
SOURCE_NAME = re.compile(r"[A-Za-z0-9_-]+")  # what TOML takes without quotes

# The table of each source comes after [data], where --help shows it.
SECTIONS: dict[str, Any] = {
    name: kind
    for field in dataclasses.fields(Config)
    for name, kind in [(field.name, field.type), (SOURCE, SourceConfig)]
    if kind is not SourceConfig or field.type is DataConfig
}


@dataclass(frozen=True)
class Field:
    """A key."""

    type: Any
    default: Any
    range: Range | None


def _field(of: "dataclasses.Field[Any]") -> Field:
    kind, limits = get_args(of.type) if get_origin(of.type) is Annotated else (of.type, None)
    return Field(kind, of.default, limits)


SCHEMA: dict[str, dict[str, Field]] = {
    name: {field.name: _field(field) for field in dataclasses.fields(section) if field.name != "sources"}
    for name, section in SECTIONS.items()
}
COMMAND_LINE_ONLY = {  # key -> what is said of it in a file
    "job.config_file": "has no effect in a file: remove it",
    "checkpoint.load_step": "in a file would turn every later start back: remove it, and give"
    " --checkpoint.load_step to the one start that it is meant for",
    "validation.only": "in a file would keep every start from training: remove it, and give --validation.only to the"
    " one start that it is meant for",
}

NAMES: dict[object, tuple[str, str]] = {  # what --help and what an error message calls a type
    bool: ("true|false", "true or false"),
    int: ("integer", "an integer"),
    float: ("number", "a number"),
    str: ("string", "a string"),
    tuple[str, ...]: ("strings", "a list of strings"),
}


class ConfigError(ValueError):
    """All that is wrong with a configuration, found in one pass: `problems`, and one line for each in the message."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = [" ".join(problem.splitlines()) for problem in problems]  # a quoted key may hold line ends
        super().__init__("\n".join(self.problems))


def schema_name(table: str) -> str:
    """What SCHEMA calls a table: the same, but data.sources.NAME for that of every source."""
    is_source = table.startswith(SOURCES) and SOURCE_NAME.fullmatch(table, len(SOURCES))
    return SOURCE if is_source else table


def to_tables(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """An asdict of a Config, perhaps read back from JSON, as tables that hold no tables: values by table and key."""
    tables: dict[str, dict[str, Any]] = {}
    for section, values in config.items():
        tables[section] = {key: value for key, value in values.items() if key != "sources"}
        tables.update({SOURCES + name: source for name, source in values.get("sources", {}).items()})
    return tables


def from_tables(tables: dict[str, dict[str, Any]]) -> Config:
    """The Config of these values, and of the defaults of all others."""
    sources = {name.removeprefix(SOURCES): SourceConfig(**table) for name, table in tables.items() if "." in name}
    sections = {name: SECTIONS[name](**table) for name, table in tables.items() if "." not in name}
    config = Config(**sections)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))


def type_name(field: Field) -> str:
    """The field's type as `--help` shows it."""
    return "|".join(get_args(field.type)) if get_origin(field.type) is Literal else NAMES[field.type][0]


def from_toml(field: Field, value: object) -> Any:
    """The field's value from a parsed TOML value. Raises ValueError saying what it must be."""
    if field.type is float and type(value) is int and abs(value) < 1 << 1000:
        value = float(value)
    if get_origin(field.type) is Literal:
        fits = isinstance(value, str) and value in get_args(field.type)
    elif get_origin(field.type) is tuple:
        fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
        value = tuple(value) if isinstance(value, list) and fits else value
    else:  # type() and not isinstance(): a bool is no int
        fits = type(value) is field.type and not (isinstance(value, float) and not math.isfinite(value))
    if not fits:
        raise ValueError(_must_be(field, json.dumps(value, default=str, ensure_ascii=False)))
    return value


def from_text(field: Field, text: str) -> Any:
    """The field's value from a command-line argument. Raises ValueError saying what it must be.

    A list is comma-separated, or a JSON array where an item holds a comma or the first one begins with a bracket.
    """
    value: object = text
    if get_origin(field.type) is tuple:
        value = _list(text)
    elif field.type is bool:
        value = {"true": True, "false": False}.get(text)
    elif field.type is int:
        value = int(text) if re.fullmatch(r"[+-]?[0-9]+(_[0-9]+)*", text) and len(text) < 1000 else None
    elif field.type is float:
        try:
            value = float(text)
        except ValueError:
            value = None
    try:
        text.encode()
        return from_toml(field, value)
    except ValueError:  # a UnicodeEncodeError too: bytes of the command line that are not UTF-8
        raise ValueError(_must_be(field, ascii(text))) from None


def _list(text: str) -> object:
    if not text.startswith("["):
        return text.split(",") if text else []
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None


def _must_be(field: Field, shown: str) -> str:
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    if get_origin(field.type) is Literal:
        return f"must be one of {', '.join(get_args(field.type))}, not {shown}"
    finite = "finite " if field.type is float and shown.strip("'+-").lower() in ("nan", "inf", "infinity") else ""
    return f"must be {NAMES[field.type][1].replace('a number', f'a {finite}number')}, not {shown}"

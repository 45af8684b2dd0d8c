"""What a key may hold: the fields of every section, and how a TOML value or a command-line text becomes a value.

Owns types and nothing else: whether values fit together is checks.py's business.
"""

import dataclasses
import json
import math
import re
from typing import Any, Literal, get_args, get_origin

from titanlite.config.sections import Config

SCHEMA: dict[str, dict[str, dataclasses.Field[Any]]] = {
    section.name: {field.name: field for field in dataclasses.fields(section.type)}  # type: ignore[arg-type]
    for section in dataclasses.fields(Config)
}


class ConfigError(ValueError):
    """All that is wrong with a configuration, found in one pass: `problems`, and one line for each in the message."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def type_name(field: dataclasses.Field[Any]) -> str:
    """How `--help` and error messages call a field's type."""
    if get_origin(field.type) is Literal:
        return " | ".join(get_args(field.type))
    if get_origin(field.type) is tuple:
        return "list of strings"
    return {bool: "true | false", int: "integer", float: "number", str: "string"}[field.type]  # type: ignore[index]


def from_toml(field: dataclasses.Field[Any], value: object) -> Any:
    """The field's value from a parsed TOML value. Raises ValueError saying what it must be."""
    shown = json.dumps(value, default=str, ensure_ascii=False)
    if get_origin(field.type) is Literal:
        return _choice(field, value, shown)
    if get_origin(field.type) is tuple:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ValueError(f'must be a list of strings, such as ["a.txt", "b/*.txt"], not {shown}')
    if field.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not field.type:
        wanted = {bool: "true or false", int: "an integer", float: "a number", str: "a string in quotes"}
        raise ValueError(f"must be {wanted[field.type]}, not {shown}")  # type: ignore[index]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"must be a finite number, not {value}")
    return value


def from_text(field: dataclasses.Field[Any], text: str) -> Any:
    """The field's value from a command-line argument. Raises ValueError saying what it must be.

    A list is comma-separated, or a JSON array where an item holds a comma or begins with a bracket.
    """
    if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"must be valid UTF-8, not {text!r}")
    if get_origin(field.type) is Literal:
        return _choice(field, text, repr(text))
    if get_origin(field.type) is tuple:
        if not text.startswith("["):
            return tuple(text.split(",")) if text else ()
        try:
            return from_toml(field, json.loads(text))
        except (json.JSONDecodeError, RecursionError):
            raise ValueError(f"must be comma-separated or a JSON array of strings, not {text!r}") from None
    if field.type is bool and text in ("true", "false"):
        return text == "true"
    if field.type is int and re.fullmatch(r"[+-]?[0-9]+(_[0-9]+)*", text) and len(text) < 100:
        return int(text)
    if field.type is float:
        try:
            return from_toml(field, float(text))
        except ValueError:
            raise ValueError(f"must be a finite number, not {text!r}") from None
    if field.type is str:
        return text
    wanted = {bool: "true or false", int: "an integer"}
    raise ValueError(f"must be {wanted[field.type]}, not {text!r}")  # type: ignore[index]


def _choice(field: dataclasses.Field[Any], value: object, shown: str) -> Any:
    if value in get_args(field.type) and isinstance(value, str):
        return value
    raise ValueError(f"must be one of {', '.join(get_args(field.type))}, not {shown}")

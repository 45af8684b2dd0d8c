"""From command line and TOML file to a checked Config: defaults < file < `--section.key value`.

Strict: an unknown section or key, a wrong type and every failed check are errors, and all of them are reported at once,
with the line of the file on which each stands, which TOML parsers do not tell.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from titanlite.config.checks import check
from titanlite.config.dump import help_text
from titanlite.config.schema import (
    COMMAND_LINE_ONLY,
    SCHEMA,
    SOURCE,
    SOURCE_NAME,
    SOURCES,
    ConfigError,
    Field,
    from_tables,
    from_text,
    from_toml,
    schema_name,
    type_name,
)
from titanlite.config.sections import Config

KeyPath = tuple[str, ...]

# Strings first, so that nothing inside them is taken for punctuation; then comments, line ends, punctuation, words.
TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\''
    r"|\#[^\n]*|\n|[\[\]{}=.,]|[^\s\[\]{}=.,\"'\#]+",
    re.DOTALL,
)


def read_toml(path: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The file's tables, and the line of every table header and key by its path.

    Raises ConfigError, one line with file and line, where the file cannot be read or is not TOML.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        return _parse(text), key_lines(text)
    except FileNotFoundError:
        raise ConfigError([f"job.config_file = {path!r}: there is no such file"]) from None
    except OSError as error:
        raise ConfigError([f"job.config_file = {path!r}: cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 text (byte {error.start})"]) from None
    except RecursionError:
        raise ConfigError([f"{path}: not valid TOML: nested too deeply"]) from None
    except ValueError as error:  # TOMLDecodeError, or an integer of thousands of digits
        reason, line = str(error), ""
        if place := re.search(r" \(at line (\d+), column \d+\)$", reason):
            reason, line = reason[: place.start()], f":{place[1]}"
        raise ConfigError([f"{path}{line}: not valid TOML: {reason}"]) from None


def line_of(lines: dict[KeyPath, int], path: KeyPath) -> int:
    """The line of a key, or of the innermost table around it that has a line of its own."""
    return next(lines[path[:length]] for length in range(len(path), 0, -1) if path[:length] in lines)


def key_lines(text: str) -> dict[KeyPath, int]:
    """Line (from 1) of each header and key of a valid TOML text. Keys of an inline table stand on that table's line."""
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    statement: list[str] = []  # its tokens so far
    line, first_line, depth = 1, 1, 0
    for match in TOKEN.finditer(text + "\n"):
        token = match[0]
        if token == "\n" and statement and depth == 0:
            is_header = statement[0] == "["
            end = len(statement) if is_header else statement.index("=")
            path = tuple(_name(part) for part in statement[:end] if part not in "[].")
            table, path = (path, path) if is_header else (table, table + path)
            for length in range(1, len(path) + 1):  # a.b = 1 makes the table a too
                lines.setdefault(path[:length], first_line)
            statement = []
        elif token != "\n" and not token.startswith("#"):
            first_line = first_line if statement else line
            statement.append(token)
            depth += (token in "[{") - (token in "]}")
        line += token.count("\n")
    return lines


def _name(part: str) -> str:
    """The name that a part of a key stands for: a quoted one may hold escapes."""
    return next(iter(_parse(f"{part} = 0"))) if part[0] in "\"'" else part


def _parse(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def load_config(argv: list[str]) -> Config:
    """The configuration that a command line asks for; its last `--job.config_file` names the TOML file.

    Checks the parallelism degrees against WORLD_SIZE where the environment has it, as torchrun sees to.
    Raises ConfigError with every problem. `--help` or `-h` prints all keys and raises SystemExit(0).
    """
    if "--help" in argv or "-h" in argv:
        _print_help()
        raise SystemExit(0)
    binder = _Binder()
    arguments = binder.split(argv)
    path = next((text for name, text in reversed(arguments) if name == "job.config_file"), None)
    if path:
        binder.bind_file(path)
    for name, text in arguments:
        table, _, key = name.rpartition(".")
        binder.bind("command line: ", "--", table, key, text, from_text)
    config = from_tables(binder.tables)
    world_size = os.environ.get("WORLD_SIZE")
    if world_size is not None and not world_size.isdecimal():
        binder.problems.append(f"WORLD_SIZE = {world_size!r} in the environment: must be the number of ranks")
        world_size = None
    if binder.file_was_read:
        binder.problems += check(config, int(world_size) if world_size else None, binder.doubtful)
    if binder.problems:
        raise ConfigError(binder.problems)
    return config


def take_number(argv: list[str], option: str, default: int, least: int, what: str) -> tuple[int, list[str]]:
    """The value of a verb's own option, and the other arguments. Raises ValueError where it is no number of `what`."""
    text, arguments = str(default), list(argv)
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            text = value if equals else "".join(arguments[i + 1 : i + 2])
            del arguments[i : i + (1 if equals else 2)]
            break
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{option} {text}: give a number of {what}, {least} or more")
    return int(text), arguments


class OneLineParser(argparse.ArgumentParser):
    """Of a verb's own options. A mistake is a ValueError of one line, for the verb to print as it prints the others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help explains every option")


def _print_help() -> None:
    try:
        print(help_text(), flush=True)
    except BrokenPipeError:  # `--help | head`: give Python's own flush at exit somewhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class _Binder:
    """Values by table and key, and what was wrong on the way to them."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, Any]] = {}
        self.problems: list[str] = []
        # Keys, tables and sections whose values are not what the user meant: no check may speak of them.
        self.doubtful: set[str] = set()
        self.file_was_read = True

    def split(self, argv: list[str]) -> list[tuple[str, str | None]]:
        """Names and texts of the command line's arguments; None where a text is missing."""
        arguments: list[tuple[str, str | None]] = []
        rest = list(argv)
        while rest:
            argument = rest.pop(0)
            name, equals, text = argument.removeprefix("--").partition("=")
            if not argument.startswith("--"):
                self.problems.append(f"command line: {argument!r} is no option: write --section.key value")
            elif equals:
                arguments.append((name, text))
            else:
                arguments.append((name, rest.pop(0) if rest and not rest[0].startswith("--") else None))
        return arguments

    def bind_file(self, path: str) -> None:
        try:
            content, lines = read_toml(path)
        except ConfigError as error:
            self.problems += error.problems
            self.file_was_read = False
            return
        for section, table in content.items():
            where = f"{path}:{line_of(lines, (section,))}: "
            is_section = section in SCHEMA and section != SOURCE
            if is_section and not isinstance(table, dict):
                self.problems.append(f"{where}{section} is a section: write [{section}] above its keys")
            elif not isinstance(table, dict):
                nearest = _nearest_key("", section)
                self.problems.append(f"{where}{section} must stand in a section{_did_you_mean(nearest)}")
            elif not is_section:
                nearest = difflib.get_close_matches(section, SCHEMA, n=1)
                self.problems.append(f"{where}unknown section [{section}]{_did_you_mean(nearest, '[', ']')}")
                self.doubtful.update(nearest)
            else:
                self._bind_table(path, lines, (section,), table)

    def _bind_table(self, path: str, lines: dict[KeyPath, int], at: KeyPath, table: dict[str, Any]) -> None:
        """The keys of a section or of a source, or the sources of a section."""
        name = ".".join(at)
        if name != "data.sources":
            self.tables.setdefault(name, {})
        for key, value in table.items():
            has_tables = (name == "data" and key == "sources") or (
                name == "data.sources" and SOURCE_NAME.fullmatch(key)
            )
            if has_tables and isinstance(value, dict):
                self._bind_table(path, lines, (*at, key), value)
            else:
                self.bind(f"{path}:{line_of(lines, (*at, key))}: ", "", name, key, value, from_toml)

    def bind(
        self, where: str, dashes: str, table: str, key: str, value: Any, convert: Callable[[Field, Any], Any]
    ) -> None:
        """Take the value, or note why not. A value of None is one that the command line lacks."""
        name = f"{table}.{key}" if table else key
        field = SCHEMA.get(schema_name(table), {}).get(key)
        if field is None:
            nearest = _nearest_key(table, key)
            hint = _did_you_mean(nearest, dashes)
            if f"{name}.".startswith(SOURCES) and schema_name(table) != SOURCE:
                nearest = ["data.sources"]
                hint = (
                    f": write {dashes}data.sources.NAME.key" if dashes else ": write [data.sources.NAME] above its keys"
                )
                hint += ", NAME of A-Z, a-z, 0-9, _ and -"
            self.problems.append(f"{where}unknown key {dashes}{name}{hint}")
            self.doubtful.update(nearest)
            return
        try:
            if value is None and name == "validation.only":  # no setting but something to do: its name says it
                value = "true"
            if value is None:
                raise ValueError(f"needs a value: {dashes}{name} {type_name(field)}")
            if name in COMMAND_LINE_ONLY and not dashes:
                raise ValueError(COMMAND_LINE_ONLY[name])
            self.tables.setdefault(table, {})[key] = convert(field, value)
        except ValueError as error:
            self.problems.append(f"{where}{dashes}{name} {error}")
            self.doubtful.add(name)


def _nearest_key(table: str, key: str) -> list[str]:
    """The key most like this one, as a list of one, or of none: in its table, else by its last part, else anywhere."""
    keys = [*SCHEMA.get(schema_name(table), {}), *(["sources"] if table == "data" else [])]
    if found := difflib.get_close_matches(key, keys, n=1, cutoff=0.5):
        return [f"{table}.{found[0]}"]
    name = f"{table}.{key}" if table else key
    everything = [f"{section}.{key}" for section, keys in SCHEMA.items() for key in keys]
    same_key = [full for full in everything if full.endswith(f".{key}")]
    found = difflib.get_close_matches(name, same_key, n=1, cutoff=0.0)
    return found or difflib.get_close_matches(name, everything, n=1)


def _did_you_mean(nearest: list[str], before: str = "", after: str = "") -> str:
    return f": did you mean {before}{nearest[0]}{after}?" if nearest else "; --help lists all"

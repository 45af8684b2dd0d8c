"""Reads a TOML file and says on which line each key stands, which TOML parsers do not tell."""

import re
import sys
from typing import Any

from titanlite.config.schema import ConfigError

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

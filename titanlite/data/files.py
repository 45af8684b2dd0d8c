"""Which files make the corpus, and in what order.

Owns the meaning of data.paths and of data.format, the built-in corpus, and what is said about matches that are no
files. Refuses to read in silence less than the user named.
"""

import glob
import os
import stat
import sysconfig
from dataclasses import dataclass

from titanlite.config.sections import DataConfig
from titanlite.data.index import content_digest
from titanlite.log import logger

_STANDARD_LIBRARY_SKIPS = frozenset({"test", "tests", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class SourceFile:
    path: str
    name: str
    """Path relative to the folder that data.paths names, with forward slashes: the same for a copied corpus."""
    kind: str
    """"text": a document, UTF-8. "python": a document, decoded as Python does. "jsonl": a document per line."""
    size: int
    digest: str
    """Hash of size and sampled content."""


def find_files(data: DataConfig) -> list[SourceFile]:
    """The corpus's files: in the order of data.paths, and by relative name within a pattern.

    As in a shell, `*` and `**` leave out names that begin with a dot. Raises ValueError, in one line, for a path or
    pattern that yields no file and for files and folders that cannot be read. Logs what it leaves out.
    """
    if data.paths:
        found = [match for pattern in data.paths for match in _match(pattern)]
    else:
        found = _standard_library()
    unique: dict[str, SourceFile] = {}
    for path, name in found:
        file = os.path.realpath(path)
        if file not in unique:
            unique[file] = _describe(path, name, data)
    if len(unique) < len(found):
        logger.warning(
            f"data.paths reaches {len(found) - len(unique)} files once more by another name; each counts once"
        )
    return list(unique.values())


def _match(pattern: str) -> list[tuple[str, str]]:
    path = os.path.expanduser(pattern)
    if os.path.lexists(path):  # also a name that only looks like a pattern, as in "notes [1].txt"
        if os.path.isdir(path):
            raise ValueError(
                f"data.paths: {pattern} is a folder; name its files, as in {os.path.join(pattern, '**/*.txt')}"
            )
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"data.paths: {pattern} is a pipe or device, not a regular file; name files")
        return [(path, os.path.basename(path))]
    searched = path if os.path.basename(path) == "**" else os.path.dirname(path)
    for folder in glob.iglob(os.path.join(searched, ""), recursive=True):
        if not os.access(folder, os.R_OK | os.X_OK):  # glob would pass over it
            raise ValueError(f"data.paths: {pattern} reaches the folder {folder}, which cannot be read")
    root = path
    while glob.has_magic(root):
        root = os.path.dirname(root)
    files, folders, others = [], 0, []
    for match in glob.iglob(path, recursive=True):
        try:
            mode = os.stat(match).st_mode
        except OSError:  # a dangling link, or a loop of links
            mode = 0
        if stat.S_ISREG(mode):
            files.append((match, os.path.relpath(match, root or ".").replace(os.sep, "/")))
        elif stat.S_ISDIR(mode):
            folders += 1
        else:
            others.append(match)
    if others:
        logger.warning(
            f"data.paths: {pattern} matches {len(others)} dangling links or special files, left out: {others[:5]}"
        )
    if not files:
        raise ValueError(
            f"data.paths: {pattern} matches no file ({folders} folders); relative paths start at {os.getcwd()}"
        )
    if folders:
        logger.info(f"data.paths: {pattern} matches {folders} folders too; only files count")
    return sorted(files, key=lambda file: file[1])


def _standard_library() -> list[tuple[str, str]]:
    """The .py files of the running interpreter's standard library, tests and installed packages left out."""
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STANDARD_LIBRARY_SKIPS]
        paths = [os.path.join(folder, name) for name in names if name.endswith(".py")]
        found += [(path, os.path.relpath(path, root).replace(os.sep, "/")) for path in paths if os.path.isfile(path)]
    if not found:
        raise ValueError(f"data.paths is empty and this Python has no source files in {root}; name your own files")
    return sorted(found, key=lambda file: file[1])


def _describe(path: str, name: str, data: DataConfig) -> SourceFile:
    if not data.paths:
        kind = "python"
    elif data.format == "auto":
        kind = "jsonl" if path.endswith(".jsonl") else "text"
    else:
        kind = data.format
    try:
        size = os.stat(path).st_size
        return SourceFile(path, name, kind, size, content_digest(path, size))
    except OSError as error:
        raise ValueError(f"data.paths: cannot read {path} ({error.strerror})") from error

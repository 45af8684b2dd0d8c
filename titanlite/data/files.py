"""Which files make a source, in what order, of which kind.

Owns the meaning of paths, exclude and format, the built-in corpus, the sampled content hash that names a file, and what
is said about matches that are no files. Refuses to read in silence less than the user named, and what it cannot read.
"""

import contextlib
import fnmatch
import functools
import glob
import hashlib
import os
import re
import resource
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from titanlite.config.sections import SourceConfig
from titanlite.log import logger

_STANDARD_LIBRARY_SKIPS = frozenset({"test", "tests", "site-packages", "dist-packages", "__pycache__"})
_THREADS = 16  # they wait for a file system that may be far away; on a local one they neither help nor hurt
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_ENOUGH_FILES = 1 << 16

_KINDS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")  # also their suffixes
_UNREADABLE = re.compile(
    r".*(\.(?:gz|tgz|zst|zstd|bz2|xz|lzma|lz4|br|z|zip|7z|rar|tar|arrow|feather|orc|avro|npy|npz|bin|idx|pt|pth|gguf|"
    r"safetensors|pkl|pickle|h5|hdf5|db|sqlite|pdf|docx?|xlsx?|epub|png|jpe?g|gif|webp|mp[34]|wav|o|a|so|dylib|dll|exe|"
    r"pyc|class|jar|whl))",
    re.DOTALL,
)
_MAGIC = re.compile(  # none of these begins a text
    rb"(?P<gzip>\x1f\x8b)|(?P<zstd>\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)|(?P<parquet>PAR1[\x00-\x1f])|"
    rb"(?P<bzip2>BZh[1-9]1AY&SY)|(?P<xz>\xfd7zXZ\x00)|(?P<lz4>\x04\x22\x4d\x18)|(?P<zip>PK\x03\x04)|"
    rb"(?P<sevenzip>7z\xbc\xaf\x27\x1c)|(?P<arrow>ARROW1\x00\x00)|(?P<numpy>\x93NUMPY)|(?P<executable>\x7fELF)|"
    rb"(?P<sqlite>SQLite format 3\x00)|(?P<tar>.{257}ustar)",
    re.DOTALL,
)
_MAGIC_OF_KIND = {"jsonl.gz": "gzip", "jsonl.zst": "zstd", "parquet": "parquet"}

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class SourceFile:
    path: str
    name: str
    """Path relative to the folder that paths names, with forward slashes: the same for a copied corpus."""
    kind: str
    """"text": a document, UTF-8. "python": a document, decoded as Python does. "jsonl", "jsonl.gz", "jsonl.zst": a
    document per line. "parquet": a document per row."""
    size: int
    digest: str
    """Hash of size and sampled content."""


class _Match(NamedTuple):
    path: str
    name: str
    file: str
    """The path without links: what two names of a file have in common."""


def find_files(source: SourceConfig, key: str = "data") -> list[SourceFile]:
    """The source's files: in the order of its paths, and by relative name within a pattern.

    As in a shell, `*` and `**` of paths leave out names that begin with a dot. A pattern of exclude leaves out each
    file whose path ends with it, from the beginning of a folder's or file's name on (a pattern that begins with / or ~:
    whose absolute path it is); `**` stands for any folders. `key` is the section that errors name. Raises ValueError,
    in one line, for a path or pattern that yields no file and for what cannot be read. Logs what it leaves out.
    """
    if source.paths:
        found = [match for pattern in source.paths for match in _match(pattern, key)]
    else:
        found = _standard_library()
    if source.exclude:
        found = _leave_out(found, source.exclude, key)
    unique: dict[str, _Match] = {}
    for match in found:
        unique.setdefault(match.file, match)
    if len(unique) < len(found):
        logger.warning(
            f"{key}.paths reaches {len(found) - len(unique)} files once more by another name; each counts once"
        )
    return in_threads(lambda match: _describe(match, source, key), unique.values())


def shown(path: str) -> str:
    """The path as messages show it: always one line, and text that any terminal and log file takes."""
    return path if path.isprintable() else repr(path)


def max_open_files() -> int:
    """How many files this process may have open: as many as the system lets it, which is often far more than the 1,024
    that it starts with. A memory map counts as an open file, as Python keeps its descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = _ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH_FILES)
    if soft != resource.RLIM_INFINITY and soft < enough:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
            soft = enough
    return _ENOUGH_FILES if soft == resource.RLIM_INFINITY else min(soft, _ENOUGH_FILES)


def content_digest(read: Callable[[int, int], bytes], size: int) -> str:
    """Hash (32 hex digits) of a size and content: all of it up to 64 KiB, else 16 even samples of 4 KiB.

    `read(number, offset)` gives bytes of the content.
    """
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
    if size <= _SAMPLES * _SAMPLE_BYTES:
        digest.update(read(size or 1, 0))  # an empty file too must let itself be read
    else:
        for k in range(_SAMPLES):
            digest.update(read(_SAMPLE_BYTES, k * (size - _SAMPLE_BYTES) // (_SAMPLES - 1)))
    return digest.hexdigest()


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """[function(item) for item in items], several at once. Raises the error of the first item that has one."""
    items = list(items)
    size = max(1, min(256, len(items) // _THREADS))  # handing over items one by one would cost more than the work
    portions = [items[i : i + size] for i in range(0, len(items), size)]
    with ThreadPoolExecutor(_THREADS) as pool:
        results = pool.map(lambda portion: [function(item) for item in portion], portions)
        return [result for portion in results for result in portion]


def _match(pattern: str, key: str) -> list[_Match]:
    path = os.path.expanduser(pattern)
    where = f"{key}.paths: {shown(pattern)}"
    if os.path.lexists(path):  # also a name that only looks like a pattern, as in "notes [1].txt"
        if os.path.isdir(path):
            raise ValueError(f"{where} is a folder; name its files, as in {shown(os.path.join(pattern, '**/*.txt'))}")
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{where} is a pipe or device, not a regular file; name files")
        return [_Match(path, os.path.basename(path), os.path.realpath(path))]
    searched = path if os.path.basename(path) == "**" else os.path.dirname(path)
    for folder in glob.iglob(os.path.join(searched, ""), recursive=True):
        if not os.access(folder, os.R_OK | os.X_OK):  # glob would pass over it
            raise ValueError(f"{where} reaches the folder {shown(folder)}, which cannot be read")
    root = path
    while glob.has_magic(root):
        root = os.path.dirname(root)
    prefix = len(os.path.join(root, ""))
    real_folder = functools.cache(os.path.realpath)  # of a million files, realpath alone took 20 s
    files, folders, others = [], 0, []
    for match in glob.iglob(path, recursive=True):
        try:
            is_link = stat.S_ISLNK(mode := os.lstat(match).st_mode)
            mode = os.stat(match).st_mode if is_link else mode
        except OSError:  # a dangling link, or a loop of links
            mode = 0
        if stat.S_ISREG(mode):
            folder, name = os.path.split(match)
            file = os.path.realpath(match) if is_link else os.path.join(real_folder(folder), name)
            files.append(_Match(match, match[prefix:].replace(os.sep, "/"), file))
        elif stat.S_ISDIR(mode):
            folders += 1
        else:
            others.append(match)
    if others:
        logger.warning(f"{where} matches {len(others)} dangling links or special files, left out: {others[:5]}")
    if not files:
        raise ValueError(f"{where} matches no file ({folders} folders); relative paths start at {shown(os.getcwd())}")
    if folders:
        logger.info(f"{where} matches {folders} folders too; only files count")
    return sorted(files, key=lambda file: file.name)


def _standard_library() -> list[_Match]:
    """The .py files of the running interpreter's standard library, tests and installed packages left out."""
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STANDARD_LIBRARY_SKIPS]
        for name in names:
            path = os.path.join(folder, name)
            # _sysconfigdata... holds the paths and compiler flags of the machine that Python was built on
            if name.endswith(".py") and not name.startswith("_sysconfigdata") and os.path.isfile(path):
                found.append(_Match(path, os.path.relpath(path, root).replace(os.sep, "/"), os.path.realpath(path)))
    if not found:
        raise ValueError(f"data.paths is empty and this Python has no source files in {root}; name your own files")
    return sorted(found, key=lambda file: file.name)


def _leave_out(found: list[_Match], exclude: tuple[str, ...], key: str) -> list[_Match]:
    patterns = {pattern: _exclude_parts(pattern) for pattern in exclude}
    counts: Counter[str] = Counter()
    kept = []
    for match in found:
        path, absolute = match.path.split(os.sep), os.path.abspath(match.path).split(os.sep)
        hits = [p for p, parts in patterns.items() if _fits(absolute if parts[0] == "" else path, parts)]
        counts.update(hits)
        if not hits:
            kept.append(match)
    for pattern in patterns:
        if counts[pattern]:
            logger.info(f"{key}.exclude: {shown(pattern)} leaves out {counts[pattern]:,} files")
        else:
            logger.warning(f"{key}.exclude: {shown(pattern)} matches none of the {len(found):,} files")
    if not kept:
        raise ValueError(f"{key}.exclude = {list(exclude)} leaves out all {len(found):,} files of {key}.paths")
    return kept


def _exclude_parts(pattern: str) -> list[str]:
    parts = os.path.normpath(os.path.expanduser(pattern)).split(os.sep)
    return parts if parts[0] == "" else ["**", *parts]


def _fits(path: list[str], pattern: list[str]) -> bool:
    """Whether the pattern's parts match all of the path's; from the end, where most paths differ."""
    if not pattern:
        return not path
    if pattern[-1] == "**":
        return any(_fits(path[:i], pattern[:-1]) for i in range(len(path), -1, -1))
    return bool(path) and fnmatch.fnmatchcase(path[-1], pattern[-1]) and _fits(path[:-1], pattern[:-1])


def _describe(match: _Match, source: SourceConfig, key: str) -> SourceFile:
    head = b""

    def read(number: int, offset: int) -> bytes:
        nonlocal head
        content = os.pread(descriptor, number, offset)
        head = head or content[:512]
        return content

    try:
        descriptor = os.open(match.path, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            digest = content_digest(read, size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ValueError(f"{key}.paths: cannot read {shown(match.path)} ({error.strerror})") from error
    return SourceFile(match.path, match.name, _kind(match.path, head, source, key), size, digest)


def _kind(path: str, head: bytes, source: SourceConfig, key: str) -> str:
    """The file's kind by its suffix, and the promise that its first bytes do not contradict it."""
    lower = path.lower()
    problem = ""
    kind: str = source.format if source.paths else "python"
    if kind == "auto":
        kind = next((kind for kind in _KINDS if lower.endswith(f".{kind}")), "text")
        if kind == "text" and (unreadable := _UNREADABLE.fullmatch(lower)):
            problem = f"ends in {unreadable[1]}"
            if lower.endswith((".gz", ".zst")):
                problem += f', and whether its content is jsonl must be said by {key}.format = "jsonl"'
    elif kind == "jsonl":
        kind = {".gz": "jsonl.gz", ".zst": "jsonl.zst"}.get(os.path.splitext(lower)[1], kind)
    magic = _MAGIC.match(head)
    found = str(magic.lastgroup) if magic else ""
    if not problem and found != (expected := _MAGIC_OF_KIND.get(kind, "")):
        what = f"{found} data" if found else "empty" if not head else f"no {expected} data"
        problem = f"should be {kind} and is {what}"
    if problem:
        raise ValueError(
            f"{key}.paths: {shown(path)} {problem}; read are text, jsonl, jsonl.gz, jsonl.zst and parquet: "
            f"unpack it, or leave it out by {key}.exclude"
        )
    return kind

"""The folder protocol: which folder counts as a checkpoint, and how one is begun, committed, set aside and removed.

Owns names, manifest, checksums, fsync and renames; every function is for one process and knows nothing of tensors,
ranks or torch. A folder `step-00000100` counts only with a manifest that fits it. What is being written is called
`.tmp-*`, what is being deleted `.trash-*`: both are leftovers if their process is gone, and the next save removes
them. What was set aside (`.bad-*`: damaged, `.old-*`: of a history that this run has left) is never deleted here, nor
is any file that no checkpoint writes. The folder of all checkpoints may be a link or lie under one, as to a bigger
disk; a link in it never counts, and is never followed to write or delete.
"""

import errno
import json
import os
import re
import stat
import time
import uuid
import zlib
from collections.abc import Callable
from typing import Any

from titanlite.files import sync_folder
from titanlite.log import logger

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(tmp|trash)-step-\d{8,}-\w+")
_OUR_FILE = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|manifest\.json")
# The first line holds the checksum of all bytes after it, so that the whole is plain JSON and guards itself.
_MANIFEST_HEAD = re.compile(rb'\{"crc32": "([0-9a-f]{8})",\n')


class CheckpointError(ValueError):
    """One line that says which checkpoint or file, what is wrong and, where it helps, what to do."""


class DamagedCheckpoint(CheckpointError):
    """The files themselves prove that this checkpoint cannot be used: an older one may be taken instead."""


class LostFolder(CheckpointError):
    """Another run owns the folder of checkpoints now: this one must not go on."""


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def list_steps(folder: str) -> dict[int, str]:
    """Paths of the checkpoint folders in `folder` by step, ascending; links and plain files are not ours."""
    if not os.path.isdir(folder):
        if os.path.lexists(folder):  # seen at the start of a run, not at its first save
            raise CheckpointError(f"{folder}: neither a folder nor a link to one: move it away")
        return {}
    with os.scandir(folder) as entries:
        found = {
            int(match[1]): entry.path
            for entry in entries
            if (match := _STEP.fullmatch(entry.name)) and entry.is_dir(follow_symlinks=False)
        }
    return dict(sorted(found.items()))


def links_of_steps(folder: str) -> list[str]:
    """Links in `folder` that are called like checkpoints. None of them counts, which their owner should hear."""
    if not os.path.isdir(folder):
        return []
    return sorted(e.path for e in os.scandir(folder) if _STEP.fullmatch(e.name) and e.is_symlink())


def list_damaged(folder: str) -> list[str]:
    """Names of what was set aside in `folder` as damaged."""
    return sorted(name for name in os.listdir(folder) if name.startswith(".bad-")) if os.path.isdir(folder) else []


def check_free_space(folder: str, needed: int) -> None:
    """Raise CheckpointError unless the file system of `folder` has `needed` bytes free for this user."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        raise CheckpointError(
            f"{folder}: a checkpoint needs {needed / 1e6:,.1f} MB and the disk has {free / 1e6:,.1f} MB left: make "
            "room, lower checkpoint.keep_latest_k or choose another job.dump_folder"
        )


def begin(folder: str, step: int, needed: int) -> str:
    """Path of a new empty folder to write a checkpoint of about `needed` bytes into; removes dead attempts first."""
    if not os.path.isdir(folder):
        os.makedirs(folder)
        sync_folder(os.path.dirname(os.path.abspath(folder)))
    final = os.path.join(folder, step_name(step))
    if os.path.lexists(final) and (os.path.islink(final) or not os.path.isdir(final)):
        raise CheckpointError(f"{final}: in the way, and no folder that a checkpoint made: move it away")
    for name in os.listdir(folder):
        if _LEFTOVER.fullmatch(name):
            remove(os.path.join(folder, name))
    check_free_space(folder, needed)
    path = os.path.join(folder, f".tmp-{step_name(step)}-{_token()}")
    os.mkdir(path)
    return path


def commit(
    path: str,
    step: int,
    files: dict[str, dict[str, Any]],
    meta: dict[str, Any],
    versions: dict[str, str],
    check_owner: Callable[[], None],
) -> str:
    """Turn the written folder `path` into the checkpoint of `step` and return its final path.

    `files`: name -> {"size": bytes, "crc32": 8 hex digits} of every file. `check_owner` raises where the folder is no
    longer this run's: nothing was renamed then. Checkpoints of this step and of later ones
    cannot belong to the history that is saved here (the run went back to an earlier step); they are set aside, so
    that neither "the newest" nor "the last k" can mean them.
    """
    for name, record in files.items():
        file = os.path.join(path, name)
        size = os.lstat(file).st_size if os.path.lexists(file) else 0
        if size != record["size"]:
            raise CheckpointError(
                f"{file}: {record['size']} bytes were written and rank 0 sees {size}: is this folder on storage that "
                "all ranks share?"
            )
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **versions,
        "files": dict(sorted(files.items())),
        "meta": meta,
    }
    body = json.dumps(manifest, indent=1, allow_nan=False).removeprefix("{\n").encode()
    with open(os.path.join(path, MANIFEST), "xb") as stream:
        stream.write(b'{"crc32": "%08x",\n' % zlib.crc32(body) + body)
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(path)
    folder = os.path.dirname(path)
    check_owner()
    for other, other_path in list_steps(folder).items():
        if other >= step:
            set_aside(other_path, "old", f"the run now continues from step {step}")
    final = os.path.join(folder, step_name(step))
    os.rename(path, final)
    sync_folder(folder)
    return final


def prune(folder: str, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints (0 keeps all). A failure is a warning: training matters more."""
    try:
        for path in list(list_steps(folder).values())[:-keep] if keep else []:
            # A rename first: a kill midway must not leave half a checkpoint under a name that counts.
            trash = os.path.join(folder, f".trash-{os.path.basename(path)}-{_token()}")
            os.rename(path, trash)
            remove(trash)
    except OSError as error:
        logger.warning("older checkpoints could not be pruned: %s", error)


def remove(path: str) -> None:
    """Delete the files that checkpoints write in folder `path`, then `path` if nothing else is in it."""
    try:
        if os.path.islink(path):
            raise NotADirectoryError(errno.ENOTDIR, "a link, which no checkpoint makes")
        for name in os.listdir(path):
            if _OUR_FILE.fullmatch(name):
                os.unlink(os.path.join(path, name))
        os.rmdir(path)
    except OSError as error:
        logger.warning("%s could not be removed: %s", path, error)


def set_aside(path: str, label: str, reason: str) -> None:
    """Rename checkpoint `path` to `.label-step-N-...`, with a warning, so that it no longer counts."""
    folder, name = os.path.split(path)
    aside = os.path.join(folder, f".{label}-{name}-{_token()}")
    os.rename(path, aside)
    sync_folder(folder)
    logger.warning("checkpoint %s is set aside as %s: %s", path, os.path.basename(aside), reason)


def read_manifest(path: str) -> dict[str, Any]:
    """The manifest of checkpoint folder `path`: format_version, step, created, torch, python, files, meta.

    Raises DamagedCheckpoint if it is missing or garbled, CheckpointError if it cannot be read or has another format.
    """
    name = os.path.join(path, MANIFEST)
    try:
        if not stat.S_ISREG(os.lstat(name).st_mode):
            raise DamagedCheckpoint(f"{name}: not a plain file")
        with open(name, "rb") as stream:
            content = stream.read()
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedCheckpoint(f"{name}: missing, so {path} is not a complete checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be read: {error.strerror}") from None
    head = _MANIFEST_HEAD.match(content)
    if head is None or int(head[1], 16) != zlib.crc32(content[head.end() :]):
        raise DamagedCheckpoint(f"{name}: does not fit its own checksum")
    try:
        manifest: dict[str, Any] = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{name}: no JSON: {error}") from None
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{name}: format_version is {version}, this titanlite reads {FORMAT_VERSION}")
    for key, kind in {"step": int, "files": dict, "meta": dict}.items():
        if not isinstance(manifest.get(key), kind):
            raise DamagedCheckpoint(f"{name}: {key!r} is missing or of a wrong type")
    for file, record in manifest["files"].items():
        if not (isinstance(record, dict) and isinstance(record.get("size"), int) and "crc32" in record):
            raise DamagedCheckpoint(f"{name}: the record of {file!r} is no size and crc32")
    return manifest


def check_file(
    path: str, name: str, record: dict[str, Any], advance: Callable[[int], object] = lambda num_bytes: None
) -> None:
    """Raise DamagedCheckpoint unless `path`/`name` is a plain file in `path` with the size and checksum of `record`.

    `advance` hears of every block of bytes that was read.
    """
    file = os.path.join(path, name)
    if os.path.basename(name) != name or name in ("", ".", ".."):
        raise DamagedCheckpoint(f"{os.path.join(path, MANIFEST)}: names {name!r}, which is not a file of this folder")
    try:
        info = os.lstat(file)
        if not stat.S_ISREG(info.st_mode):
            raise DamagedCheckpoint(f"{file}: not a plain file")
        if info.st_size != record["size"]:
            raise DamagedCheckpoint(f"{file}: has {info.st_size} bytes, the manifest says {record['size']}")
        found = _crc32(file, advance)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{file}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    if found != record["crc32"]:
        raise DamagedCheckpoint(f"{file}: has checksum {found}, the manifest says {record['crc32']}")


def _crc32(file: str, advance: Callable[[int], object]) -> str:
    value, buffer = 0, bytearray(1 << 22)
    view = memoryview(buffer)
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            value = zlib.crc32(view[:count], value)
            advance(count)
    return f"{value:08x}"


def _token() -> str:
    return uuid.uuid4().hex[:8]

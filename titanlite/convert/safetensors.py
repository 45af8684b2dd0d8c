"""safetensors files, written and read a tensor at a time (format: https://github.com/huggingface/safetensors).

Eight bytes with the length of a JSON header, the header, the tensors' bytes. Owns this, because the library's writer
wants all tensors of a file in memory. Refuses a header that does not describe its file to the last byte.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER = 100_000_000  # the library's limit


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Byte in the file."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(
    path: str, shapes: Mapping[str, torch.Tensor], load: Callable[[str], torch.Tensor], advance: Callable[[int], object]
) -> None:
    """Write the tensors that `load` gives, in the order of `shapes`, which are on meta; `advance` hears of bytes."""
    assert sys.byteorder == "little"
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it, transformers refuses the file
    end = 0
    for name, tensor in shapes.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, wanted in shapes.items():
            tensor = load(name)
            assert (tensor.shape, tensor.dtype) == (wanted.shape, wanted.dtype), name
            file.write(_bytes(tensor.contiguous()))
            advance(tensor.nbytes)
        file.flush()
        os.fsync(file.fileno())


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def read_header(path: str) -> dict[str, Entry]:
    """The tensors of a file. Raises ValueError where the header and the file do not fit."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise ValueError(f"{size} bytes do not hold a header of {length}: cut short, or no safetensors file")
            header = json.loads(file.read(length), object_pairs_hook=_no_twins)
            header.pop("__metadata__", None)
            entries = {name: _entry(path, name, record, 8 + length) for name, record in header.items()}
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.num_bytes)):
        if entry.begin != end:
            raise ValueError(f"{path}: tensors overlap or leave a gap at byte {end}")
        end += entry.num_bytes
    if end != size:
        raise ValueError(f"{path}: has {size} bytes, its header describes {end}: cut short?")
    return entries


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the header has a name twice")
    return found


def _entry(path: str, name: str, record: Any, data: int) -> Entry:
    try:
        dtype, shape, (begin, end) = record["dtype"], record["shape"], record["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise TypeError
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"the header's record of {name!r} is garbled") from None
    if dtype not in DTYPES:
        raise ValueError(f"{name} is {dtype!r}: weights of {', '.join(DTYPES)} are read, nothing quantised")
    entry = Entry(path, DTYPES[dtype], tuple(shape), data + begin)
    if end - begin != entry.num_bytes:
        raise ValueError(f"{name} has {end - begin} bytes, its shape {shape} needs {entry.num_bytes}")
    return entry


def read_tensor(entry: Entry) -> torch.Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    with open(entry.file, "rb", buffering=0) as file:
        file.seek(entry.begin)
        view = _bytes(tensor)
        while view and (count := file.readinto(view)):
            view = view[count:]
    if view:
        raise ValueError(f"{entry.file}: was cut short while it was read")
    return tensor


def shards(shapes: Mapping[str, torch.Tensor], shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors in order, as many in each part as shard_bytes hold, at least one."""
    part: dict[str, torch.Tensor] = {}
    for name, tensor in shapes.items():
        if part and sum(other.nbytes for other in part.values()) + tensor.nbytes > shard_bytes:
            yield part
            part = {}
        part[name] = tensor
    yield part


def write_folder(
    folder: str,
    shapes: Mapping[str, torch.Tensor],
    load: Callable[[str], torch.Tensor],
    shard_bytes: int,
    advance: Callable[[int], object],
) -> list[str]:
    """Write model.safetensors, or several files and their index; their names."""
    parts = list(shards(shapes, shard_bytes))
    names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    if len(parts) == 1:
        names = [SINGLE]
    for name, part in zip(names, parts, strict=True):
        write_file(os.path.join(folder, name), part, load, advance)
    if len(parts) == 1:
        return names
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = {"metadata": {"total_size": sum(t.nbytes for t in shapes.values())}, "weight_map": weight_map}
    with open(os.path.join(folder, INDEX), "x") as file:
        json.dump(index, file, indent=2)
    return [*names, INDEX]


def read_folder(folder: str) -> dict[str, Entry]:
    """The tensors of all weight files. Raises ValueError where there are none, or index and files do not fit."""
    single, index_file = os.path.join(folder, SINGLE), os.path.join(folder, INDEX)
    if os.path.exists(single):  # as transformers decides where both are there
        return read_header(single)
    if not os.path.exists(index_file):
        pickled = sorted(name for name in os.listdir(folder) if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
        if pickled:
            raise ValueError(
                f"{folder}: its weights are pickled ({pickled[0]}), and reading a pickle can run any code: it is not"
                " opened. Get the model's safetensors files, or save it as safetensors where you trust it"
            )
        raise ValueError(f"{folder}: neither {SINGLE} nor {INDEX}: give the folder of a model's weights")
    try:
        with open(index_file, encoding="utf-8") as file:
            weight_map = json.load(file)["weight_map"]
        listed = {name: str(weight_map[name]) for name in weight_map}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index_file}: no index of weights: {error!r}") from None
    found: dict[str, Entry] = {}
    problems: list[str] = []
    for shard in sorted(set(listed.values())):
        if os.path.basename(shard) != shard or shard in ("", ".", ".."):
            raise ValueError(f"{index_file}: names {shard!r}, which is no file of this folder")
        for name, entry in read_header(os.path.join(folder, shard)).items():
            if listed.get(name) == shard:
                found[name] = entry
            else:
                problems.append(f"{name} is in {shard}, and the index says {listed.get(name, 'nothing of it')}")
    problems += [f"{name} is not in {shard}" for name, shard in listed.items() if name not in found]
    if problems:
        raise ValueError(f"{index_file}: {'; '.join(problems)}")
    return found

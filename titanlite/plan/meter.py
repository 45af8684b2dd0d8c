"""Memory of tensors, counted as they come and go: on fake tensors what a device would need, on real ones what was used.

Each storage counts once, however many tensors view it, from the operation that returns it until it is freed. Refuses
to guess what happens inside an operation: the buffers of a kernel are not seen.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

BLOCK_BYTES = 512
"""CUDA's caching allocator gives out whole blocks of this size."""


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of storages on one device type while it is active, and their peaks, by the moment they fall in.

    With a fake mode, in which it is to be entered, it counts the fake tensors' storages, else those of real ones.
    """

    def __init__(self, device_type: str, fake: FakeTensorMode | None = None) -> None:
        super().__init__()
        self.live = 0
        """Bytes of all storages now, each rounded up to whole blocks."""
        self.buffers = 0
        """Those of them that FSDP2 gathers parameters and reduces gradients in."""
        self.peaks: dict[Any, int] = {}
        """Largest `live` by moment."""
        self._device_type, self._fake, self._moment = device_type, fake, None
        # By id of the storage, which is its own as long as it lives: a reference that ends the count, bytes, is buffer
        self._counted: dict[int, tuple[weakref.ref, int, bool]] = {}
        self._stack = ExitStack()

    def enter(self, moment: Any) -> None:
        """From now on the peak is that of `moment`, which may come again."""
        self._moment = moment
        self._note_peak()

    def mark_buffers(self, storages: Iterable[torch.UntypedStorage]) -> None:
        for storage in storages:
            self._count(storage, is_buffer=True)

    def __enter__(self) -> "MemoryMeter":
        # FSDP2 frees and takes memory of gathered parameters in the storage, which is no operation.
        resize: Callable[..., Any] = torch.UntypedStorage.resize_

        def counted_resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if id(storage) in self._counted:
                self._count(storage)
            return result

        self._stack.enter_context(patch.object(torch.UntypedStorage, "resize_", counted_resize))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind not in (Tensor, FakeTensor) for kind in types):
            return NotImplemented  # DTensors and the like: first what they are made of
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # DTensor enters the fake mode again to ask for the shape that all ranks' parts have together.
        if self._fake is not None and len(self._fake.enter_stack) > 1:
            return result
        is_buffer = func.namespace == "fsdp"
        values = [*_flat(result), *_flat(kwargs.get("out"))] if is_buffer else _flat(result)
        for value in values:
            if isinstance(value, Tensor) and self._counts(value):
                self._count(value.untyped_storage(), is_buffer)
        return result

    def _counts(self, tensor: Tensor) -> bool:
        return tensor.device.type == self._device_type and isinstance(tensor, FakeTensor) == (self._fake is not None)

    def _count(self, storage: torch.UntypedStorage, is_buffer: bool = False) -> None:
        key, size = id(storage), -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        known = self._counted.get(key)
        if known is None:
            reference, before, was_buffer = weakref.ref(storage, lambda _: self._forget(key)), 0, False
        else:
            reference, before, was_buffer = known
        is_buffer |= was_buffer
        if known is None or (size, is_buffer) != (before, was_buffer):
            self._counted[key] = (reference, size, is_buffer)
            self.live += size - before
            self.buffers += size * is_buffer - before * was_buffer
            self._note_peak()

    def _forget(self, key: int) -> None:
        _, size, is_buffer = self._counted.pop(key)
        self.live -= size
        self.buffers -= size * is_buffer

    def _note_peak(self) -> None:
        self.peaks[self._moment] = max(self.live, self.peaks.get(self._moment, 0))


def _flat(value: Any) -> Sequence[Any]:
    """What an operation returns: a tensor, or several, of which some may be lists."""
    if not isinstance(value, list | tuple):
        return [value]
    return [item for part in value for item in _flat(part)]

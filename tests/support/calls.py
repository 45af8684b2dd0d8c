"""How often an operation is called."""

from collections.abc import Callable

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    def __init__(self, op: Callable[..., object]) -> None:
        super().__init__()
        self.op, self.count = op, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is self.op
        return func(*args, **(kwargs or {}))

"""What attention within documents costs: python -m benchmarks.attention [--rounds N] [--device D] [--out FILE]

Times forward and backward of one layer's attention (8 heads, 4 key-value heads, head_dim 32 on the CPU and 128 on a
GPU) in titanlite's backends, beside causal attention over the whole row and a boolean mask, on the same queries, keys
and values, call by call in turn. Then what a batch costs before its first layer: titanlite's starts, positions and
block mask against `create_block_mask` of the same predicate, whose result is checked to be the same.
"""

import statistics
import sys
import time
from collections.abc import Callable
from datetime import date

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from tqdm import tqdm

from benchmarks.common import circumstances, command_line, publish
from benchmarks.throughput.work import EOS, Case, rows_of
from titanlite.model.attention import attend, build_documents
from titanlite.model.ops.flex import document_mask_mod

HEADS, KV_HEADS = 8, 4
THREADS = 2
WARMUP = 2
MEANS = (None, 1000, 300, 100)


def time_in_turn(calls: dict[str, Callable[[], object]], rounds: int, device: str, name: str) -> dict[str, list[float]]:
    """Wall milliseconds of each call in each counted round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in tqdm(range(WARMUP + rounds), desc=name, unit="round", leave=False, disable=None):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= WARMUP:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def attention_calls(tokens: Tensor, dtype: torch.dtype, head_dim: int) -> dict[str, Callable[[], object]]:
    """Forward and backward in every way, by name."""
    device = tokens.device.type
    batch, seq_len = tokens.shape
    shapes = [(batch, seq_len, heads, head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
    grad = torch.randn_like(q)

    def causal() -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)

    def ours(backend: str) -> Callable[[], Tensor]:
        documents = build_documents(tokens, EOS, backend).of_layer(0)
        return lambda: attend(q, k, v, documents)

    backends = {"flex": "titanlite, flex"} if device == "cuda" else {"sdpa": "titanlite, sdpa"}
    forward = {name: ours(backend) for backend, name in backends.items()}
    forward |= {"causal over the row": causal, "boolean mask": ours("dense")}
    return {name: lambda f=f: torch.autograd.grad(f(), (q, k, v), grad) for name, f in forward.items()}  # type: ignore[misc]


def mask_calls(tokens: Tensor) -> dict[str, Callable[[], object]]:
    batch, seq_len = tokens.shape
    flex = build_documents(tokens, EOS, "flex")

    def predicate() -> object:
        mod = document_mask_mod(flex.starts.to(torch.int32))
        return create_block_mask(mod, batch, None, seq_len, seq_len, device=tokens.device.type)

    assert torch.equal(predicate().to_dense(), flex.mask.to_dense())  # type: ignore[attr-defined,union-attr]
    return {
        "starts and positions": lambda: build_documents(tokens, EOS, "sdpa"),
        "starts, positions and block mask": lambda: build_documents(tokens, EOS, "flex"),
        "create_block_mask": predicate,
    }


def row(title: str, times: dict[str, list[float]]) -> str:
    cells = (f"{statistics.median(t):.2f} ({min(t):.2f}-{max(t):.2f})" for t in times.values())
    return f"| {title} | {' | '.join(cells)} |"


def header(first: str, names: list[str]) -> str:
    return f"| {first} | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}"


def measure(device: str, lengths: list[int], rounds: int) -> tuple[str, str]:
    """The two tables."""
    attention: list[str] = []
    masks: list[str] = []
    for seq_len in lengths:
        for mean in MEANS:
            tokens = rows_of(Case(seq_len, mean), 1, 0)[0, :, :-1].to(device)
            documents = "one document" if mean is None else f"mean {mean}"
            for dtype in (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,):
                calls = attention_calls(tokens, dtype, 32 if device == "cpu" else 128)
                kind = str(dtype).removeprefix("torch.")
                title = f"{tokens.shape[0]} x {seq_len}, {documents}, {kind}"
                times = time_in_turn(calls, rounds, device, title)
                attention = attention or [header("rows, documents", list(times))]
                attention.append(row(title, times))
            title = f"{tokens.shape[0]} x {seq_len}, {documents}"
            times = time_in_turn(mask_calls(tokens), rounds, device, title)
            masks = masks or [header("rows, documents", list(times))]
            masks.append(row(title, times))
    return "\n".join(attention), "\n".join(masks)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="counted calls of each (default 9)")
    parser.add_argument("--lengths", type=int, nargs="+", help="of rows (default 2048 8192; on a GPU 8192 32768)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    lengths = arguments.lengths or ([2048, 8192] if arguments.device == "cpu" else [8192, 32768])
    attention, masks = measure(arguments.device, lengths, arguments.rounds)
    where = f", {THREADS} threads used" if arguments.device == "cpu" else f"; {torch.cuda.get_device_name()}"
    command = " ".join(["python -m benchmarks.attention", *sys.argv[1:]])
    publish(
        f"""# Attention within documents, {arguments.device}, {date.today()}

Milliseconds, median (range) of {arguments.rounds} calls after {WARMUP} of warm-up.

## Forward and backward of one layer

{attention}

## Before the first layer, once per batch

{masks}

{circumstances(command, where)}""",
        arguments.out,
    )


if __name__ == "__main__":
    main()

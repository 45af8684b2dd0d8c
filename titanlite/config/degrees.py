"""How ranks are shared out: the three parallel degrees, and the sizes that they must divide."""

import math
from collections.abc import Iterator

from titanlite.config.sections import Config, ParallelismConfig

REPLICATE = "parallelism.data_parallel_replicate_degree"
SHARD = "parallelism.data_parallel_shard_degree"
TP = "parallelism.tensor_parallel_degree"


def resolve_degrees(parallelism: ParallelismConfig, world_size: int) -> tuple[int, int, int]:
    """(replicate, shard, tp) whose product is world_size; a shard degree of -1 takes what the other two leave.

    Raises ValueError where there is none, with the numbers that would do.
    """
    replicate, shard = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    tp = parallelism.tensor_parallel_degree
    if shard == -1:
        if world_size % (replicate * tp):
            raise ValueError(
                f"{REPLICATE} = {replicate} x {TP} = {tp} does not divide the number of ranks, {world_size}:"
                f" use a product of {listed(divisors(world_size))}, or a multiple of {replicate * tp} ranks"
            )
        return replicate, world_size // (replicate * tp), tp
    if replicate * shard * tp != world_size:
        raise ValueError(
            f"{REPLICATE} = {replicate} x {SHARD} = {shard} x {TP} = {tp} needs {replicate * shard * tp} ranks, and"
            f" there are {world_size}: start {replicate * shard * tp}, or set {SHARD} = -1 (all that the others leave)"
        )
    return replicate, shard, tp


def check_data_parallel(config: Config, world_size: int | None) -> Iterator[str]:
    """Degrees against ranks and batch sizes; without a world size, what can be said without it."""
    parallelism = config.parallelism
    dp_degree = 0  # not known
    if world_size is not None:
        try:
            replicate, shard, _ = resolve_degrees(parallelism, world_size)
            dp_degree = replicate * shard
        except ValueError as error:
            yield str(error)
    elif parallelism.data_parallel_shard_degree != -1:
        dp_degree = parallelism.data_parallel_replicate_degree * parallelism.data_parallel_shard_degree
    yield from _check_batch(config.training.global_batch_size, config.training.local_batch_size, dp_degree)
    rows, seq_len = config.training.global_batch_size // (dp_degree or 1), config.training.seq_len
    if dp_degree and rows * seq_len > config.data.window_tokens:
        yield (
            f"data.window_tokens = {config.data.window_tokens} is less than a rank's share of a step, {rows} rows of"
            f" training.seq_len = {seq_len}: use {rows * seq_len} or more"
        )


def _check_batch(rows: int, local: int, dp_degree: int) -> Iterator[str]:
    if dp_degree and rows % dp_degree:
        yield (
            f"training.global_batch_size = {rows} rows cannot be dealt to {dp_degree} data-parallel ranks ({REPLICATE}"
            f" x {SHARD}, which is what {TP} leaves): use {listed(divisors(rows))} of them,"
            f" or a multiple of {dp_degree} rows"
        )
    elif (share := rows // (dp_degree or 1)) > local and share % local:
        of_whom = f", the share of each of {dp_degree} data-parallel ranks" if dp_degree else ""
        yield (
            f"training.local_batch_size = {local} does not divide {share} rows{of_whom} (training.global_batch_size ="
            f" {rows}): use a local_batch_size of {listed(divisors(share))}"
        )


def check_tensor_parallel(config: Config) -> Iterator[str]:
    """Its degree against the sizes that it splits."""
    tp, model = config.parallelism.tensor_parallel_degree, config.model
    split = {
        "model.n_heads": model.n_heads,
        "model.n_kv_heads": model.n_kv_heads,
        "model.ffn_dim": model.ffn_dim,
        "model.vocab_size": model.vocab_size,
        "training.seq_len": config.training.seq_len,  # sequence parallelism
    }
    possible = listed(divisors(math.gcd(*split.values())))
    for key, size in split.items():
        if size % tp:
            yield (
                f"{TP} = {tp} does not divide {key} = {size}: use a degree of {possible} (what divides all heads and"
                f" sizes), or another {key}"
            )


def divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def listed(numbers: list[int]) -> str:
    """1, 2, 4 or 8; the middle of a long list is left out."""
    words = [str(n) for n in numbers]
    if len(words) > 16:
        words = [*words[:8], "...", *words[-4:]]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)

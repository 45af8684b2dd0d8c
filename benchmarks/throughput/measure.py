"""Runs the contenders of a case step by step in turn, in processes of their own, and weighs each one's memory."""

import gc
import multiprocessing
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from benchmarks.step_overhead import Seconds, timed
from benchmarks.throughput import floors, ours, peers
from benchmarks.throughput.work import Case, Contender, rows_of

WARMUP_STEPS = 1
CONTENDERS: dict[str, Callable[[Case, Tensor], Contender]] = {
    "titanlite": lambda case, _: ours.Titanlite(case),
    "bare FSDP2 loop": lambda case, _: ours.Bare(case),
    "transformers": lambda case, _: peers.transformers_loop(case),
    "transformers, documents": lambda case, _: peers.transformers_documents(case),
    "transformers Trainer": peers.HuggingFaceTrainer,
    "litgpt": lambda case, _: peers.litgpt(case),
    "torchtitan": lambda case, _: peers.torchtitan(case),
    "GEMMs only": lambda case, _: floors.Gemms(case),
    "GEMMs + needed attention": lambda case, _: floors.GemmsAndAttention(case),
}
PEERS = ("transformers", "transformers, documents", "transformers Trainer", "litgpt", "torchtitan")


@dataclass
class Times:
    """Of one contender in a case."""

    seconds: list[Seconds]
    """Of each counted step on rank 0; empty where it failed."""
    first_loss: float | None = None
    error: str = ""


def contenders_of(case: Case) -> tuple[str, ...]:
    """Who can take part: nothing has documents where a row is one, and the floors know no compiler and no ranks."""
    out = {"transformers, documents"} if case.mean is None else {"bare FSDP2 loop"}
    if case.compiled or case.processes > 1:
        out |= {"GEMMs only", "GEMMs + needed attention"}
    if case.compiled:
        out |= {"bare FSDP2 loop"}
    if case.processes > 1:
        out |= {"transformers Trainer"}
    return tuple(name for name in CONTENDERS if name not in out)


def run_case(case: Case, rounds: int) -> dict[str, Times]:
    """Times of each contender of a case, in one process per rank that all of them share."""
    return in_processes(case, _race, rounds)


def peak_bytes(case: Case, name: str) -> int | str:
    """Memory that a contender's process takes for its model, optimiser and three steps, at most; or its error."""
    return in_processes(replace(case, processes=1), _weigh, name)


def in_processes(case: Case, work: Callable[[Case, Any], Any], argument: object) -> Any:
    """What work(case, argument) returns on rank 0 of new processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers.models.llama.modeling_llama", "transformers.trainer"])
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    receiver, sender = context.Pipe(duplex=False)
    ranks = [
        context.Process(target=_rank, args=(rank, case, port, work, argument, sender), daemon=True)
        for rank in range(case.processes)
    ]
    for process in ranks:
        process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"a process of the case {case.name!r} died without a result") from None
    finally:
        for process in ranks:
            process.join(10)
            process.kill()


def _rank(
    rank: int, case: Case, port: int, work: Callable[[Case, Any], Any], argument: object, sender: Connection
) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(case.threads // case.processes)
    tqdm.set_lock(threading.RLock())  # its own would leave a semaphore behind
    # No RANK and the like in the environment: by them the Trainer would wrap the model of a single rank too.
    store = dist.TCPStore("127.0.0.1", port, case.processes, is_master=rank == 0)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if case.device == "cuda" else "gloo", store=store, rank=rank, world_size=case.processes
    )
    with TemporaryDirectory() as folder:
        os.chdir(folder)  # some of the contenders write files
        result = work(case, argument)
    if rank == 0:
        sender.send(result)
    dist.barrier()
    os._exit(0)  # threads of the contenders, which wait for their next step, need not be unwound


def _race(case: Case, rounds: int) -> dict[str, Times]:
    names = contenders_of(case)
    steps = WARMUP_STEPS + rounds
    rows = rows_of(case, steps + 1, dist.get_rank())
    times = {name: Times([]) for name in names}
    racing: dict[str, Contender] = {}
    for name in names:
        try:
            racing[name] = CONTENDERS[name](case, rows)
        except Exception as error:
            times[name].error = _told(error)
    hidden = dist.get_rank() > 0
    progress = tqdm(total=steps, desc=case.name, unit="round", leave=False, disable=True if hidden else None)
    for number in range(steps):
        order = list(racing)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            dist.barrier()
            try:
                loss, seconds = timed(lambda: racing[name].step(rows[number]))  # noqa: B023  called at once
            except Exception as error:
                times[name] = Times([], error=_told(error))
                del racing[name]
                continue
            if number == 0 and loss is not None:
                times[name].first_loss = float(loss)
            if number >= WARMUP_STEPS:
                times[name].seconds.append(seconds)
        progress.update()
    progress.close()
    return times


def _weigh(case: Case, name: str) -> int | str:
    # What is imported or made once and for all is not the model's: a tiny model comes first.
    tiny = replace(case, seq_len=64, model=replace(case.model, dim=32, ffn_dim=48, n_layers=1, vocab_size=64))
    try:
        _train(tiny, name)
        gc.collect()
        before = _status_bytes("VmRSS")
        _train(case, name)
    except Exception as error:
        return _told(error)
    return _status_bytes("VmHWM") - before


def _train(case: Case, name: str) -> None:
    rows = rows_of(case, 4, 0)
    contender = CONTENDERS[name](case, rows)
    for batch in rows[:3]:
        contender.step(batch)


def _status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

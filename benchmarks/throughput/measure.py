"""Runs the contenders of a case step by step in turn, each in processes of its own, and weighs its memory."""

import gc
import multiprocessing
import os
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
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
from titanlite.run.agreement import keep_freed_memory

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
    """Times of each contender of a case: one step of each in turn, in processes of its own; who begins changes."""
    times = {name: Times([]) for name in contenders_of(case)}
    with ExitStack() as stack:
        racing = {name: stack.enter_context(Ranks(case, _take_turns, (name, rounds))) for name in times}

        def hear(name: str) -> tuple[float | None, Seconds] | None:
            try:
                answer = racing[name].answer()
            except RuntimeError as died:
                answer = str(died)
            if isinstance(answer, str):
                times[name] = Times([], error=answer)
                del racing[name]
                return None
            return answer

        for name in times:
            hear(name)
        for number in tqdm(range(WARMUP_STEPS + rounds), desc=case.name, unit="round", leave=False, disable=None):
            order = list(racing)
            start = number % len(order)
            for name in order[start:] + order[:start]:
                racing[name].tell(number)
                if (heard := hear(name)) is not None:
                    loss, seconds = heard
                    if number == 0:
                        times[name].first_loss = loss
                    if number >= WARMUP_STEPS:
                        times[name].seconds.append(seconds)
    return times


def peak_bytes(case: Case, name: str) -> int | str:
    """Memory that a contender's process takes for its model, optimiser and three steps, at most; or its error."""
    return in_processes(replace(case, processes=1), _weigh, name)


def in_processes(case: Case, work: Callable[[Case, Any], Any], argument: object) -> Any:
    """What work(case, argument) returns on rank 0 of new processes."""
    with Ranks(case, _work_once, (work, argument)) as ranks:
        return ranks.answer()


class Ranks:
    """New processes of a case, one per rank, in one process group: each does body(case, argument, pipe)."""

    def __init__(self, case: Case, body: Callable[[Case, Any, Connection], None], argument: object) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "transformers.models.llama.modeling_llama", "transformers.trainer"])
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.case = case
        self.pipes, self.processes = [], []
        for rank in range(case.processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(rank, case, port, body, argument, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def tell(self, message: object) -> None:
        """Send it to each rank; None: that was all."""
        with suppress(BrokenPipeError):  # of one that died: `answer` tells
            for pipe in self.pipes:
                pipe.send(message)

    def answer(self) -> Any:
        """What rank 0 sends next. Raises RuntimeError where it ended instead."""
        try:
            return self.pipes[0].recv()
        except (EOFError, ConnectionResetError):
            raise RuntimeError(f"a process of the case {self.case.name!r} died without a result") from None

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.tell(None)
        for process in self.processes:
            process.join(10)
            process.kill()


def _rank(
    rank: int, case: Case, port: int, body: Callable[[Case, Any, Connection], None], argument: Any, pipe: Connection
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
        body(case, argument, pipe)
        dist.barrier()
    os._exit(0)  # threads of the contenders, which wait for their next step, need not be unwound


def _work_once(case: Case, argument: tuple[Callable[[Case, Any], Any], Any], pipe: Connection) -> None:
    work, its_argument = argument
    pipe.send(work(case, its_argument))


def _take_turns(case: Case, argument: tuple[str, int], pipe: Connection) -> None:
    """Answer that the contender is there, and each number of a step with its loss and time; or with an error."""
    name, rounds = argument
    if name not in PEERS:
        keep_freed_memory()  # as titanlite.train does
    rows = rows_of(case, WARMUP_STEPS + rounds + 1, dist.get_rank())
    try:
        contender = CONTENDERS[name](case, rows)
        pipe.send((None, Seconds(0.0, 0.0)))
        while (number := pipe.recv()) is not None:
            dist.barrier()
            loss, seconds = timed(lambda: contender.step(rows[number]))
            pipe.send((None if loss is None else float(loss), seconds))
    except Exception as error:
        pipe.send(_told(error))


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

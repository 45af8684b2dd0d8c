"""Compares what two runs noted, in the order of computation, so that the first difference names what went wrong.

Pure functions of records. A run is a list of them, one for each rank; what its ranks should hold alike is compared
with the reference rank by rank, so a replica that went its own way is named.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from titanlite.parity.ending import EndRecord
from titanlite.parity.recording import RankRecord, StepRecord
from titanlite.parity.sketches import Sketches

Records = list[RankRecord]


@dataclass(frozen=True)
class Difference:
    """How far one quantity of a run is from the reference's."""

    step: int | str
    """0: before the first step. "validation" and "generation": behind the last one."""
    what: str
    where: str
    """Rows or ranks that lie beyond the bound; empty where none does."""
    size: float
    """Norm of the difference over the larger of both norms; infinite where what must be equal is not."""

    @property
    def place(self) -> str:
        """Step and quantity, for people."""
        if isinstance(self.step, str):
            return f"in {self.step}, {self.what}"
        return f"{f'at step {self.step}' if self.step else 'before step 1'}, {self.what}"

    def __str__(self) -> str:
        size = f"relative difference {self.size:.1e}" if np.isfinite(self.size) else "not equal, or not finite"
        return f"{self.place}{f', on {self.where}' if self.where else ''}: {size}"


def digest(record: RankRecord) -> str:
    """One digest of the bits of all initial weights."""
    return hashlib.blake2b("".join(record.initial.values()).encode(), digest_size=8).hexdigest()


def compare(reference: Records, run: Records, bound: float) -> Iterator[Difference]:
    """Every quantity that both runs noted, in the order of computation. The reference may be compared with itself,
    which shows whether its ranks agree."""
    for name, digest in reference[0].initial.items():
        unequal = np.array([rank.initial[name] != digest for rank in run])
        yield _by_rank(0, f"initial weight {name}", np.where(unequal, np.inf, 0.0), bound)
    num_steps = len(reference[0].steps)
    for step, steps in enumerate(zip(*(rank.steps[:num_steps] for rank in run), strict=True), 1):
        expected = [rank.steps[step - 1] for rank in reference]
        yield from _compare_rows(step, reference, expected, run, steps, bound)
        yield _by_rank(step, "loss", _relative_scalars([r.loss for r in steps], expected[0].loss), bound)
        for name, sketch in expected[0].gradients.items():
            sizes = relative_difference(np.stack([r.gradients[name] for r in steps]), sketch)
            yield _by_rank(step, f"gradient of {name}", sizes, bound)
        norms = _relative_scalars([r.grad_norm for r in steps], expected[0].grad_norm)
        yield _by_rank(step, "gradient norm", norms, bound)
        for name, sketch in expected[0].weights.items():
            yield _by_rank(
                step, f"weight {name}", relative_difference(np.stack([r.weights[name] for r in steps]), sketch), bound
            )
    if len(run[0].steps) != num_steps:
        yield Difference(min(len(run[0].steps), num_steps) + 1, "end of the data", "", np.inf)
    yield from _compare_ends(reference[0].end, [rank.end for rank in run], bound)


def _compare_ends(expected: EndRecord, ends: list[EndRecord], bound: float) -> Iterator[Difference]:
    same_set = [(end.validation_set, end.num_rows) == (expected.validation_set, expected.num_rows) for end in ends]
    yield _by_rank("validation", "set", np.where(same_set, 0.0, np.inf), bound)
    yield _by_rank("validation", "loss", _relative_scalars([end.loss for end in ends], expected.loss), bound)
    for token, sketches in enumerate(expected.logits):
        sizes = relative_difference(np.stack([end.logits[token] for end in ends]), sketches)  # [ranks, prompts]
        ranks, prompts = (np.flatnonzero((sizes > bound).any(axis)) for axis in (1, 0))
        where = f"{listed('prompt', prompts + 1)} ({listed('rank', ranks)})" if len(ranks) else ""
        yield Difference("generation", f"logits of new token {token + 1}", where, float(sizes.max()))


def _compare_rows(
    step: int, reference: Records, expected: list[StepRecord], run: Records, steps: Iterable[StepRecord], bound: float
) -> Iterator[Difference]:
    """The batch, what was made of it, and hidden states, row by row of the global batch."""
    steps = list(steps)
    digests = _rows(reference, [r.row_digests for r in expected], summed=False)[0]
    own = _rows(run, [r.row_digests for r in steps], summed=False)
    sizes = np.where((own != digests).any(0), np.inf, 0.0)
    if steps[0].fingerprint != expected[0].fingerprint and not sizes.any():
        sizes[:] = np.inf
    yield _by_row(step, "batch", sizes, run, bound)
    for kind, summed in (("inputs", False), ("activations", True)):
        theirs: list[Sketches] = [getattr(r, kind) for r in expected]
        ours: list[Sketches] = [getattr(r, kind) for r in steps]
        for name in theirs[0]:
            if name in ours[0]:  # inside a compiled block nothing is noted
                truth = _rows(reference, [sketches[name] for sketches in theirs], summed)[0]
                sizes = relative_difference(_rows(run, [sketches[name] for sketches in ours], summed), truth).max(0)
                yield _by_row(step, f"activation {name}", sizes, run, bound)


def _rows(run: Records, parts: list[np.ndarray], summed: bool) -> np.ndarray:
    """Each rank's rows -> [tensor-parallel peers, rows of the global batch, ...], or one sum over the peers."""
    stacked = np.stack(parts)  # ranks are ordered as on the mesh: tensor-parallel peers are neighbours
    by_peer = stacked.reshape(-1, run[-1].tp_rank + 1, *stacked.shape[1:]).swapaxes(0, 1)
    rows = by_peer.reshape(by_peer.shape[0], -1, *stacked.shape[2:])
    return rows.sum(0, keepdims=True) if summed else rows


def relative_difference(sketches: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Estimated norm of the difference over the larger norm, of sketches [..., projections + 1] -> [...].

    Never less than what the two norms, which are exact, differ by.
    """
    norms, reference_norms = np.sqrt(sketches[..., -1]), np.sqrt(reference[..., -1])
    projected = np.sqrt(np.square(sketches[..., :-1] - reference[..., :-1]).mean(-1))
    return _over(np.maximum(projected, abs(norms - reference_norms)), np.maximum(norms, reference_norms))


def _relative_scalars(values: list[float], reference: float) -> np.ndarray:
    numbers = np.array(values)
    return _over(abs(numbers - reference), np.maximum(abs(numbers), abs(reference)))


def _over(difference: np.ndarray, norm: np.ndarray) -> np.ndarray:
    size = difference / np.where(norm == 0, 1.0, norm)
    return np.where(np.isfinite(size), size, np.inf)


def _by_rank(step: int | str, what: str, sizes: np.ndarray, bound: float) -> Difference:
    where = listed("rank", np.flatnonzero(sizes > bound))
    return Difference(step, what, where, float(sizes.max()))


def _by_row(step: int, what: str, sizes: np.ndarray, run: Records, bound: float) -> Difference:
    beyond = np.flatnonzero(sizes > bound)
    rows_per_rank = len(run[0].steps[0].row_digests)
    ranks = [rank for rank, record in enumerate(run) if record.dp_rank in beyond // rows_per_rank]
    where = f"{listed('row', beyond)} of the batch ({listed('rank', ranks)})" if len(beyond) else ""
    return Difference(step, what, where, float(sizes.max()))


def listed(noun: str, numbers: Iterable[int]) -> str:
    """ranks 0, 2-3"""
    spans = [[n for _, n in group] for _, group in groupby(enumerate(numbers), lambda pair: int(pair[1]) - pair[0])]
    words = [str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans]
    many = len(spans) > 1 or any(len(span) > 1 for span in spans)
    return f"{noun}{'s' if many else ''} {', '.join(words)}" if words else ""

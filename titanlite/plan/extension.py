"""Footprints of deep models from those of shallow ones.

Every block is like every other, so what a step holds at one place, counted from the first block or from the last one,
is linear in the number of blocks: the state grows by a block's, and so do the activations of all blocks before, or the
gradients of all blocks behind. A peak over several places is not linear: each is extended by itself.
"""

from collections.abc import Callable
from dataclasses import replace

from titanlite.config import Config
from titanlite.plan.step import Footprint, Moment

SHALLOW = (2, 3)
"""Numbers of blocks that are traced: a first and a last one, and one in between."""


def footprint(config: Config, trace: Callable[[Config], Footprint], exact: bool = False) -> Footprint:
    """The footprint of all blocks, by tracing models of 2 and 3 blocks; `exact` traces all of them."""
    num_layers = config.model.n_layers
    if exact or num_layers <= SHALLOW[-1]:
        return trace(config)
    two, three = (trace(replace(config, model=replace(config.model, n_layers=n))) for n in SHALLOW)
    return extend(two, three, num_layers)


def extend(two: Footprint, three: Footprint, num_layers: int) -> Footprint:
    """The footprint of `num_layers` blocks, 4 or more, from those of 2 and 3.

    Of the blocks its peaks have the first two and the last two: between them they are linear in the block's number.
    """

    def line(at_two: int, at_three: int) -> int:
        return at_three + (num_layers - 3) * (at_three - at_two)

    peaks: dict[Moment, int] = {}
    for moment, peak in three.peaks.items():
        if not isinstance(moment.part, int):
            peaks[moment] = line(two.peaks[moment], peak)
    for phase, micro_batch in {(m.phase, m.micro_batch) for m in three.peaks if isinstance(m.part, int)}:
        shallow, deep = (
            [traced.peaks[Moment(phase, block, micro_batch)] for block in range(n)]
            for traced, n in zip((two, three), SHALLOW, strict=True)
        )
        # Seen from the first block, more blocks add what one behind it holds; seen from the last, what one before it.
        behind, before = (num_layers - 3) * (deep[0] - shallow[0]), (num_layers - 3) * (deep[2] - shallow[1])
        places = {0: deep[0] + behind, 1: deep[1] + behind, -2: deep[1] + before, -1: deep[2] + before}
        peaks |= {Moment(phase, block % num_layers, micro_batch): peak for block, peak in places.items()}
    names = ("parameters", "gradients", "optimizer", "average", "checkpoint", "activations")
    return Footprint(**{name: line(getattr(two, name), getattr(three, name)) for name in names}, peaks=peaks)

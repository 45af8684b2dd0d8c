"""Cases of a test of which some are enough for the quick suite; the others are marked slow."""

from collections.abc import Iterable
from typing import Any

import pytest


def some_quick(cases: Iterable[str], *quick: str) -> list[Any]:
    """Parameters by name, for `pytest.mark.parametrize`: slow unless they are among `quick`."""
    names = list(cases)
    assert {*quick} <= {*names}, f"{quick} of {names}"
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]

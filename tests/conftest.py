"""Switches of the suite: `--slow` adds the slow tests; `gpu` tests skip, with the reason, where there is no GPU."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from titanlite.log import logger


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    """A verb that runs inside a test takes the log over; the next test finds it as it was."""
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    """The same examples in every run, and no deadline: a busy machine must not turn a property test red."""
    num_examples = 100 if config.getoption("--slow") else 40
    settings.register_profile("titanlite", deadline=None, derandomize=True, max_examples=num_examples)
    settings.load_profile("titanlite")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))
    if not config.getoption("--slow"):
        slow = [item for item in items if "slow" in item.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]

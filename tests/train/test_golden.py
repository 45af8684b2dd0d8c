"""Golden losses: the whole path, from text to update, in float64 on a generated corpus.

A change that moves them changes what every user trains: say so in its commit, and show why the new ones are right.
"""

from pathlib import Path

import pytest

from tests.support.tiny_run import metrics, write_config
from titanlite.train.__main__ import main

LOSSES = [
    5.560334095218281,
    5.32640688183391,
    4.998588734684917,
    4.712316917755858,
    4.520350899906844,
    4.423104583344849,
]
FINGERPRINTS = "20e2ed04c8e7ad07 b1259d9dba7260dd 3c8f8c77b72d99e1 5de3b3542a088398 86373b0bcaaa630b ffd62649cf0711d2"


def test_golden_losses(tmp_path: Path) -> None:
    config = write_config(tmp_path, training__dtype="float64", training__steps=6, checkpoint__enable=False)
    assert main(["--job.config_file", str(config)]) == 0
    rows = metrics(tmp_path / "run")
    assert [row["batch_fingerprint"] for row in rows] == FINGERPRINTS.split()
    assert [row["loss"] for row in rows] == pytest.approx(LOSSES, rel=1e-11)

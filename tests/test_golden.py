"""Golden losses: the whole path, from text to update, in float64 on a generated corpus.

A change that moves them changes what every user trains: say so in its commit, and show why the new ones are right.
"""

from pathlib import Path

import pytest

from tests.tiny_run import metrics, write_config
from titanlite.train import main

LOSSES = [
    5.5564134038558315,
    5.325403469323107,
    5.088674743970199,
    4.832072310641643,
    4.753271693436608,
    4.709419391160882,
]
FINGERPRINTS = "06deb0cb491cfc59 c7edbfc867dbe04d 36cbd2284f07d152 467d7dc597e57bf4 1a535a5d7a3e5403 c2cf0bcc5ec855a3"


def test_golden_losses(tmp_path: Path) -> None:
    config = write_config(tmp_path, training__dtype="float64", training__steps=6, checkpoint__enable=False)
    assert main(["--job.config_file", str(config)]) == 0
    rows = metrics(tmp_path / "run")
    assert [row["batch_fingerprint"] for row in rows] == FINGERPRINTS.split()
    assert [row["loss"] for row in rows] == pytest.approx(LOSSES, rel=1e-11)

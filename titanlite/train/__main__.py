"""Train a model: python -m titanlite.train --job.config_file train_configs/debug.toml [--section.key value ...]

Under torchrun every process is a rank; alone it is a job of one. `--help` explains every key.
"""

import os
import sys
from pathlib import Path

from titanlite.config import ConfigError, load_config
from titanlite.files import read_json
from titanlite.log import init_logging, logger
from titanlite.run.watchdog import Watchdog


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 finished or preempted (status.json says which), 1 a failure told in one line."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        config = load_config(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        if rank == 0:
            print(error, file=sys.stderr)
        return 1
    init_logging(rank)
    watchdog = Watchdog(config.comm.grace_seconds)
    # From here on torch is imported, which takes seconds: a config error should not.
    from titanlite.run.agreement import PeerLost, RunFailed, keep_freed_memory

    status = read_json(Path(config.job.dump_folder) / "status.json")
    done = status.get("state") == "finished" and status["step"] >= config.training.steps
    if done and not config.validation.only and config.checkpoint.load_step < 0:
        logger.info(
            "the run in %s is finished at step %d: nothing to do (raise training.steps to go on, or name another"
            " job.dump_folder)",
            config.job.dump_folder,
            status["step"],
        )
        watchdog.close()
        return 0
    from titanlite.checkpoint import CheckpointError
    from titanlite.train.run import Run
    from titanlite.validation import validate_checkpoint

    keep_freed_memory()
    try:
        if config.validation.only:
            validate_checkpoint(config, watchdog)
        else:
            with Run(config, watchdog) as run:
                run.train()
    except PeerLost as error:
        logger.error("%s", error)
        return 1
    except (RunFailed, CheckpointError) as error:  # the same on every rank
        if rank == 0:
            print(f"titanlite: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

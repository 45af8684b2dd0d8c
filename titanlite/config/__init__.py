"""Configuration: typed sections, TOML and command line, every check before anything is started. No torch in here."""

from titanlite.config.schema import ConfigError
from titanlite.config.sections import (
    ActivationCheckpointConfig,
    CheckpointConfig,
    CommConfig,
    CompileConfig,
    Config,
    DataConfig,
    JobConfig,
    LrSchedulerConfig,
    MetricsConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelismConfig,
    ProfilingConfig,
    TokenizerConfig,
    TrainingConfig,
)

__all__ = [
    "ActivationCheckpointConfig",
    "CheckpointConfig",
    "CommConfig",
    "CompileConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "JobConfig",
    "LrSchedulerConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelismConfig",
    "ProfilingConfig",
    "TokenizerConfig",
    "TrainingConfig",
]

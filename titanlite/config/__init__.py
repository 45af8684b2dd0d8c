"""Configuration: typed sections, TOML and command line, every check before anything is started. No torch in here."""

from titanlite.config.checks import check
from titanlite.config.degrees import resolve_degrees
from titanlite.config.dump import diff, dump_toml
from titanlite.config.load import OneLineParser, load_config, take_number
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
    SourceConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
    source_configs,
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
    "OneLineParser",
    "OptimizerConfig",
    "ParallelismConfig",
    "ProfilingConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "ValidationConfig",
    "check",
    "diff",
    "dump_toml",
    "load_config",
    "resolve_degrees",
    "source_configs",
    "take_number",
]

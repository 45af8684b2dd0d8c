"""Every check of a configuration that needs neither torch nor the content of a file.

Each value must lie in its range; then keys must fit together, and a key that asks for something which another rules
out is an error, not ignored. The settings of a feature that is switched off (checkpoint.interval, compile.backend,
...) may stand: features are switched off from the command line, over a file that configures them.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from typing import Any, cast

from titanlite.config.degrees import check_data_parallel, check_tensor_parallel, divisors, listed
from titanlite.config.dump import toml_value
from titanlite.config.schema import SCHEMA, schema_name, to_tables
from titanlite.config.sections import Config, source_configs


class _Doubt(Exception):
    """A rule asked for a key that is known to be wrong."""


class _Known:
    """A config, or a section of it, of which no wrong key can be read."""

    def __init__(self, section: Any, name: str, doubtful: Set[str]) -> None:
        self._section, self._name, self._doubtful = section, name, doubtful

    def __getattr__(self, key: str) -> Any:
        return self._of(getattr(self._section, key), f"{self._name}.{key}" if self._name else key)

    def _of(self, value: Any, name: str) -> Any:
        if name in self._doubtful:
            raise _Doubt
        if isinstance(value, Mapping):
            return {key: self._of(item, f"{name}.{key}") for key, item in value.items()}
        return _Known(value, name, self._doubtful) if dataclasses.is_dataclass(value) else value


def check(config: Config, world_size: int | None, doubtful: Set[str] = frozenset()) -> list[str]:
    """What is wrong, one line each, naming keys, values and the fix.

    world_size is the number of ranks, None where it is not known yet. doubtful: sections and keys (`section.key`) that
    are known to be wrong already; a rule says nothing from where it needs one of them, or a key out of its range.
    """
    out_of_range = {
        f"{table}.{key}": f"{table}.{key} = {toml_value(value)}: must be {limits.words}"
        for table, values in to_tables(dataclasses.asdict(config)).items()
        for key, value in values.items()
        if (limits := SCHEMA[schema_name(table)][key].range) and not limits.holds(value)
    }
    known = cast(Config, _Known(config, "", doubtful | out_of_range.keys()))
    rules = (_paths, _model, _training, _optimizer, _schedule, _data, _sources, _checkpoint, _validation)
    found = [*(rule(known) for rule in rules), check_tensor_parallel(known), check_data_parallel(known, world_size)]
    problems = list(out_of_range.values())
    for together in found:
        with suppress(_Doubt):
            for problem in together:  # one by one: what a rule says before it doubts stays said
                problems.append(problem)
    return problems


def _paths(config: Config) -> Iterator[str]:
    paths = {"job.dump_folder": config.job.dump_folder, "tokenizer.path": config.tokenizer.path}
    paths |= {"checkpoint.init_from": config.checkpoint.init_from, "data.cache_dir": config.data.cache_dir}
    for key, path in paths.items():
        if "\0" in path:
            yield f"{key} = {toml_value(path)}: no path may have the character NUL"


def _model(config: Config) -> Iterator[str]:
    m = config.model
    if m.head_dim:
        if m.head_dim % 2:
            yield f"model.head_dim = {m.head_dim} is odd: rotary embeddings turn pairs, so use {m.head_dim + 1}"
    elif m.dim % m.n_heads:
        yield (
            f"model.n_heads = {m.n_heads} does not divide model.dim = {m.dim}: use for example model.dim ="
            f" {-(-m.dim // m.n_heads) * m.n_heads}, or name the width of a head in model.head_dim"
        )
    elif m.dim // m.n_heads % 2:
        yield (
            f"model.dim = {m.dim} / model.n_heads = {m.n_heads} gives heads of odd size {m.dim // m.n_heads}: rotary"
            f" embeddings turn pairs, so use a model.dim that is a multiple of {2 * m.n_heads}"
        )
    if m.n_heads % m.n_kv_heads:
        yield (
            f"model.n_kv_heads = {m.n_kv_heads} does not divide model.n_heads = {m.n_heads}: every key and value head"
            f" serves equally many query heads, so use {listed(divisors(m.n_heads))}"
        )
    if m.rope_scaling_factor == 1:
        for key in ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_seq_len"):
            if (value := getattr(m, key)) != SCHEMA["model"][key].default:
                yield _no_effect(f"model.{key}", value, "model.rope_scaling_factor = 1.0", "a factor above 1")
    elif m.rope_high_freq_factor <= m.rope_low_freq_factor:
        yield (
            f"model.rope_high_freq_factor = {m.rope_high_freq_factor} must be above model.rope_low_freq_factor ="
            f" {m.rope_low_freq_factor} (Llama 3.1: 4 and 1)"
        )


def _training(config: Config) -> Iterator[str]:
    t = config.training
    for key, what in (("mixed_precision_param", "compute"), ("mixed_precision_reduce", "reduce gradients")):
        if getattr(t, key) == "float64" and t.dtype == "float32":
            yield (
                f'training.{key} = "float64" would {what} in a wider type than training.dtype = "float32" keeps:'
                f' set training.dtype = "float64" too, or leave training.{key} = "auto"'
            )
    if config.model.attention == "flex":
        if t.seq_len % 128:
            yield (
                f'model.attention = "flex" works on blocks of 128 tokens and training.seq_len = {t.seq_len} is no'
                f" multiple: use {-(-t.seq_len // 128) * 128}, or another model.attention"
            )
        if t.mixed_precision_param == "float64":
            yield (
                'model.attention = "flex" has no float64 kernel and training.mixed_precision_param = "float64":'
                ' use model.attention = "sdpa" or "dense"'
            )
    if t.on_nonfinite == "stop" and t.max_skipped_steps != SCHEMA["training"]["max_skipped_steps"].default:
        yield _no_effect(
            "training.max_skipped_steps", t.max_skipped_steps, 'training.on_nonfinite = "stop"', 'on_nonfinite = "skip"'
        )
    p = config.profiling
    if p.enable_profiling and p.profile_freq < 4:
        yield (
            f"profiling.profile_freq = {p.profile_freq} is too short for profiling.enable_profiling = true:"
            " a trace takes 1 step of warm-up and 3 steps, so use 4 or more"
        )


def _optimizer(config: Config) -> Iterator[str]:
    o = config.optimizer
    if o.name == "adamw":
        for key in ("muon_momentum", "muon_ns_steps"):
            if (value := getattr(o, key)) != SCHEMA["optimizer"][key].default:
                yield _no_effect(f"optimizer.{key}", value, 'optimizer.name = "adamw"', 'name = "muon"')
    elif config.parallelism.enable_cpu_offload:
        yield (
            'optimizer.name = "muon" with parallelism.enable_cpu_offload = true: the CPU would multiply its matrices;'
            ' use enable_cpu_offload = false or optimizer.name = "adamw"'
        )


def _schedule(config: Config) -> Iterator[str]:
    s, trained = config.lr_scheduler, config.training.steps
    steps, key = (s.total_steps, "lr_scheduler.total_steps") if s.total_steps else (trained, "training.steps")
    decay_steps = round(s.decay_ratio * steps)
    if s.decay_ratio == 0 and s.total_steps:
        yield _no_effect(key, steps, "lr_scheduler.decay_ratio = 0.0", "a ratio above 0")
    elif steps < trained:
        yield (
            f"lr_scheduler.total_steps = {steps} is less than training.steps = {trained}: the rate would end before"
            f" the run; raise total_steps to {trained} or more, or use 0"
        )
    # A run that ends within its warm-up is whole: it is how one tries a config for a few steps.
    if s.warmup_steps < steps and s.decay_ratio < 1 and s.warmup_steps + decay_steps > steps:
        yield (
            f"lr_scheduler.warmup_steps = {s.warmup_steps} and lr_scheduler.decay_ratio = {s.decay_ratio}"
            f" ({decay_steps} steps) overlap in {key} = {steps}: lower one of them, or use decay_ratio = 1.0"
            " (decay from the end of the warm-up on)"
        )
    if s.decay_ratio == 0:
        for key in ("decay_type", "lr_min"):
            if (value := getattr(s, key)) != SCHEMA["lr_scheduler"][key].default:
                yield _no_effect(f"lr_scheduler.{key}", value, "lr_scheduler.decay_ratio = 0.0", "a ratio above 0")


def _data(config: Config) -> Iterator[str]:
    d = config.data
    default = SCHEMA["data"]
    if not d.shuffle and d.shuffle_block != default["shuffle_block"].default:
        yield _no_effect("data.shuffle_block", d.shuffle_block, "data.shuffle = false", "shuffle = true")
    if d.window_tokens < 64 * (seq_len := config.training.seq_len):
        yield (
            f"data.window_tokens = {d.window_tokens} is less than 64 rows of training.seq_len = {seq_len}, from which a"
            f" step would be drawn: use {64 * seq_len} or more"
        )
    if d.on_bad_record == "stop" and d.max_bad_records != default["max_bad_records"].default:
        yield _no_effect(
            "data.max_bad_records", d.max_bad_records, 'data.on_bad_record = "stop"', 'on_bad_record = "skip"'
        )
    if d.sources:
        for key in ("paths", "exclude", "format", "text_field", "max_epochs"):
            if (value := getattr(d, key)) != default[key].default:
                first = next(iter(d.sources))
                yield (
                    f"data.{key} = {toml_value(value)} has no effect where there are data.sources: remove it, or move"
                    f" it into the tables of the sources it is meant for, as in data.sources.{first}.{key}"
                )
    elif not d.paths:
        for key in ("format", "text_field"):
            if (value := getattr(d, key)) != default[key].default and (key, value) != ("format", "text"):
                yield (
                    f"data.{key} = {toml_value(value)} and data.paths = []: the built-in corpus is text files, so name"
                    f" files in data.paths, or remove data.{key}"
                )


def _sources(config: Config) -> Iterator[str]:
    sources = config.data.sources
    for name, source in source_configs(config.data).items():
        table = f"data.sources.{name}" if sources else "data"
        if source.format == "text" and source.text_field != "text":
            yield _no_effect(
                f"{table}.text_field",
                source.text_field,
                f'{table}.format = "text"',
                'format = "auto", "jsonl" or "parquet"',
            )
        if sources and not source.paths:
            others = [other for other in sources if sources[other].paths]
            known = f" (sources with paths: {', '.join(others)})" if others else ""
            yield f"data.sources.{name}.paths = []: name the files of this source, or remove it{known}"
    if sources and not any(source.weight for source in sources.values()):
        weights = " and ".join(f"data.sources.{name}.weight = {source.weight}" for name, source in sources.items())
        yield f"{weights}: no source is left to train on, so give one of them a weight above 0"


def _checkpoint(config: Config) -> Iterator[str]:
    c, steps = config.checkpoint, config.training.steps
    if c.resume == "never" and c.load_step != -1:
        yield _no_effect(
            "checkpoint.load_step", c.load_step, 'checkpoint.resume = "never"', 'resume = "must" or "auto"'
        )
    if not c.enable and c.resume == "must":
        yield _no_effect("checkpoint.resume", c.resume, "checkpoint.enable = false", "enable = true")
    if not c.enable and c.load_step != -1:
        yield _no_effect("checkpoint.load_step", c.load_step, "checkpoint.enable = false", "enable = true")
    if c.init_from and c.resume == "must":
        yield _no_effect(
            "checkpoint.init_from", c.init_from, 'checkpoint.resume = "must"', 'resume = "auto" or "never"'
        )
    if c.init_from and c.load_step != -1:
        yield _no_effect("checkpoint.init_from", c.init_from, f"checkpoint.load_step = {c.load_step}", "load_step = -1")
    if c.load_step > steps:
        yield (
            f"checkpoint.load_step = {c.load_step} lies beyond training.steps = {steps}: use an earlier step, or raise"
            " training.steps"
        )


def _validation(config: Config) -> Iterator[str]:
    v, tp = config.validation, config.parallelism.tensor_parallel_degree
    if not v.paths:
        if (v.enable or v.only) and not config.data.held_out_fraction:
            yield (
                f"validation.{'only' if v.only else 'enable'} = true, and there is nothing to validate on: name files"
                " in validation.paths, or keep a share of the documents out of training (data.held_out_fraction = 0.01)"
            )
        for key in ("exclude", "format", "text_field"):
            if (value := getattr(v, key)) != SCHEMA["validation"][key].default:
                yield _no_effect(f"validation.{key}", value, "validation.paths = []", "paths")
    elif v.format == "text" and v.text_field != "text":
        yield _no_effect(
            "validation.text_field", v.text_field, 'validation.format = "text"', 'format = "auto", "jsonl" or "parquet"'
        )
    if v.use_ema and not config.training.ema_decay:
        yield "validation.use_ema = true, and training.ema_decay = 0.0 keeps no average: set it, for example to 0.999"
    if v.enable and v.sample_prompts and tp > 1:
        yield (
            f"validation.sample_prompts with parallelism.tensor_parallel_degree = {tp}: training splits the sequence"
            " over tensor-parallel ranks, and a sample grows by one token at a time; remove the prompts, and continue"
            " them from a checkpoint by python -m titanlite.generate"
        )


def _no_effect(name: str, value: object, other: str, fix: str) -> str:
    return f"{name} = {toml_value(value)} has no effect while {other}: remove it, or use {fix}"

"""The configuration: what a file and a command line may say, and what every wrong one is told."""

import ast
import dataclasses
import io
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import titanlite.config
from titanlite.config import Config, ConfigError, ParallelismConfig, diff, dump_toml, load_config, resolve_degrees
from titanlite.config.dump import field_docs
from titanlite.config.load import key_lines, read_toml
from titanlite.config.schema import COMMAND_LINE_ONLY, SCHEMA, SOURCE

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "train_configs").glob("*.toml"))
KEYS = [(section, key) for section, fields in SCHEMA.items() for key in fields]


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def write(folder: Path, text: str) -> str:
    path = folder / "run.toml"
    path.write_text(text)
    return str(path)


def problems(*argv: str, file: str | None = None) -> list[str]:
    """What load_config says to a command line, and to a file."""
    with pytest.raises(ConfigError) as caught:
        load_config([*(["--job.config_file", file] if file else []), *argv])
    assert str(caught.value).splitlines() == caught.value.problems, "one line per problem"
    return caught.value.problems


# What may be written, and which of several places wins


def test_defaults_then_file_then_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, '[training]\nsteps = 7\nseq_len = 256\n[optimizer]\nlr = 1\n[data]\npaths = ["a", "b,c"]\n')
    config = load_config(["--job.config_file", path, "--training.seq_len=128", "--model.attention", "dense"])
    expected = Config()
    assert config == dataclasses.replace(
        expected,
        job=dataclasses.replace(expected.job, config_file=path),
        training=dataclasses.replace(expected.training, steps=7, seq_len=128),
        optimizer=dataclasses.replace(expected.optimizer, lr=1.0),
        data=dataclasses.replace(expected.data, paths=("a", "b,c")),
        model=dataclasses.replace(expected.model, attention="dense"),
    )
    assert isinstance(config.optimizer.lr, float)


def test_the_last_of_equal_arguments_wins(tmp_path: Path) -> None:
    path = write(tmp_path, "[training]\nsteps = 7\n")
    config = load_config(
        [
            "--job.config_file",
            "missing.toml",
            "--training.steps",
            "1",
            "--training.steps=2",
            f"--job.config_file={path}",
        ]
    )
    assert (config.training.steps, config.job.config_file) == (2, path)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("--data.paths=", ()),
        ("--data.paths=a", ("a",)),
        ("--data.paths=a,b/*.txt", ("a", "b/*.txt")),
        ('--data.paths=["a,b", "[c]*.txt"]', ("a,b", "[c]*.txt")),
        ("--job.description=--x = y", "--x = y"),
        ("--compile.enable=true", True),
        ("--data.shuffle=false", False),
        ("--checkpoint.load_step=-1", -1),
        ("--training.steps=1_000", 1000),
        ("--optimizer.lr=1", 1.0),
        ("--optimizer.lr=3e-4", 3e-4),
        ("--training.on_nonfinite=skip", "skip"),
    ],
)
def test_command_line_values(argument: str, value: object) -> None:
    name, _, text = argument.removeprefix("--").partition("=")
    section, key = name.split(".")
    for argv in ([argument], [f"--{name}", text]):
        if text.startswith("--") and len(argv) == 2:
            continue  # only with "=": apart it is an option
        found = getattr(getattr(load_config(argv), section), key)
        assert found == value
        assert type(found) is type(value)


def valid_values(field: "dataclasses.Field[Any]", name: str) -> st.SearchStrategy[Any]:
    """Values of the field's type; of numbers only the default, since they must also fit together."""
    if get_origin(field.type) is tuple:
        return st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)).map(tuple)
    if field.type is str and name != "job.config_file":
        return st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
    return st.just(field.default)


@given(
    st.fixed_dictionaries(
        {s: st.fixed_dictionaries({k: valid_values(f, f"{s}.{k}") for k, f in fs.items()}) for s, fs in SCHEMA.items()}
    ),
    st.floats(min_value=1e-300, allow_infinity=False),
    st.integers(0, 2**63 - 1),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_dump_loads_back_equal(tmp_path: Path, values: dict[str, dict[str, Any]], lr: float, seed: int) -> None:
    values["optimizer"]["lr"], values["training"]["seed"] = lr, seed
    if not values["data"]["paths"]:  # nothing to choose in the built-in corpus
        values["data"]["text_field"] = "text"
    if not values["validation"]["paths"]:
        values["validation"] |= {"exclude": (), "text_field": "text"}
    config = Config(**{f.name: f.type(**values[f.name]) for f in dataclasses.fields(Config)})  # type: ignore[operator]
    path = write(tmp_path, dump_toml(config))
    loaded = load_config(["--job.config_file", path])
    assert dataclasses.replace(loaded, job=config.job) == config
    assert loaded.job == dataclasses.replace(config.job, config_file=path)
    for section, key in [pair for pair in KEYS if pair[0] != SOURCE]:  # there is none here
        mark = "# " if f"{section}.{key}" in COMMAND_LINE_ONLY else ""
        assert f"\n{mark}{key} = " in dump_toml(config), f"{section}.{key}"


def test_diff_names_what_changed() -> None:
    old = json.loads(json.dumps(dataclasses.asdict(load_config(["--data.paths=a"]))))  # as a manifest has it
    assert diff(old, load_config(["--data.paths=a"])) == []
    old["training"]["of_old"] = 3
    del old["model"]["dim"], old["model"]["n_layers"]  # as if it were from before there were these keys
    assert diff(old, load_config(["--training.steps", "200", "--data.paths=a,b", "--model.n_layers=6"])) == [
        "model.n_layers: 4 -> 6",
        'data.paths: ["a"] -> ["a", "b"]',
        "training.steps: 100 -> 200",
        "training.of_old: 3 -> (not known)",
    ]


# Mistakes of a single key


def one_edit(word: str) -> Iterator[str]:
    """The word with a letter left out, doubled, replaced by a wrong one, or swapped with its neighbour."""
    for i, letter in enumerate(word):
        yield word[:i] + word[i + 1 :]
        yield word[:i] + letter + word[i:]
        yield word[:i] + ("x" if letter != "x" else "y") + word[i + 1 :]
        yield word[:i] + word[i + 1 : i + 2] + letter + word[i + 2 :]


TWINS = {"beta1": "beta2", "beta2": "beta1"}  # for "bet1a" either is a good guess


@pytest.mark.parametrize("section", SCHEMA)
def test_every_misspelt_key_is_told_its_line_and_its_right_name(tmp_path: Path, section: str) -> None:
    meant: dict[str, set[str]] = {}
    for key in SCHEMA[section]:
        for typo in one_edit(key):
            if typo and typo not in SCHEMA[section]:
                meant.setdefault(typo, set()).update({f"{section}.{key}", f"{section}.{TWINS.get(key, key)}"})
    file = write(tmp_path, f"# comment\n[{section}]\n" + "".join(f"{typo} = 1\n" for typo in meant))
    told = problems(file=file)
    assert len(told) == len(meant)
    for line, (typo, keys), problem in zip(itertools.count(3), meant.items(), told, strict=False):
        prefix = f"{file}:{line}: unknown key {section}.{typo}: did you mean "
        assert problem.startswith(prefix)
        assert problem.removeprefix(prefix).rstrip("?") in keys
    told = problems(*[f"--{section}.{typo}=1" for typo in meant])
    for (typo, keys), problem in zip(meant.items(), told, strict=True):
        prefix = f"command line: unknown key --{section}.{typo}: did you mean --"
        assert problem.startswith(prefix)
        assert problem.removeprefix(prefix).rstrip("?") in keys


def test_every_misspelt_section_is_told_its_line_and_its_right_name(tmp_path: Path) -> None:
    meant = {typo: section for section in SCHEMA if section != SOURCE for typo in one_edit(section)}
    meant = {typo: section for typo, section in meant.items() if typo not in SCHEMA}
    file = write(tmp_path, "".join(f"[{typo}]\nlr = 1\nsteps = 'x'\n" for typo in meant))
    expected = [
        f"{file}:{3 * i + 1}: unknown section [{typo}]: did you mean [{section}]?"
        for i, (typo, section) in enumerate(meant.items())
    ]
    assert problems(file=file) == expected


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("--steps=1", "unknown key --steps: did you mean --training.steps?"),
        ("--training.lr=1", "unknown key --training.lr: did you mean --optimizer.lr?"),
        ("--trainig.seq_len=1", "unknown key --trainig.seq_len: did you mean --training.seq_len?"),
        ("--training.seq-len=1", "unknown key --training.seq-len: did you mean --training.seq_len?"),
        ("--zzz", "unknown key --zzz; --help lists all"),
        ("training.steps=1", "'training.steps=1' is no option: write --section.key value"),
        ("--training.steps", "--training.steps needs a value: --training.steps integer"),
        ("--compile.enable", "--compile.enable needs a value: --compile.enable true|false"),
    ],
)
def test_mistakes_on_the_command_line(argument: str, hint: str) -> None:
    assert problems(argument) == [f"command line: {hint}"]


WRONG_TOML: dict[object, list[str]] = {
    bool: ["1", '"true"', "0.0", "[true]"],
    int: ["1.0", '"1"', "true", "1979-05-27", "{}"],
    float: ['"1"', "false", "nan", "inf", "-inf", "[1.0]", "1" + 400 * "0"],
    str: ["1", "true", '["a"]', "12:00:00"],
    tuple[str, ...]: ['"a"', "[1]", '["a", true]', '[["a"]]', "{a = 1}"],
}
WRONG_TEXT: dict[object, list[str]] = {
    bool: ["1", "True", "yes", ""],
    int: ["1.0", "1e3", "x", "", "1 2", "١"],
    float: ["x", "", "nan", "inf", "-Infinity", "1e999"],
    str: ["\udcff"],
    tuple[str, ...]: ["[a]", "[1]", '["a"', "\udcff"],
}


PATHS = f"--{SOURCE}.paths=x"  # what a source needs to be sound


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_every_wrong_type_is_an_error(tmp_path: Path, section: str, key: str) -> None:
    kind = SCHEMA[section][key].type
    is_choice = get_origin(kind) is Literal
    paths = '\npaths = ["x"]' if section == SOURCE and key != "paths" else ""
    for text in ['"Auto"', "1", "true"] if is_choice else WRONG_TOML[kind]:
        if f"{section}.{key}" in COMMAND_LINE_ONLY:
            continue
        file = write(tmp_path, f"[{section}]\n\n{key} = {text}{paths}")
        (problem,) = problems(file=file)
        assert problem.startswith(f"{file}:3: {section}.{key} must be ")
        assert "finite" in problem or text.lstrip("-") not in ("nan", "inf")
        assert not is_choice or f"one of {', '.join(get_args(kind))}, not " in problem
    for text in ["Auto", "", "'auto'"] if is_choice else WRONG_TEXT[kind]:
        if key != "config_file":
            (problem,) = problems(*[PATHS][: len(paths)], f"--{section}.{key}={text}")
            assert problem.startswith(f"command line: --{section}.{key} must be ")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[training]\nsteps = \n", ":2: not valid TOML: Invalid value"),
        (b"[training]\nsteps = 1\nsteps = 2\n", ":3: not valid TOML: Cannot overwrite a value"),
        (b"[training]\nsteps = 1" + 5000 * b"0" + b"\n", ": not valid TOML: "),
        (b"a = " + 100000 * b"[", ": not valid TOML: nested too deeply"),
        (b"\xff\xfe[\x00", ": not UTF-8 text (byte 0)"),
        (b"[job]\nconfig_file = 'x'", ":2: job.config_file has no effect in a file: remove it"),
        (
            b"[checkpoint]\n\nload_step = 5",
            ":3: checkpoint.load_step in a file would turn every later start back: remove",
        ),
        (
            b"[checkpoint]\nload_step = -1",
            ":2: checkpoint.load_step in a file would turn every later start back: remove",
        ),
        (b'[training]\n\n"st\\u0065pz" = 1', ":3: unknown key training.stepz: did you mean training.steps?"),
        (b"training = {\"se\\u0065d\" = 'x'}", ":1: training.seed must be an integer"),
        (b"training = 1", ":1: training is a section: write [training] above its keys"),
        (b"\nsteps = 1", ":2: steps must stand in a section: did you mean training.steps?"),
        (b"[[training]]", ":1: training is a section: write [training] above its keys"),
        (b"[zzz]", ":1: unknown section [zzz]; --help lists all"),
    ],
)
def test_a_broken_file_is_told_in_one_line(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    (problem,) = problems(file=str(path))
    assert problem.startswith(f"{path}{expected}")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = str(tmp_path / "no.toml")
    assert problems(file=missing) == [f"job.config_file = {missing!r}: there is no such file"]
    assert problems(file=str(tmp_path)) == [f"job.config_file = {str(tmp_path)!r}: cannot be read: Is a directory"]


def test_bom_and_crlf_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf[training]\r\nsteps = 7\r\nstepz = 8\r\n")
    assert problems(file=str(path)) == [f"{path}:3: unknown key training.stepz: did you mean training.steps?"]


leaves = st.one_of(
    st.text(st.sampled_from("a\"'\\#[]{}=.,\n "), max_size=12),
    st.sampled_from(["\nk0 = 1\n", '"""', "'''", "[t0]\nk1 = 2"]),
    st.integers(-9, 9),
    st.booleans(),
)
lists = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3), max_leaves=6)
tables = st.recursive(
    lists, lambda inner: st.dictionaries(st.sampled_from(["k0", "x"]), inner, max_size=2), max_leaves=6
)


@given(
    st.dictionaries(
        st.sampled_from(["t0", "t 1", "t.2"]),
        st.dictionaries(st.sampled_from(["k0", "k1", "k 2", "k=3"]), tables, min_size=1),
        min_size=1,
    ),
    st.booleans(),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_line_numbers_agree_with_the_parser(tmp_path: Path, content: dict[str, Any], multiline: bool) -> None:
    """On the line where a key is said to stand, renaming it renames it for the TOML parser too."""
    text = tomli_w.dumps(content, multiline_strings=multiline)
    lines = key_lines(text)
    for table, keys in content.items():
        for key in keys:
            shown = key if re.fullmatch(r"\w+", key) else f'"{key}"'
            changed = text.splitlines(keepends=True)
            before = changed[lines[table, key] - 1]
            header = r'^(\[+("[^"]*"|\w+)\.)?'  # a table in the table, or a plain key
            changed[lines[table, key] - 1] = re.sub(header + re.escape(shown), r"\1new", before)
            assert "new" in read_toml(write(tmp_path, "".join(changed)))[0][table]


# Keys that must fit together


def test_all_problems_are_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    file = write(tmp_path, "[training]\nstpes = 1\nseq_len = 'a'\n[modle]\ndim = 1\n[optimizer]\nbeta1 = 1\n")
    assert problems("--metrics.log_freq", "0", "--comile.enable=true", "x", file=file) == [
        "command line: 'x' is no option: write --section.key value",
        f"{file}:2: unknown key training.stpes: did you mean training.steps?",
        f'{file}:3: training.seq_len must be an integer, not "a"',
        f"{file}:4: unknown section [modle]: did you mean [model]?",
        "command line: unknown key --comile.enable: did you mean --compile.enable?",
        "optimizer.beta1 = 1.0: must be at least 0 and below 1",
        "metrics.log_freq = 0: must be from 1 to 2147483647",
        "training.global_batch_size = 8 rows cannot be dealt to 3 data-parallel ranks (parallelism.data_parallel_"
        "replicate_degree x parallelism.data_parallel_shard_degree, which is what parallelism.tensor_parallel_degree"
        " leaves): use 1, 2, 4 or 8 of them, or a multiple of 3 rows",
    ]


def test_no_check_speaks_of_a_key_that_is_wrong_already(tmp_path: Path) -> None:
    """Each of the first ones alone would also break the rule that the second key is part of."""
    assert len(problems("--model.dim=0", "--model.n_heads=3", "--model.n_kv_heads=3")) == 1
    assert (
        len(problems("--training.stepz=5000", "--lr_scheduler.warmup_steps=60", "--lr_scheduler.decay_ratio=0.5")) == 1
    )
    assert len(problems("--training.global_batch_size=x", "--training.local_batch_size=3")) == 1
    file = write(tmp_path, "[trainin]\nglobal_batch_size = 9\n")
    assert len(problems("--training.local_batch_size=3", file=file)) == 1


def test_every_number_has_a_range() -> None:
    assert [f"{s}.{k}" for s, k in KEYS if SCHEMA[s][k].type in (int, float) and not SCHEMA[s][k].range] == []


@pytest.mark.parametrize("name", [f"{s}.{k}" for s, k in KEYS if SCHEMA[s][k].range])
def test_every_range_is_checked(name: str) -> None:
    section, _, key = name.rpartition(".")
    outside: dict[object, list[str]] = {
        int: ["-2", "9223372036854775808"],
        float: ["-0.5"],
        str: [""],
        tuple[str, ...]: ["a,,b"],
    }
    for text in outside[SCHEMA[section][key].type]:
        (problem,) = problems(*[PATHS][: section == SOURCE], f"--{name}={text}")
        assert problem.startswith(f"{name} = ")
        assert ": must be " in problem


RULES = [  # command line, number of ranks, words of the one message
    ("--model.n_heads=6 --model.n_kv_heads=6", None, "model.n_heads = 6 model.dim = 256 258"),
    ("--model.dim=40", None, "model.dim = 40 model.n_heads = 8 5 16"),
    ("--model.head_dim=31", None, "model.head_dim = 31 32"),
    ("--model.n_kv_heads=3", None, "model.n_kv_heads = 3 model.n_heads = 8 1, 2, 4 or 8"),
    ("--model.rope_low_freq_factor=2", None, "model.rope_low_freq_factor = 2.0 model.rope_scaling_factor = 1.0"),
    ("--model.rope_high_freq_factor=2", None, "model.rope_high_freq_factor = 2.0 model.rope_scaling_factor = 1.0"),
    ("--model.rope_original_max_seq_len=9", None, "model.rope_original_max_seq_len = 9 model.rope_scaling_factor"),
    ("--model.rope_scaling_factor=8 --model.rope_low_freq_factor=4", None, "rope_high_freq_factor = 4.0 low_freq"),
    ("--training.mixed_precision_param=float64", None, 'param = "float64" training.dtype = "float32"'),
    ("--training.mixed_precision_reduce=float64", None, 'reduce = "float64" training.dtype = "float32"'),
    ("--model.attention=flex --training.seq_len=200", None, 'model.attention = "flex" training.seq_len = 200 256'),
    (
        "--model.attention=flex --training.dtype=float64 --training.mixed_precision_param=float64",
        None,
        'model.attention = "flex" training.mixed_precision_param = "float64" sdpa',
    ),
    ("--training.max_skipped_steps=3", None, 'training.max_skipped_steps = 3 training.on_nonfinite = "stop"'),
    ("--profiling.enable_profiling=true --profiling.profile_freq=3", None, "profiling.profile_freq = 3 enable 4"),
    ("--optimizer.muon_momentum=0.9", None, 'optimizer.muon_momentum = 0.9 optimizer.name = "adamw" name = "muon"'),
    ("--optimizer.muon_ns_steps=6", None, 'optimizer.muon_ns_steps = 6 optimizer.name = "adamw" name = "muon"'),
    (
        "--optimizer.name=muon --parallelism.enable_cpu_offload=true",
        None,
        'optimizer.name = "muon" parallelism.enable_cpu_offload = true name = "adamw"',
    ),
    ("--lr_scheduler.warmup_steps=60 --lr_scheduler.decay_ratio=0.5", None, "warmup_steps = 60 0.5 steps = 100"),
    ("--lr_scheduler.decay_ratio=0 --lr_scheduler.lr_min=0.1", None, "lr_min = 0.1 lr_scheduler.decay_ratio = 0.0"),
    ("--lr_scheduler.decay_ratio=0 --lr_scheduler.decay_type=sqrt", None, 'decay_type = "sqrt" decay_ratio = 0.0'),
    ("--lr_scheduler.total_steps=50", None, "lr_scheduler.total_steps = 50 training.steps = 100 0"),
    ("--lr_scheduler.total_steps=200 --lr_scheduler.decay_ratio=0", None, "total_steps = 200 decay_ratio = 0.0"),
    (
        "--lr_scheduler.total_steps=200 --lr_scheduler.warmup_steps=150 --lr_scheduler.decay_ratio=0.5",
        None,
        "warmup_steps = 150 0.5 100 steps lr_scheduler.total_steps = 200",
    ),
    ("--data.format=jsonl", None, 'data.format = "jsonl" data.paths = []'),
    ("--data.format=parquet", None, 'data.format = "parquet" data.paths = []'),
    ("--data.text_field=a", None, 'data.text_field = "a" data.paths = []'),
    ("--data.paths=a --data.format=text --data.text_field=b", None, 'data.text_field = "b" data.format = "text"'),
    ("--data.shuffle=false --data.shuffle_block=9", None, "data.shuffle_block = 9 data.shuffle = false"),
    ("--data.max_bad_records=9", None, 'data.max_bad_records = 9 data.on_bad_record = "stop" on_bad_record = "skip"'),
    (
        "--data.window_tokens=131071",
        None,
        "data.window_tokens = 131071 less than 64 rows training.seq_len = 2048 use 131072 or more",
    ),
    (
        "--data.window_tokens=131072 --training.global_batch_size=260",
        4,
        "data.window_tokens = 131072 a rank's share of a step, 65 rows training.seq_len = 2048 use 133120 or more",
    ),
    ("--checkpoint.resume=never --checkpoint.load_step=5", None, 'load_step = 5 checkpoint.resume = "never"'),
    ("--checkpoint.enable=false --checkpoint.resume=must", None, 'resume = "must" checkpoint.enable = false'),
    ("--checkpoint.enable=false --checkpoint.load_step=5", None, "load_step = 5 checkpoint.enable = false"),
    ("--checkpoint.init_from=x --checkpoint.resume=must", None, 'init_from = "x" checkpoint.resume = "must"'),
    ("--checkpoint.init_from=x --checkpoint.load_step=5", None, 'init_from = "x" checkpoint.load_step = 5'),
    ("--checkpoint.load_step=500", None, "checkpoint.load_step = 500 training.steps = 100"),
    ("--parallelism.tensor_parallel_degree=8", None, "tensor_parallel_degree = 8 model.n_kv_heads = 4 1, 2 or 4"),
    ("--parallelism.tensor_parallel_degree=4 --training.seq_len=130", None, "degree = 4 training.seq_len = 130 1 or 2"),
    ("--parallelism.tensor_parallel_degree=4 --model.vocab_size=8190", None, "degree = 4 vocab_size = 8190 1 or 2"),
    ("--parallelism.tensor_parallel_degree=4 --model.ffn_dim=766", None, "degree = 4 model.ffn_dim = 766 1 or 2"),
    ("--parallelism.tensor_parallel_degree=4 --model.n_heads=2 --model.n_kv_heads=2", None, "n_heads = 2 heads"),
    ("--parallelism.tensor_parallel_degree=2", 3, "tensor_parallel_degree = 2 number of ranks, 3 1 or 3 2 ranks"),
    ("--parallelism.data_parallel_shard_degree=2", 4, "data_parallel_shard_degree = 2 needs 2 there are 4 -1"),
    ("", 3, "training.global_batch_size = 8 3 data-parallel 1, 2, 4 or 8 multiple of 3"),
    ("--parallelism.data_parallel_shard_degree=3", None, "global_batch_size = 8 3 data-parallel 1, 2, 4 or 8"),
    ("--training.local_batch_size=3", 2, "local_batch_size = 3 4 rows 2 data-parallel global_batch_size = 8 1, 2 or 4"),
    ("--training.local_batch_size=3", None, "training.local_batch_size = 3 global_batch_size = 8 1, 2, 4 or 8"),
]


@pytest.mark.parametrize(("arguments", "world_size", "words"), RULES)
def test_every_rule(monkeypatch: pytest.MonkeyPatch, arguments: str, world_size: int | None, words: str) -> None:
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
    told = problems(*arguments.split())
    assert all(word in told[0] for word in words.split()), told[0]
    assert len(told) == 1 or words == "n_heads = 2 heads"  # two keys break that one rule


@pytest.mark.parametrize(
    ("arguments", "world_size"),
    [
        ("", None),
        ("", 8),
        ("--training.steps=1 --lr_scheduler.warmup_steps=2000", None),  # trying a config for a few steps
        ("--training.steps=1 --lr_scheduler.warmup_steps=2000 --lr_scheduler.decay_ratio=0.2", None),
        ("--lr_scheduler.warmup_steps=50 --lr_scheduler.decay_ratio=0.5", None),
        ("--checkpoint.enable=false --checkpoint.interval=7 --checkpoint.async_mode=async", None),
        ("--compile.enable=false --compile.backend=aot_eager", None),
        ("--checkpoint.init_from=x", None),
        ("--training.dtype=float64 --training.mixed_precision_param=float64 --model.attention=sdpa", None),
        ("--parallelism.tensor_parallel_degree=2 --parallelism.data_parallel_replicate_degree=2", 8),
        ("--model.rope_scaling_factor=8 --model.rope_low_freq_factor=2", None),
        ("--training.on_nonfinite=skip --training.max_skipped_steps=3", None),
        ("--data.on_bad_record=skip --data.max_bad_records=0", None),
        ("--data.window_tokens=131072 --training.global_batch_size=256", 4),
        ("--data.format=text --data.max_epochs=1 --data.packing=best_fit --data.held_out_fraction=0.01", None),
        ("--data.exclude=*/encodings/*", None),
        ("--lr_scheduler.total_steps=200 --lr_scheduler.warmup_steps=120 --lr_scheduler.decay_ratio=0.4", None),
        ("--optimizer.name=muon --optimizer.muon_momentum=0 --optimizer.muon_ns_steps=1", None),
        ("--data.paths=a --data.exclude=b --data.format=parquet --data.text_field=c", None),
    ],
)
def test_sound_configurations_pass(monkeypatch: pytest.MonkeyPatch, arguments: str, world_size: int | None) -> None:
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
    load_config(arguments.split())


def test_world_size_must_be_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert problems() == ["WORLD_SIZE = 'two' in the environment: must be the number of ranks"]


def test_degrees_agree_with_trying_all_of_them() -> None:
    for world_size, replicate, shard, tp in itertools.product(range(1, 13), (1, 2, 3), (-1, 1, 2, 4), (1, 2, 5)):
        wanted = ParallelismConfig(replicate, shard, tp)
        fitting = [s for s in range(1, 13) if replicate * s * tp == world_size and shard in (-1, s)]
        if fitting:
            assert resolve_degrees(wanted, world_size) == (replicate, fitting[0], tp)
        else:
            with pytest.raises(ValueError, match="rank"):
                resolve_degrees(wanted, world_size)


# What is shipped, shown and read


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_load_and_state_their_size(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from titanlite.model.transformer import Llama

    for world_size in (1, 2, 8):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        config = load_config(["--job.config_file", str(path)])
    with torch.device("meta"):
        model = Llama(config.model)
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in path.read_text()


def test_shipped_configs_are_there() -> None:
    assert {path.stem for path in SHIPPED} >= {"debug", "llama_150m", "llama_1b", "llama_8b"}


@pytest.mark.parametrize("columns", [60, 80, 97, 120])
def test_help_explains_every_key(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = io.StringIO()
    with redirect_stdout(shown), pytest.raises(SystemExit) as caught:
        load_config(["--training.steps", "x", "--help"])
    assert caught.value.code == 0
    text = re.sub(r"\s+", " ", shown.getvalue())
    docs = field_docs()
    assert set(docs) == {*KEYS, ("data", "sources")}
    for section, key in KEYS:
        default = json.dumps(SCHEMA[section][key].default)
        pattern = rf"--{section}\.{key} \S+ \(default {re.escape(default)}\) {re.escape(docs[section, key])}"
        assert re.search(pattern, text), f"{section}.{key}"
    assert "usage: " in text
    assert max(map(len, shown.getvalue().splitlines())) <= 120


def test_help_survives_a_reader_that_leaves() -> None:
    command = f"{sys.executable} -m titanlite.config --help | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_config_imports_nothing_heavy() -> None:
    code = "import sys, titanlite.config; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    outside = {name.split(".")[0] for name in loaded.split()} - sys.stdlib_module_names
    assert "titanlite" in outside
    assert not outside & {"torch", "numpy", "tiktoken", "tomli_w"}


def test_the_config_command(tmp_path: Path) -> None:
    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "titanlite.config", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    resolved = run("--training.steps=7")
    assert (resolved.returncode, resolved.stderr) == (0, "")
    assert load_config(["--job.config_file", write(tmp_path, resolved.stdout)]).training.steps == 7
    assert run("--print", "job.dump_folder", "--job.dump_folder", "a b").stdout == "a b\n"
    wrong = run("--training.steps=x", "--model.dim=0")
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (1, "", 2)


def section_reads(source: str) -> set[tuple[str, str]]:
    """(section, key) of every `<section>.key` that a file reads, by names that are bound to a section.

    A section's own name (`config.training`, `training`) is such a name, and so is an argument, variable or attribute
    that is annotated with the section's class or assigned from such a name. The same holds of sources: what
    source_configs gives, and what one loops over, is one of them or holds them.
    """
    classes = {type_.__name__: section for section, type_ in titanlite.config.schema.SECTIONS.items()}
    bound = {section: {section} for section in SCHEMA} | {"source_configs": {SOURCE}, "sources": {SOURCE}}

    def last_name(node: ast.AST | None) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.Subscript):
            return last_name(node.value)
        if isinstance(node, ast.Call):  # source_configs(...), or a dict's .items()
            return last_name(node.func if isinstance(node.func, ast.Name) else getattr(node.func, "value", None))
        return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""

    def bind(target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for pair in zip(target.elts, value.elts, strict=False):
                bind(*pair)
        elif last_name(value) in bound:
            for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                bound.setdefault(last_name(name), set()).update(bound[last_name(value)])

    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation:
            named = {last_name(part) for part in ast.walk(node.annotation)} & classes.keys()
            bound.setdefault(node.arg, set()).update(classes[name] for name in named)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                bind(target, node.value)
        elif isinstance(node, ast.For | ast.comprehension):
            bind(node.target, node.iter)
    return {
        (section, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        for section in bound.get(last_name(node.value), ())
    }


DEGREES = ["data_parallel_replicate_degree", "data_parallel_shard_degree", "tensor_parallel_degree"]


def test_every_key_is_read_somewhere() -> None:
    """A key that no room reads would change nothing, and say nothing. load_config, resolve_degrees and
    ModelConfig.head_size read five.

    Rooms get the keys of a corpus that is no mixture as those of its one source, from source_configs.
    """
    package = ROOT / "titanlite"
    files = [path for path in package.rglob("*.py") if package / "config" not in path.parents]
    reads = set().union(*(section_reads(path.read_text()) for path in [*files, package / "config/sections.py"]))
    reads |= {("job", "config_file"), ("model", "head_dim"), *(("parallelism", degree) for degree in DEGREES)}
    assert {f"{section}.{key}" for section, key in KEYS if (section, key) not in reads} == set()


def test_reads_of_a_source_are_found() -> None:
    for code in (
        "def f(source: SourceConfig): return source.weight",
        "def f(sources: dict[str, SourceConfig]): return [s.weight for s in sources.values()]",
        "for name, s in source_configs(data).items(): print(s.weight)",
        "found = source_configs(self.data)\nweights = {name: s.weight for name, s in found.items()}",
        "one = source_configs(data)['web']\none.weight",
        "config.data.sources['web'].weight",
    ):
        assert (SOURCE, "weight") in section_reads(code), code
    for code in ("weight = 1\nprint(weight)", "def f(s: Source): return s.weight", "data.weight", "self.weight"):
        assert (SOURCE, "weight") not in section_reads(code), code

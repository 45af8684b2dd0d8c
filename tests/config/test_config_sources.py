"""The sources of a mixture: tables in [data.sources], keys on the command line, and what every wrong one is told."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.config.test_config import ROOT, problems, write
from titanlite.config import Config, DataConfig, SourceConfig, diff, dump_toml, load_config, source_configs
from titanlite.config.dump import help_text

TWO = """\
[data]
shuffle = false

[data.sources.web]
paths = ["web/*.jsonl"]
weight = 3

[data.sources.code-2_X]
paths = ["**/*.py"]
exclude = ["**/test_*"]
max_epochs = 4
"""


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def mixture(**sources: SourceConfig) -> Config:
    return Config(data=DataConfig(sources=sources))


# What may be written


def test_sources_of_a_file(tmp_path: Path) -> None:
    assert load_config(["--job.config_file", write(tmp_path, TWO)]).data == DataConfig(
        shuffle=False,
        sources={
            "web": SourceConfig(paths=("web/*.jsonl",), weight=3.0),
            "code-2_X": SourceConfig(paths=("**/*.py",), exclude=("**/test_*",), max_epochs=4),
        },
    )


@pytest.mark.parametrize(
    "text",
    [
        'data.sources.web.paths = ["a"]\ndata.sources.web.weight = 2\n',
        '[data]\nsources.web = {paths = ["a"], weight = 2}\n',
        '[data.sources]\nweb.paths = ["a"]\n"web".weight = 2\n',
        '[data.sources."w\\u0065b"]\nweight = 2\npaths = ["a"]\n',
    ],
)
def test_every_way_in_which_toml_writes_a_table(tmp_path: Path, text: str) -> None:
    config = load_config(["--job.config_file", write(tmp_path, text)])
    assert config.data.sources == {"web": SourceConfig(paths=("a",), weight=2.0)}


def test_the_command_line_overrides_and_creates(tmp_path: Path) -> None:
    file = write(tmp_path, TWO)
    new = ["--data.sources.books.paths=a,b", "--data.sources.books.format", "parquet"]
    config = load_config(["--job.config_file", file, "--data.sources.web.weight", "0.5", *new])
    assert list(config.data.sources) == ["web", "code-2_X", "books"]
    assert config.data.sources["web"] == SourceConfig(paths=("web/*.jsonl",), weight=0.5)
    assert config.data.sources["books"] == SourceConfig(paths=("a", "b"), format="parquet")


def test_a_source_may_be_called_as_anything_else_is() -> None:
    for name in ("data", "sources", "NAME", "weight", "-", "0"):
        config = load_config([f"--data.sources.{name}.paths=a"])
        assert config.data.sources == {name: SourceConfig(paths=("a",))}


def test_source_configs() -> None:
    single = DataConfig(("a",), ("b",), "jsonl", "c", 5)
    assert source_configs(single) == {"data": SourceConfig(("a",), 1.0, ("b",), "jsonl", "c", 5)}
    assert source_configs(DataConfig()) == {"data": SourceConfig()}
    sources = {"web": SourceConfig(("a",), 2.0), "code": SourceConfig(("b",))}
    found = source_configs(DataConfig(sources=sources))
    assert found == sources
    assert list(found) == ["code", "web"], "the order of the tables in a file must not change a run"


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
names = st.text(st.sampled_from("abzAZ019_-"), min_size=1)
sources = st.builds(
    SourceConfig,
    paths=st.lists(texts, min_size=1).map(tuple),
    weight=st.floats(1e-300, 1e18),
    exclude=st.lists(texts).map(tuple),
    format=st.sampled_from(["auto", "jsonl", "parquet"]),
    text_field=texts,
    max_epochs=st.integers(0, 2**31 - 1),
)


@given(st.dictionaries(names, sources, min_size=1, max_size=3))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_dumped_mixture_loads_back_equal(tmp_path: Path, drawn: dict[str, SourceConfig]) -> None:
    config = mixture(**drawn)
    path = write(tmp_path, dump_toml(config))
    loaded = load_config(["--job.config_file", path])
    assert dataclasses.replace(loaded, job=config.job) == config
    assert list(loaded.data.sources) == list(drawn)
    stored = json.loads(json.dumps(dataclasses.asdict(config)))  # as a manifest has it
    assert diff(stored, config) == []
    arguments = [
        f"--data.sources.{name}.{key}={json.dumps(value) if isinstance(value, tuple) else value}"
        for name, source in drawn.items()
        for key, value in dataclasses.asdict(source).items()
    ]
    assert load_config(arguments).data == config.data


def test_diff_names_the_keys_of_sources() -> None:
    web, code = SourceConfig(("a",)), SourceConfig(("b",), format="text")
    old = json.loads(json.dumps(dataclasses.asdict(mixture(web=web, code=code))))
    assert diff(old, mixture(code=code, web=web)) == []
    assert diff(old, mixture(web=dataclasses.replace(web, weight=0.5, paths=("a", "c")), code=code)) == [
        'data.sources.web.paths: ["a"] -> ["a", "c"]',
        "data.sources.web.weight: 1.0 -> 0.5",
    ]
    changed = diff(old, mixture(web=web))
    assert len(changed) == 6
    assert 'data.sources.code.format: "text" -> (not known)' in changed
    del old["data"]["sources"]  # written before there were mixtures
    assert 'data.sources.web.paths: (not known) -> ["a"]' in diff(old, mixture(web=web))


def test_help_lists_the_keys_of_a_source_once() -> None:
    shown = help_text()
    for field in dataclasses.fields(SourceConfig):
        assert shown.count(f"--data.sources.NAME.{field.name} ") == 1
    assert shown.count("data.sources.NAME.weight") == 1
    assert "A mixture: a table [data.sources.NAME] per source" in shown


def test_the_config_command_prints_a_key_of_a_source(tmp_path: Path) -> None:
    file = write(tmp_path, TWO)
    command = [sys.executable, "-m", "titanlite.config", "--print", "data.sources.web.weight"]
    done = subprocess.run([*command, "--job.config_file", file], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3.0\n", "")


# What is wrong

NAMED = "NAME of A-Z, a-z, 0-9, _ and -"
TABLE = f"write [data.sources.NAME] above its keys, {NAMED}"


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("[data.sources.a]\npaths = ['x']\n\nwieght = 1", 4, "unknown key data.sources.a.wieght: did you mean"),
        ("[data.sources.a]\npahts = ['x']", 2, "data.sources.a.pahts: did you mean data.sources.a.paths?"),
        (
            "[data.sources]\na = {paths = ['x'], wt = 1}",
            2,
            "key data.sources.a.wt: did you mean data.sources.a.weight?",
        ),
        ("[data.sources.a]\npaths = 'x'", 2, 'data.sources.a.paths must be a list of strings, not "x"'),
        ("[data.sources.a]\npaths = ['x']\nformat = 'tar'", 3, "format must be one of auto, text, jsonl, parquet, not"),
        ("[data.sources.a]\npaths = ['x']\nweight = nan", 3, "data.sources.a.weight must be a finite number"),
        ("[data.sources.a]\npaths = ['x']\nweight = -inf", 3, "data.sources.a.weight must be a finite number"),
        ("[data.sources.a]\npaths = ['x']\n[data.sources.a.weight]", 3, "data.sources.a.weight must be a number"),
        ("[data.sources.a]\npaths = ['x']\n[data.sources.a.b]", 3, "unknown key data.sources.a.b"),
        ("[data.sources.'a.b']\npaths = ['x']", 1, f"unknown key data.sources.a.b: {TABLE}"),
        ("[data.sources.'\u00e9']\npaths = ['x']", 1, f"unknown key data.sources.\u00e9: {TABLE}"),
        ('[data.sources."a\\n"]\npaths = ["x"]', 1, f"unknown key data.sources.a : {TABLE}"),
        ("[data.sources.'']\npaths = ['x']", 1, f"unknown key data.sources.: {TABLE}"),
        ("[data]\n'sources.a' = {paths = ['x']}", 2, f"unknown key data.sources.a: {TABLE}"),
        ("['data.sources.NAME']\npaths = ['x']", 1, "unknown section [data.sources.NAME]"),
        ("[data.sources]\nweight = 1", 2, f"unknown key data.sources.weight: {TABLE}"),
        ("[data]\n\nsources = 3", 3, f"unknown key data.sources: {TABLE}"),
        ("[[data.sources.a]]\npaths = ['x']", 1, f"unknown key data.sources.a: {TABLE}"),
        ("[data.source.a]\npaths = ['x']", 1, "unknown key data.source: did you mean data.sources?"),
        ("[dato.sources.a]\npaths = ['x']", 1, "unknown section [dato]: did you mean [data]?"),
        ("[training.sources.a]\npaths = ['x']", 1, "unknown key training.sources"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, line: int, expected: str) -> None:
    file = write(tmp_path, text)
    (problem,) = problems(file=file)
    assert problem.startswith(f"{file}:{line}: ")
    assert expected in problem


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--data.sources.a.wieght=1", "unknown key --data.sources.a.wieght: did you mean --data.sources.a.weight?"),
        ("--data.source.a.weight=1", "unknown key --data.source.a.weight: did you mean --data.sources.NAME.weight?"),
        ("--weight=1", "unknown key --weight: did you mean --data.sources.NAME.weight?"),
        ("--data.weight=1", "unknown key --data.weight: did you mean --data.sources.NAME.weight?"),
        ("--data.sources.a=x", f"unknown key --data.sources.a: write --data.sources.NAME.key, {NAMED}"),
        ("--data.sources=x", f"unknown key --data.sources: write --data.sources.NAME.key, {NAMED}"),
        ("--data.sources.a.b.weight=1", f"key --data.sources.a.b.weight: write --data.sources.NAME.key, {NAMED}"),
        ("--data.sources..weight=1", f"unknown key --data.sources..weight: write --data.sources.NAME.key, {NAMED}"),
        ("--data.sources.a\n.weight=1", "unknown key --data.sources.a .weight"),
        ("--data.sources.a.weight", "--data.sources.a.weight needs a value: --data.sources.a.weight number"),
        ("--data.sources.a.weight=inf", "--data.sources.a.weight must be a finite number"),
    ],
)
def test_mistakes_on_the_command_line(argument: str, expected: str) -> None:
    told = "\n".join(problems(argument, "--data.sources.a.paths=x"))
    assert told.startswith("command line: ")
    assert expected in told


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--data.paths=x", 'data.paths = ["x"] has no effect where there are data.sources: remove it, or move'),
        ("--data.exclude=x", "data.sources.a.exclude"),
        ("--data.format=text", 'data.format = "text" has no effect'),
        ("--data.text_field=x", "data.sources.a.text_field"),
        ("--data.max_epochs=1", "data.sources.a.max_epochs"),
        ("--data.sources.b.weight=1", "data.sources.b.paths = []: name the files of this source, or remove it"),
        ("--data.sources.b.weight=1", "(sources with paths: a)"),
        ("--data.sources.a.weight=0", "data.sources.a.weight = 0.0: no source is left to train on"),
        (
            "--data.sources.a.weight=0 --data.sources.b.weight=0 --data.sources.b.paths=y",
            "data.sources.a.weight = 0.0 and data.sources.b.weight = 0.0: no source is left",
        ),
        ("--data.sources.a.weight=1e19", "data.sources.a.weight = 1e+19: must be from 0 to 1e18"),
        ("--data.sources.a.weight=-1", "data.sources.a.weight = -1.0: must be from 0 to 1e18"),
        ("--data.sources.b-1.max_epochs=-1 --data.sources.b-1.paths=y", "data.sources.b-1.max_epochs = -1: must be"),
        ("--data.sources.a.paths=x,", 'data.sources.a.paths = ["x", ""]: must be without empty strings'),
        (
            "--data.sources.a.format=text --data.sources.a.text_field=x",
            'data.sources.a.text_field = "x" has no effect while data.sources.a.format = "text": remove it',
        ),
    ],
)
def test_what_does_not_fit_together(arguments: str, expected: str) -> None:
    (problem,) = problems("--data.sources.a.paths=x", *arguments.split())
    assert expected in problem


@pytest.mark.parametrize(
    "arguments",
    [
        "--data.sources.a.weight=0 --data.sources.b.paths=y --data.sources.b.weight=1e-9",
        "--data.sources.a.weight=0.2 --data.sources.a.max_epochs=1",
        "--data.shuffle_block=9 --data.cache_dir=c --data.on_bad_record=skip --data.max_bad_records=9",
        "--data.sources.a.text_field=x --data.sources.a.exclude=b --data.sources.a.format=auto",
        "--data.format=auto --data.paths=",  # the defaults, said aloud
    ],
)
def test_sound_mixtures_pass(arguments: str) -> None:
    load_config(["--data.sources.a.paths=x", *arguments.split()])


def test_no_check_speaks_of_a_source_that_is_wrong_already(tmp_path: Path) -> None:
    """Each second mistake is one only because of the first."""
    assert len(problems("--data.sources.a.paths=[1]")) == 1
    assert len(problems("--data.sources.a.weight=x", "--data.sources.a.paths=x", "--data.sources.b.pathz=y")) == 2
    assert len(problems("--data.sources.a.weight=0", "--data.sources.a.paths=x", "--data.sources.a.weight=x")) == 1
    for text in ("[data.source.a]\npaths = ['x']", "[date.sources.a]\npaths = ['x']", "[data.sources.'a ']"):
        assert len(problems("--data.sources.a.weight=0.5", file=write(tmp_path, text))) == 1
    told = problems("--data.sources.ab.paths=[1]", "--data.sources.a.weight=1")
    assert len(told) == 2, "a is not ab"

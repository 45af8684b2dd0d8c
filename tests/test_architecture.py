"""The shape of the package: who may import whom, what a module may do when it is imported, and how long it may grow."""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from titanlite.config.schema import SECTIONS

PACKAGE = Path(__file__).parent.parent / "titanlite"
FILES = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}

# Imports go down: each layer may import the ones below it, and the rooms of a layer nothing of each other but as told.
LAYERS: list[dict[str, set[str]]] = [
    {name: {"inspection"} for name in ("cache", "convert", "generate", "parity", "plan", "show", "verify")},
    {"train": set(), "inspection": set()},
    {"validation": {"loading"}, "loading": set()},
    {"trainer": set()},
    {"data": set(), "parallel": set()},
    {"model": set(), "checkpoint": set(), "tokenizer": set(), "optim": {"muon"}, "muon": set(), "run": {"checkpoint"}},
    {"config": set(), "files": {"log"}, "log": set(), "sharding": set(), "command": {"config"}},
]
COMMANDS = set(LAYERS[0])
ROOMS = {
    room: among | {lower for below in LAYERS[depth + 1 :] for lower in below}
    for depth, layer in enumerate(LAYERS)
    for room, among in layer.items()
}
ROOMS["data"] -= {"checkpoint", "optim", "muon", "run"}
ROOMS["inspection"] -= {"validation", "loading", "trainer", "model", "checkpoint", "run"}  # it answers without torch
ROOMS["model"] = {"config"}
WHOLE_CONFIG = {*COMMANDS, "train", "inspection", "validation", "loading", "trainer"}

# What is private in torch and used all the same: (file, name) -> why there is no public way.
PRIVATE = {
    (
        "model/ops/sdpa.py",
        "_scaled_dot_product_flash_attention_for_cpu",
    ): "autograd inside a custom op does nothing, so its"
    " forward saves the logsumexp for its backward; no public call returns it",
    ("model/ops/sdpa.py", "_scaled_dot_product_flash_attention_for_cpu_backward"): "as above",
    ("model/ops/matmul.py", "_linear_pointwise"): "the public calls give oneDNN no product in float32",
    ("parallel/apply.py", "_scaled_dot_product_flash_attention"): "the selective AC policy names ops to keep",
    ("parallel/apply.py", "_scaled_dot_product_efficient_attention"): "as above",
    ("parallel/apply.py", "_c10d_functional"): "as above",
    ("run/joining.py", "_set_pg_timeout"): "no public call changes the timeout of a group that exists",
    ("run/watchdog.py", "_current_frames"): "where another thread stands; the one interface, and a documented one",
    ("run/watchdog.py", "_exit"): "ends a process whose main thread hangs; documented",
    ("plan/meter.py", "_subclasses"): "FakeTensor lives there and nowhere else",
    ("plan/meter.py", "_python_dispatch"): "TorchDispatchMode lives there and nowhere else, and is documented",
    ("plan/step.py", "_subclasses"): "as FakeTensor",
    ("run/profiling.py", "_record_memory_history"): "the only interface, and the documented one",
    ("run/profiling.py", "_dump_snapshot"): "as above",
}


def room_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def imports(path: str, source: str) -> Iterator[tuple[str, list[str]]]:
    """(module, names taken from it) of every import in the file, inside functions too; relative ones made absolute."""
    package = ["titanlite", *path.split("/")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])]), [alias.name for alias in node.names]


def forbidden_imports(path: str, source: str) -> Iterator[str]:
    room = room_of(path)
    if path != "__init__.py" and room not in ROOMS:
        yield f"{path}: give this room a place in LAYERS"
        return
    allowed = ROOMS.get(room, set()) | {room}
    for module, names in imports(path, source):
        parts = module.split(".")
        if parts[0] != "titanlite":
            if room == "config" and parts[0] not in {*sys.stdlib_module_names, "tomllib", "tomli"}:
                yield f"{path}: config imports {module}, which takes time to import"
            continue
        for other in [parts[1]] if len(parts) > 1 else names:
            if other not in allowed:
                yield f"{path}: {room} may not import {other}"
        if room == "data" and parts[1:2] == ["model"] and module != "titanlite.model.documents":
            yield f"{path}: data takes the document rule, and not {module}, which takes time to import"
        if parts[1:2] == ["config"] and room not in {"config", "command", *WHOLE_CONFIG}:
            sections = {section.__name__ for section in SECTIONS.values()} | {"source_configs"}
            yield from (f"{path}: {room} takes its section, not {n}" for n in names if n not in sections)


def import_effects(path: str, source: str) -> Iterator[str]:
    """What happens on import besides definitions, and state that could change later."""
    for node in ast.parse(source).body:
        where = f"{path}:{node.lineno}"
        if isinstance(node, ast.If):
            test = ast.unparse(node.test)
            if not (test == "TYPE_CHECKING" or test.replace('"', "'") == "__name__ == '__main__'"):
                yield f"{where}: if {test}"
        elif isinstance(node, ast.Expr):
            registers = isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute)
            registers = registers and node.value.func.attr == "register_autograd"  # part of an operation's definition
            if not isinstance(node.value, ast.Constant) and not registers:
                yield f"{where}: {ast.unparse(node)[:60]}"
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            is_container = isinstance(node.value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp)
            if is_container and not all(name.isupper() or name == "__all__" for name in names):
                yield f"{where}: a container that is no constant: {', '.join(names)}"
        elif not isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef):
            yield f"{where}: {type(node).__name__} at module level"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Global):
            yield f"{path}:{node.lineno}: global {', '.join(node.names)}"


def private_names(path: str, source: str) -> Iterator[tuple[str, str]]:
    """(file, name) of every underscored name that is not our own: in imports, and on objects other than self."""
    tree = ast.parse(source)
    own = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) in ("self", "cls")}
    own |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for module, names in imports(path, source):
        if module.split(".")[0] != "titanlite":
            yield from ((path, n) for n in [*module.split("."), *names] if n.startswith("_") and n != "__future__")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"_\w*(?<!__)", node.attr) and node.attr not in own:
            yield path, node.attr


def too_long(path: str, source: str) -> Iterator[str]:
    if (lines := len(source.splitlines())) > 400:
        yield f"{path}: {lines} lines: which room does it want to be?"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno and (lines := node.end_lineno - node.lineno) >= 80:
            yield f"{path}:{node.lineno}: {node.name} has {lines} lines"


def undocumented(path: str, source: str) -> Iterator[str]:
    if source.strip() and not ast.get_docstring(ast.parse(source)):
        yield f"{path}: say in a docstring what the module owns and what it refuses"


def unlisted_private_names(path: str, source: str) -> Iterator[str]:
    yield from (f"{p}: {name} is private" for p, name in private_names(path, source) if (p, name) not in PRIVATE)


# What crosses rooms is a dataclass. A dict with agreed keys may be in a signature where it is JSON or TOML: by room.
JSON = {
    "files": "what it reads and writes",
    "config": "what TOML files and the JSON of a checkpoint hold, before it is a Config",
    "checkpoint": "a manifest, and what others put into it: a Meta's fields, which old versions wrote too",
    "data": "cursors and manifests of corpora: the state of a torchdata Loader is JSON",
    "inspection": "cursors",
    "verify": "cursors",
    "show": "cursors, and lines of a run's logs",
    "run": "lines of logs, env.json, and the pulses that ranks send",
    "convert": "config.json and tokenizer files",
    "plan": "what --json prints",
}


def dicts_across_rooms(path: str, source: str) -> Iterator[str]:
    """Public signatures and fields with a dict that holds anything, in rooms that have no JSON to speak of."""
    if room_of(path) in JSON:
        return
    for node in ast.walk(ast.parse(source)):
        annotations: list[ast.expr | None] = []
        if isinstance(node, ast.ClassDef):
            annotations = [field.annotation for field in node.body if isinstance(field, ast.AnnAssign)]
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            annotations = [a.annotation for a in (*node.args.args, *node.args.kwonlyargs)] + [node.returns]
        for annotation in filter(None, annotations):
            if re.search(r"(dict|Mapping)\[str, Any\]", written := ast.unparse(annotation)):
                yield f"{path}:{annotation.lineno}: {written}: let a dataclass name what is in it"


LAWS = [forbidden_imports, import_effects, unlisted_private_names, dicts_across_rooms, too_long, undocumented]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_package_keeps_the_law(law: Callable[[str, str], Iterator[str]]) -> None:
    assert [problem for path, source in FILES.items() for problem in law(path, source)] == []


def test_no_name_is_two_things() -> None:
    """A class's name is found in one file: a reader who searches for it finds what it is."""
    places: dict[str, list[str]] = {}
    for path, source in FILES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(path)
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_no_private_name_is_listed_in_vain() -> None:
    used = {use for path, source in FILES.items() for use in private_names(path, source)}
    assert set(PRIVATE) <= used


@pytest.mark.parametrize(
    ("law", "path", "source"),
    [
        (forbidden_imports, "model/transformer.py", "from titanlite.log import logger"),
        (forbidden_imports, "model/transformer.py", "def f():\n    import titanlite.data.loader"),
        (forbidden_imports, "model/transformer.py", "from ..log import logger"),
        (forbidden_imports, "model/transformer.py", "from titanlite import trainer"),
        (forbidden_imports, "data/loader.py", "from titanlite.config import Config"),
        (forbidden_imports, "data/loader.py", "from titanlite.config.load import load_config"),
        (forbidden_imports, "data/loader.py", "from titanlite.model import Llama"),
        (forbidden_imports, "config/load.py", "import torch"),
        (forbidden_imports, "config/load.py", "from numpy import array"),
        (forbidden_imports, "config/load.py", "from titanlite.log import logger"),
        (forbidden_imports, "data/corpus.py", "from titanlite.inspection.seek import seek"),
        (forbidden_imports, "inspection/survey.py", "from titanlite.run.agreement import read_json"),
        (forbidden_imports, "trainer.py", "from titanlite.validation import Validation"),
        (forbidden_imports, "trainer.py", "from titanlite.train.__main__ import train"),
        (forbidden_imports, "plan/facts.py", "from titanlite.show.__main__ import main"),
        (forbidden_imports, "helpers.py", "x = 1"),
        (import_effects, "data/loader.py", "import logging\nlogging.basicConfig()"),
        (import_effects, "data/loader.py", "for x in range(3): print(x)"),
        (import_effects, "data/loader.py", "if True:\n    x = 1"),
        (import_effects, "data/loader.py", "cache = {}"),
        (import_effects, "data/loader.py", "def f():\n    global x\n    x = 1"),
        (unlisted_private_names, "optim.py", "from torch.distributed._composable import replicate"),
        (unlisted_private_names, "optim.py", "import torch._dynamo"),
        (unlisted_private_names, "optim.py", "import torch\ntorch._C._cuda_init()"),
        (unlisted_private_names, "optim.py", "def f(x): return x._local_tensor"),
        (dicts_across_rooms, "trainer.py", "def state(self) -> dict[str, Any]: ..."),
        (dicts_across_rooms, "trainer.py", "class A:\n    facts: Mapping[str, Any]"),
        (dicts_across_rooms, "loading.py", "def f(*, meta: dict[str, Any]): ..."),
        (too_long, "optim.py", 401 * "\n"),
        (too_long, "optim.py", "def f():\n" + 80 * "    pass\n"),
        (undocumented, "optim.py", "import torch"),
    ],
)
def test_each_law_sees_what_breaks_it(law: Callable[[str, str], Iterator[str]], path: str, source: str) -> None:
    assert list(law(path, source)) != []

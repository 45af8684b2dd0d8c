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

# Room -> rooms of ours that it may import. Rooms besides these may import what stands above them; verbs everything.
ROOMS: dict[str, set[str]] = {
    "config": set(),
    "log": set(),
    "files": set(),
    "model": {"config", "loss", "matmul"},
    "loss": {"config", "matmul"},
    "matmul": set(),
    "tokenizer": {"config", "log"},
    "sharding": set(),
    "muon": {"sharding"},
    "optim": {"config", "log", "muon"},
    "checkpoint": {"config", "files", "log"},
    "metrics": {"config", "files", "log"},
    "profiling": {"config", "log"},
    "runtime": {"config", "log"},
    "signals": set(),
    "pulse": set(),
    "watchdog": {"log", "pulse", "signals"},
    "claim": {"log", "runtime"},
    "run_folder": {"checkpoint", "claim", "files", "runtime", "watchdog"},
    "data": {"config", "files", "log", "tokenizer"},
    "parallel": {"config", "log", "model", "sharding"},
}
# Each may import all rooms and the ones before it.
ASSEMBLY = [
    "trainer",
    "loading",
    "report",
    "membership",
    "opening",
    "generation",
    "validation",
    "job",
    "huggingface",
    "isolation",
    "invariance",
]
for i, name in enumerate(ASSEMBLY):
    ROOMS[name] = {*ROOMS, *ASSEMBLY[:i]} - {name}
ASSEMBLY.append("inspection")  # it takes the whole config and, of the rooms, only those that need no torch
ROOMS["inspection"] = {"config", "log", "tokenizer", "data"}
ROOMS["planning"] = {*ROOMS, *ASSEMBLY}
ASSEMBLY.append("planning")

# What is private in torch and used all the same: (file, name) -> why there is no public way.
PRIVATE = {
    ("model/sdpa.py", "_scaled_dot_product_flash_attention_for_cpu"): "autograd inside a custom op does nothing, so its"
    " forward saves the logsumexp for its backward; no public call returns it",
    ("model/sdpa.py", "_scaled_dot_product_flash_attention_for_cpu_backward"): "as above",
    ("matmul.py", "_linear_pointwise"): "the public calls give oneDNN no product in float32",
    ("parallel/apply.py", "_scaled_dot_product_flash_attention"): "the selective AC policy names ops to keep",
    ("parallel/apply.py", "_scaled_dot_product_efficient_attention"): "as above",
    ("parallel/apply.py", "_c10d_functional"): "as above",
    ("parallel/mesh.py", "_set_pg_timeout"): "no public call changes the timeout of a group that exists",
    ("watchdog.py", "_current_frames"): "where another thread stands; the one interface, and a documented one",
    ("watchdog.py", "_exit"): "ends a process whose main thread hangs; documented",
    ("planning/meter.py", "_subclasses"): "FakeTensor lives there and nowhere else",
    ("planning/meter.py", "_python_dispatch"): "TorchDispatchMode lives there and nowhere else, and is documented",
    ("planning/step.py", "_subclasses"): "as FakeTensor",
    ("profiling.py", "_record_memory_history"): "the only interface, and the documented one",
    ("profiling.py", "_dump_snapshot"): "as above",
}


def room_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def is_verb(path: str, source: str) -> bool:
    """Verbs are the files directly in the package that one can run."""
    return "/" not in path and any(isinstance(n, ast.FunctionDef) and n.name == "main" for n in ast.parse(source).body)


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
    if path != "__init__.py" and not is_verb(path, source) and room not in ROOMS:
        yield f"{path}: give this room a place in ROOMS or ASSEMBLY, or a main()"
        return
    allowed = set(ROOMS) if is_verb(path, source) else ROOMS.get(room, set()) | {room}
    for module, names in imports(path, source):
        parts = module.split(".")
        if parts[0] != "titanlite":
            if room == "config" and parts[0] not in {*sys.stdlib_module_names, "tomllib", "tomli"}:
                yield f"{path}: config imports {module}, which takes time to import"
            continue
        for other in [parts[1]] if len(parts) > 1 else names:
            if other not in allowed:
                yield f"{path}: {room} may not import {other}"
        if parts[1:2] == ["config"] and room not in ("config", *ASSEMBLY) and not is_verb(path, source):
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


LAWS = [forbidden_imports, import_effects, unlisted_private_names, too_long, undocumented]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_package_keeps_the_law(law: Callable[[str, str], Iterator[str]]) -> None:
    assert [problem for path, source in FILES.items() for problem in law(path, source)] == []


def test_no_private_name_is_listed_in_vain() -> None:
    used = {use for path, source in FILES.items() for use in private_names(path, source)}
    assert set(PRIVATE) <= used


@pytest.mark.parametrize(
    ("law", "path", "source"),
    [
        (forbidden_imports, "model/llama.py", "from titanlite.log import logger"),
        (forbidden_imports, "model/llama.py", "def f():\n    import titanlite.data.loader"),
        (forbidden_imports, "model/llama.py", "from ..log import logger"),
        (forbidden_imports, "model/llama.py", "from titanlite import trainer"),
        (forbidden_imports, "data/loader.py", "from titanlite.config import Config"),
        (forbidden_imports, "data/loader.py", "from titanlite.config.load import load_config"),
        (forbidden_imports, "data/loader.py", "from titanlite.model import Llama"),
        (forbidden_imports, "config/load.py", "import torch"),
        (forbidden_imports, "config/load.py", "from numpy import array"),
        (forbidden_imports, "config/load.py", "from titanlite.log import logger"),
        (forbidden_imports, "data/corpus.py", "from titanlite.inspection.seek import seek"),
        (forbidden_imports, "inspection/accounts.py", "from titanlite.runtime import read_json"),
        (forbidden_imports, "trainer.py", "from titanlite.job import Job"),
        (forbidden_imports, "trainer.py", "from titanlite.train import train"),
        (forbidden_imports, "plan.py", "from titanlite.train import train\ndef main(): pass"),
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
        (too_long, "optim.py", 401 * "\n"),
        (too_long, "optim.py", "def f():\n" + 80 * "    pass\n"),
        (undocumented, "optim.py", "import torch"),
    ],
)
def test_each_law_sees_what_breaks_it(law: Callable[[str, str], Iterator[str]], path: str, source: str) -> None:
    assert list(law(path, source)) != []

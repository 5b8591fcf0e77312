"""The floor plan: a file imports only from lower floors, and files on one floor don't import each other."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import pytest

PACKAGE = Path(__file__).parents[1] / "timm_vix"
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}

LAYERS = {"torch", "timm.layers"}
MODELS = {*LAYERS, "timm.models", "timm.data", "safetensors"}
TOOLS = {
    "torch",
    "timm",
    "safetensors",
    "torchvision",
    "numpy",
    "PIL",
    "tqdm",
    "sklearn",
    "matplotlib",
    "huggingface_hub",
}
# from the ground up: what lives on the floor, and which packages besides Python's own it may import
FLOORS: list[tuple[list[str], set[str]]] = [
    (["mixers/_[!_]*.py", "stems/_[!_]*.py"], LAYERS),  # what mixers, or stems, share; may import each other
    (["mixers/[!_]*.py", "stems/[!_]*.py"], LAYERS),
    (["mixers/__init__.py", "stems/__init__.py"], LAYERS),
    (["swap.py"], {*LAYERS, "timm.models.eva"}),  # the attention of EVA is in its model's file
    (["convert.py"], {*LAYERS, "timm.models"}),  # below the models: one of them is whatever has been converted
    (["names.py", "results.py"], TOOLS),  # how models are named, and files written
    (["models/_projected.py"], LAYERS),  # mixers for hosts that project their queries, keys and values themselves
    (["freeze.py", "models/_checkpoints.py"], MODELS),
    (["models/_[!_]*.py"], MODELS),
    (["models/[!_]*.py"], MODELS),
    (["models/__init__.py"], set()),
    (["__init__.py"], set()),
    # what fine-tuning reads and what it writes; the machine, tables of measurements, the counter of operations
    (["flops.py", "folders.py", "images.py", "interrupt.py", "machine.py", "matching.py"], TOOLS),
    (["records.py", "settings.py", "trends.py"], TOOLS),
    (["teacher.py"], TOOLS),  # what transfer and plan start from
    (["figures.py", "finetune.py", "hub.py", "measure.py", "sensitivity.py"], TOOLS),
    (["cost.py", "plan.py"], TOOLS),
    (["advise.py", "compare.py", "transfer.py"], TOOLS),
    (["report.py"], TOOLS),
    (["cli.py"], TOOLS),
    (["__main__.py"], set()),
]


def floor_of(file: str) -> int:
    for floor, (patterns, _) in enumerate(FLOORS):
        if any(fnmatch(file, pattern) for pattern in patterns):
            return floor
    raise AssertionError(f"{file} is on no floor: give it one in FLOORS")


def imports(file: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that is imported, inside functions too."""
    package = ("timm_vix", *PurePosixPath(file).parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def file_of(name: str, files: set[str]) -> str:
    """The file that a dotted name of ours is in: the name of a module, of a package, or of something inside one."""
    parts = name.split(".")[1:]
    for length in range(len(parts), -1, -1):
        path = "/".join(parts[:length])
        for candidate in (f"{path}.py", f"{path}/__init__.py".lstrip("/")):
            if candidate in files:
                return candidate
    raise AssertionError(f"{name} is in no file")


def wrong_imports(sources: dict[str, str]) -> list[str]:
    wrong = []
    for file, source in sources.items():
        floor = floor_of(file)
        for line, name in imports(file, source):
            top = name.split(".")[0]
            if top == "timm_vix":
                target = file_of(name, set(sources))
                if floor_of(target) > floor or (floor_of(target) == floor > 0):
                    wrong.append(f"{file}:{line} imports {target}, which is not below it")
                continue
            allowed = FLOORS[floor][1] | sys.stdlib_module_names
            if not any(f"{name}.".startswith(f"{package}.") for package in allowed):
                wrong.append(f"{file}:{line} imports {name}, which its floor may not use")
    return wrong


def test_imports_go_down() -> None:
    assert not wrong_imports(SOURCES)


@pytest.mark.parametrize(
    "file, source, words",
    [
        ("mixers/nystrom.py", "from .performer import BLOCK", "mixers/nystrom.py:1 imports mixers/performer.py"),
        ("mixers/nystrom.py", "def f():\n    from ..swap import set_grid", "mixers/nystrom.py:2 imports swap.py"),
        ("mixers/_slot.py", "from . import MIXERS", "mixers/_slot.py:1 imports mixers/__init__.py"),
        ("mixers/_slot.py", "import timm_vix.mixers.nystrom", "mixers/_slot.py:1 imports mixers/nystrom.py"),
        ("stems/convolutional.py", "from ..models import vix", "stems/convolutional.py:1 imports models/vix.py"),
        ("models/vix.py", "from .hybrid import hybrid_vit_tiny", "models/vix.py:1 imports models/hybrid.py"),
        ("__init__.py", "from .cli import main", "__init__.py:1 imports cli.py"),
        ("mixers/nystrom.py", "import einops", "mixers/nystrom.py:1 imports einops"),
        ("mixers/nystrom.py", "from timm.models import register_model", "imports timm.models.register_model"),
        ("swap.py", "import timm", "swap.py:1 imports timm"),
    ],
)
def test_a_wrong_import_is_found(file: str, source: str, words: str) -> None:
    found = wrong_imports({**SOURCES, file: source})
    assert len(found) == 1
    assert words in found[0]


def test_a_file_without_a_floor_is_found() -> None:
    with pytest.raises(AssertionError, match="utils.py is on no floor"):
        wrong_imports({**SOURCES, "utils.py": ""})


@pytest.mark.parametrize("file", SOURCES)
def test_a_file_is_read_at_one_sitting(file: str) -> None:
    lines = len(SOURCES[file].splitlines())
    assert lines < (220 if fnmatch(file, "mixers/[!_]*.py") else 420)


def test_import_registers_names_and_does_nothing_else() -> None:
    program = """
import socket, sys, timm
class NoNetwork(socket.socket):
    def __init__(self, *args, **kwargs): raise AssertionError("a socket was opened")
socket.socket = NoNetwork
before = set(timm.list_models())
import timm_vix
assert len(set(timm.list_models()) - before) > 60
for name in ("matplotlib", "sklearn", "timm_vix.cli", "timm_vix.finetune"):
    assert name not in sys.modules, name
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

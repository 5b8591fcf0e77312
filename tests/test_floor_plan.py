"""Rules between packages: a package imports from those below it only, and mechanisms don't import each other."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import pytest

PACKAGE = Path(__file__).parents[1] / "timm_vix"
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}

LAYERS = {"torch", "timm.layers", "einops"}
MODELS = {*LAYERS, "timm", "safetensors"}
TOOLS = {
    *MODELS,
    "torchvision",
    "numpy",
    "PIL",
    "tqdm",
    "sklearn",
    "matplotlib",
    "huggingface_hub",
    "jinja2",
    "datasets",
}
EXPORTERS = {"onnx", "onnxruntime", "onnxscript", "openvino", "nncf", "torchao", "gradio"}
# from the bottom up: the files of a package, and the libraries besides Python's own that they may import
PACKAGES: list[tuple[str, set[str]]] = [
    ("_[!_]*.py", TOOLS),  # checks, files, devices and names, which every package may use
    ("mixers/*", LAYERS),
    ("stems/*", LAYERS),
    ("slots/*", {*MODELS, "einops"}),
    ("conversion/*", MODELS),
    ("models/*", MODELS),
    ("measure/*", TOOLS),
    ("data/*", TOOLS),
    ("train/*", TOOLS),
    ("planning/*", TOOLS),
    ("benchmark/*", TOOLS),
    ("deploy/*", {*TOOLS, *EXPORTERS}),
    ("cli.py", TOOLS),
    ("__*__.py", TOOLS),
]
# files that don't import each other: one mechanism or stem is read without the others
APART = ("mixers/[!_]*.py", "stems/[!_]*.py")


def level_of(file: str) -> int:
    for level, (pattern, _) in enumerate(PACKAGES):
        if fnmatch(file, pattern):
            return level
    raise AssertionError(f"{file} is in no package of PACKAGES")


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
        level = level_of(file)
        for line, name in imports(file, source):
            if name.split(".")[0] == "timm_vix":
                target = file_of(name, set(sources))
                version = name == "timm_vix.__version__"
                if (level_of(target) > level and not version) or any(
                    fnmatch(file, pattern) and fnmatch(target, pattern) for pattern in APART
                ):
                    wrong.append(f"{file}:{line} imports {target}, which is not below it")
                continue
            allowed = PACKAGES[level][1] | sys.stdlib_module_names
            if not any(f"{name}.".startswith(f"{package}.") for package in allowed):
                wrong.append(f"{file}:{line} imports {name}, which its package may not use")
    return wrong


def test_imports_go_down() -> None:
    assert not wrong_imports(SOURCES)


@pytest.mark.parametrize(
    "file, source, words",
    [
        ("mixers/nystrom.py", "from .performer import BLOCK", "mixers/nystrom.py:1 imports mixers/performer.py"),
        ("mixers/nystrom.py", "def f():\n    from ..conversion import convert", "nystrom.py:2 imports conversion/"),
        ("stems/convolutional.py", "from ..models import vix", "stems/convolutional.py:1 imports models/vix.py"),
        ("models/vix.py", "from ..data.seeds import seed_of", "models/vix.py:1 imports data/seeds.py"),
        ("measure/flops.py", "from ..benchmark import cost", "measure/flops.py:1 imports benchmark/cost.py"),
        ("mixers/nystrom.py", "import numpy", "mixers/nystrom.py:1 imports numpy"),
        ("mixers/nystrom.py", "from timm.models import register_model", "imports timm.models.register_model"),
        ("conversion/convert.py", "import matplotlib", "conversion/convert.py:1 imports matplotlib"),
    ],
)
def test_a_wrong_import_is_found(file: str, source: str, words: str) -> None:
    found = wrong_imports({**SOURCES, file: source})
    assert len(found) == 1
    assert words in found[0]


def test_a_file_outside_the_packages_is_found() -> None:
    with pytest.raises(AssertionError, match="utils.py is in no package"):
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
for name in ("matplotlib", "sklearn", "timm_vix.cli", "timm_vix.train.finetune"):
    assert name not in sys.modules, name
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

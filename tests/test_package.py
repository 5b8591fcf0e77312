"""The distribution and what it promises: wheel, metadata, dependencies, public functions, registered names."""

import ast
import inspect
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import REGISTERED
from readme_renderer import markdown

import timm_vix

ROOT = Path(__file__).parents[1]

# Names that timm takes after `import timm_vix`: checkpoints and scripts hold them, so none may get lost.
NAMES = """
ccn_14 ccn_7 ccn_cifar ccp_14 ccp_7 ccp_cifar cct_14 cct_7 cct_cifar convix_gpsa_tiny cvn_13 cvn_cifar cvp_13 cvp_cifar
cvt_13 cvt_cifar fnet2d_cifar hybrid_fnet_cifar hybrid_fnet_tiny hybrid_mixer_cifar hybrid_mixer_tiny hybrid_pin_cifar
hybrid_pin_tiny hybrid_pip_cifar hybrid_pip_tiny hybrid_via_base hybrid_via_small hybrid_via_tiny hybrid_vil_base
hybrid_vil_cifar hybrid_vil_cifar_rope hybrid_vil_small hybrid_vil_small_rope hybrid_vil_tiny hybrid_vil_tiny_rope
hybrid_vin_base hybrid_vin_cifar hybrid_vin_cifar_rope hybrid_vin_small hybrid_vin_small_rope hybrid_vin_tiny
hybrid_vin_tiny_rope hybrid_vip_base hybrid_vip_cifar hybrid_vip_cifar_rope hybrid_vip_small hybrid_vip_small_rope
hybrid_vip_tiny hybrid_vip_tiny_rope hybrid_vit_base hybrid_vit_cifar hybrid_vit_cifar_rope hybrid_vit_small
hybrid_vit_small_rope hybrid_vit_tiny hybrid_vit_tiny_rope levin_128s levin_cifar levip_128s levip_cifar pin_cifar
pin_tiny pip_cifar pip_tiny t2t_vin_tiny t2t_vit_tiny vix_atrous_base vix_atrous_small vix_atrous_tiny vix_axial_base
vix_axial_cifar vix_axial_cifar_rope vix_axial_small vix_axial_small_rope vix_axial_tiny vix_axial_tiny_rope
vix_fnet_base vix_fnet_cifar vix_fnet_small vix_fnet_tiny vix_from_timm vix_glu_cifar vix_glu_tiny vix_gpsa_cifar
vix_gpsa_cifar_rope vix_gpsa_tiny vix_gpsa_tiny_rope vix_hyena_cifar vix_hyena_tiny vix_latent_cifar
vix_latent_cifar_rope vix_latent_tiny vix_latent_tiny_rope vix_legendre_cifar vix_legendre_tiny vix_linformer_base
vix_linformer_cifar vix_linformer_cifar_rope vix_linformer_small vix_linformer_small_rope vix_linformer_tiny
vix_linformer_tiny_rope vix_mixer_base vix_mixer_cifar vix_mixer_small vix_mixer_tiny vix_nystrom_base vix_nystrom_cifar
vix_nystrom_cifar_rope vix_nystrom_small vix_nystrom_small_rope vix_nystrom_tiny vix_nystrom_tiny_rope
vix_performer_base vix_performer_cifar vix_performer_cifar_rope vix_performer_small vix_performer_small_rope
vix_performer_tiny vix_performer_tiny_rope vix_pool_cifar vix_pool_tiny vix_relu_cifar vix_relu_cifar_rope vix_relu_tiny
vix_relu_tiny_rope vix_retention_cifar vix_retention_cifar_rope vix_retention_tiny vix_retention_tiny_rope
vix_scattering_cifar vix_scattering_tiny vix_softmax_cifar vix_softmax_cifar_rope vix_softmax_small_rope
vix_softmax_tiny_rope
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a program without the repository on its path and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "timm_vix").rglob("*") if path.is_file()}
    ours = {path for path in ours if "__pycache__" not in path}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == ours
    assert any(name.endswith("/report.html") for name in packed)  # a template, which is no Python file


def test_the_source_distribution_can_be_tested(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert tests | {"README.md", "LICENSE", "pyproject.toml", "examples/finetune.py"} <= packed


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """Its dependencies are those of the environment at hand, which stands behind the clean one."""
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    (own,) = (tmp_path / "env").glob("lib/python*/site-packages")
    paths = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (own / "dependencies.pth").write_text("\n".join(sorted(paths)), encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    found = run(python, "-c", "import timm_vix; print(timm_vix.__file__)", cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(own)
    run(python, "-W", "error", "-c", "import timm_vix", cwd=tmp_path)
    assert timm_vix.__version__ in run(*pip, "show", "timm-vix", cwd=tmp_path)
    checked = subprocess.run([*map(str, pip), "check"], cwd=tmp_path, capture_output=True, text=True)
    assert "timm-vix" not in checked.stdout, checked.stdout  # other packages are not ours to judge
    assert "vix_nystrom_tiny" in run(tmp_path / "env" / "bin" / "timm-vix", "list", "vix_nystrom_tiny", cwd=tmp_path)


def test_the_description_can_be_read_on_a_package_index(metadata: Message) -> None:
    assert metadata["Description-Content-Type"] == "text/markdown"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = markdown.render(metadata.get_payload(decode=True).decode())
    assert page is not None
    headings = re.findall(r"^## (.+)$", readme, re.MULTILINE)
    assert len(headings) > 3
    assert all(heading.replace("'", "&#39;") in page or heading in page for heading in headings)
    assert page.count("<table") == len(re.findall(r"^\|[ -:|]*---[ -:|]*\|$", readme, re.MULTILINE)) > 0
    targets = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert targets
    assert not [target for target in targets if not target.startswith(("https://", "http://", "#"))]


def test_metadata_says_what_an_index_asks(metadata: Message) -> None:
    assert metadata["Name"] == "timm-vix"
    assert metadata["Version"] == timm_vix.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    urls = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL"))
    assert {"Homepage", "Source", "Documentation", "Issues"} <= urls.keys()
    assert {"timm", "vision-transformer"} <= set(metadata["Keywords"].split(","))
    classifiers = metadata.get_all("Classifier")
    assert "Topic :: Scientific/Engineering :: Artificial Intelligence" in classifiers
    assert f"Programming Language :: Python :: {metadata['Requires-Python'].removeprefix('>=')}" in classifiers


def imported(inside_functions: bool) -> set[str]:
    """Top-level names of the libraries that our files import, where a module runs or inside its functions."""
    names = set()
    for path in (ROOT / "timm_vix").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        inside = {id(node) for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            if (id(node) in inside) != inside_functions:
                continue
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add((node.module or "").partition(".")[0])
    return names - sys.stdlib_module_names - {"timm_vix"}


def test_what_is_imported_is_declared(metadata: Message) -> None:
    required, optional = set(), set()
    for line in metadata.get_all("Requires-Dist"):
        name = re.match(r"[\w.-]+", line).group().lower().replace("_", "-")
        (optional if "extra ==" in line else required).add(name)
    distributions = packages_distributions()

    def undeclared(names: set[str], declared: set[str]) -> list[str]:
        # a library of an extra that isn't installed has its own name
        brought = {name: distributions.get(name, [name]) for name in names}
        return [name for name in names if not {d.lower().replace("_", "-") for d in brought[name]} & declared]

    assert imported(inside_functions=False) >= {"timm", "torch", "numpy", "PIL"}
    assert not undeclared(imported(inside_functions=False), required)
    assert not undeclared(imported(inside_functions=True), required | optional)


def test_import_loads_no_library_that_timm_does_without() -> None:
    program = """
import sys, timm
before = set(sys.modules)
import timm_vix
new = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = ("torch._dynamo", "torch._inductor", "torch.onnx", "torch.export", "torch.utils.flop_counter",
         *(f"timm_vix.{part}" for part in ("data", "train", "planning", "benchmark", "measure", "cli")))
print(sorted(new - set(sys.stdlib_module_names) - {"timm_vix", "einops"}))
print([name for name in heavy if name in sys.modules and name not in before])
"""
    assert run(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}){program}", cwd=ROOT) == "[]\n[]\n"


# The parameters by which README and documentation call a function; more may follow them, with defaults.
FUNCTIONS = {
    "convert": "model mixer layers",
    "revert": "model",
    "freeze_except": "model part",
    "replace_norms": "model images schedule",
    "fold_norms": "model last",
    "save_delta": "model path",
    "load_delta": "model path",
    "load_plan": "path model",
    "finetune": "",
    "transfer": "",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_promised_function_is_there(name: str) -> None:
    assert name in timm_vix.__all__
    function = getattr(timm_vix, name)
    assert function.__doc__
    parameters = inspect.signature(function).parameters
    names = FUNCTIONS[name].replace("*", "").split()
    assert list(parameters)[: len(names)] == names
    further = [p for given, p in parameters.items() if given not in names]
    if names:
        assert all(p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in further)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_function"):
        timm_vix.no_such_function  # noqa: B018


def test_all_is_what_a_star_import_gives() -> None:
    names: dict = {}
    exec("from timm_vix import *", names)
    assert set(timm_vix.__all__) <= names.keys()


def test_no_registered_name_is_lost() -> None:
    assert sorted(NAMES.split()) == sorted(REGISTERED)

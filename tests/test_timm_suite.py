"""timm's own model tests, passed by our names: all that ``vit_tiny_patch16_224`` passes, or timm's PiT by a PiN.

timm's wheel has no tests, so its source package is downloaded once into pytest's cache. ``timm_suite_plugin`` puts our
names in and says which tests are left out and why.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
from conftest import REGISTERED, is_narrow, since

import timm_vix

# modules of models that stand in for another one than the plain ViT: one of timm that has stages and a fixed grid
HOSTS = {
    "convix": "convit_tiny",
    "pin": "pit_ti_224",
    "cvt": "pit_ti_224",
    "levin": "levit_128s",
    "fnet2d": "pit_ti_224",
}
# of each architecture and stem, of mixers with and without a grid, features, rotary positions, and attention at all;
# those of one host in one process
A_FEW = [
    ["vix_nystrom_cifar"],
    pytest.param(["ccn_cifar"], marks=pytest.mark.slow),
    pytest.param(["levip_cifar"], marks=pytest.mark.slow),
    pytest.param(["hybrid_vil_cifar_rope"], marks=pytest.mark.slow),
    pytest.param(["fnet2d_cifar", "cvn_cifar", "hybrid_pin_cifar"], marks=pytest.mark.slow),
]
# tests that every host runs, whatever timm adds
OF_EVERY_HOST = {
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs_non_std",
    "test_model_forward_intermediates",
    "test_model_forward_fx",
    "test_model_forward_torchscript",
}
pytestmark = since("2.9", "traces not even timm's own attention, which reads a flag while it is traced")


@pytest.fixture(scope="module")
def timm_tests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """timm's ``tests/test_models.py`` of the installed version."""
    folder = tmp_path_factory.mktemp("timm_source")  # of this worker alone
    top = f"timm-{timm.__version__}"
    archive = request.config.cache.mkdir("timm_source") / f"{top}.tar.gz"
    if not archive.exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "timm", "--dest", str(folder)]
        done = subprocess.run([*pip, f"timm=={timm.__version__}"], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            pytest.skip(f"timm's source package can't be downloaded (offline?): {reason}")
        shutil.copy(folder / archive.name, partial := archive.with_name(f"{os.getpid()}.partial"))
        os.replace(partial, archive)  # two workers may come here at once
    # only the tests: with timm itself beside them, that copy would be tested and not the installed one
    with tarfile.open(archive) as source:
        wanted = (f"{top}/tests/", f"{top}/pyproject.toml", f"{top}/PKG-INFO")
        source.extractall(folder, [m for m in source.getmembers() if m.name.startswith(wanted)], filter="data")
    assert f"\nVersion: {timm.__version__}\n" in (folder / top / "PKG-INFO").read_text(encoding="utf-8")
    return folder / top / "tests" / "test_models.py"


def all_names() -> list[str]:
    """Every registered name but the widths that differ from tiny in nothing else, and the one that wraps a host."""
    return [name for name in REGISTERED if is_narrow(name) and name != "vix_from_timm"]


def run_suites(test_models: Path, names: list[str], folder: Path, workers: int = 0) -> None:
    """Run timm's tests on ``names`` in the place of their hosts; ``workers`` 0: one test after the other."""
    groups = defaultdict(list)
    for name in names:
        module = timm.model_entrypoint(name).__module__.rpartition(".")[2]
        groups[HOSTS.get(module, "vit_tiny_patch16_224")].append(name)
    for host, group in groups.items():
        run_suite(test_models, host, group, folder / f"{host}.xml", workers)


def run_suite(test_models: Path, host: str, names: list[str], report: Path, workers: int) -> None:
    """Run timm's tests on ``names`` in a process of its own and fail with a line for each test that didn't pass."""
    paths = [Path(__file__).parent, Path(timm_vix.__file__).parents[1], os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    # timm leaves tests out on GitHub's machines for the sake of its large models
    environment.pop("GITHUB_ACTIONS", None)
    environment.pop("PYTEST_ADDOPTS", None)
    options = ["-n", str(workers), "-p", "timm_suite_plugin", "-p", "no:cacheprovider"]
    options += ["--host", host, "--models", ",".join(names)]
    command = [sys.executable, "-m", "pytest", *options, f"--junit-xml={report}", str(test_models)]
    done = subprocess.run(
        command, cwd=test_models.parents[1], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1) and report.exists(), f"timm's tests didn't run:\n{done.stdout}\n{done.stderr}"

    tests_of = defaultdict(set)
    failed = []
    for case in ElementTree.parse(report).iter("testcase"):
        test, _, values = case.get("name").partition("[")
        for name in set(re.split(r"[].-]", values)) & set(names):
            tests_of[name].add(test)
        # a skipped test is one that the plain ViT passes
        for outcome in case:
            if outcome.tag in ("failure", "error", "skipped"):
                message = (outcome.get("message") or "").strip().partition("\n")[0]
                failed.append(f"{case.get('name')} {outcome.tag}: {message}")
    assert not failed, f"{len(failed)} of timm's tests don't pass:\n" + "\n".join(failed) + f"\n\n{done.stdout}"
    assert tests_of.keys() == set(names), f"no test ran for {sorted(set(names) - tests_of.keys())}"
    assert all(tests == tests_of[names[0]] for tests in tests_of.values()), "names ran different tests"
    assert tests_of[names[0]] >= OF_EVERY_HOST


@pytest.mark.parametrize("names", A_FEW, ids=" ".join)
def test_timm_suite_on_a_few_names(names: list[str], timm_tests: Path, tmp_path: Path) -> None:
    run_suites(timm_tests, names, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(8 * 3600)
def test_timm_suite_on_all_names(timm_tests: Path, tmp_path: Path) -> None:
    run_suites(timm_tests, all_names(), tmp_path, workers=2)

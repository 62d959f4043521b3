"""The wheel: what is in it, and that it installs and runs."""

from __future__ import annotations

import os
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from processes import run_process

pytestmark = pytest.mark.slow

MODULES = {"explore_logits.py", "compute_lengths.py", "extract_logits.py"}


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Return the folder of the wheel: $DIST, or built here (needs a package registry)."""
    if "DIST" in os.environ:
        return ROOT / os.environ["DIST"]
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder)
    return folder


def run(*command: object, cwd: Path = ROOT) -> str:
    done = run_process(command, cwd=cwd, timeout_s=600)
    assert done.code == 0, done.stderr
    return done.stdout.strip()


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def test_the_wheel_holds_the_three_scripts_and_its_metadata_only(dist):
    with zipfile.ZipFile(only(dist, "*.whl")) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert {name for name in names if ".dist-info/" not in name} == MODULES
    assert "License-Expression: MIT" in metadata


def test_the_wheel_runs_in_a_clean_environment(dist, tmp_path):
    # The dependencies are those of this environment, by a path file: torch is not installed twice.
    venv.create(tmp_path / "env", with_pip=False)
    site = only(tmp_path / "env", "lib/python*/site-packages")
    python = tmp_path / "env" / "bin" / "python"
    options = ("--python", python, "install", "-q", "--no-deps", "--no-index")
    run(sys.executable, "-m", "pip", *options, only(dist, "*.whl"))
    assert {path.name for path in site.glob("*.py")} == MODULES
    (site / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    for name in ("compute-lengths", "extract-logits", "explore-logits"):
        said = run(tmp_path / "env" / "bin" / name, "--help", cwd=tmp_path)
        assert said.startswith("usage: ")
        assert "--split" in said
    where = "import extract_logits; print(extract_logits.__file__)"
    assert Path(run(python, "-c", where, cwd=tmp_path)).parent == site

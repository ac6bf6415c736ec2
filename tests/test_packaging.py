from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

# Where each import package lives in the tree (pyproject.toml, tool.setuptools.package-dir).
ROOTS = {"edgeclip": "edgeclip", "export": "edgeclip/export", "calibration": "edgeclip/calibration"}


def _tracked(repo: Path, folder: str) -> set[str]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", folder],
        cwd=repo, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {name for name in listing.stdout.split("\0") if name and (repo / name).is_file()}


@pytest.fixture(scope="module")
def wheel_names(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    # Build from a copy: setuptools leaves build/ and *.egg-info beside the sources.
    for folder in (*ROOTS, "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        for name in _tracked(repo, folder):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((repo / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = out.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
@pytest.mark.skipif(
    not (Path(__file__).parents[1] / ".git").exists(), reason="the tree is compared with git's list"
)
def test_the_wheel_holds_every_file_of_the_packages(repo: Path, wheel_names: set[str]) -> None:
    expected = set()
    for folder, package in ROOTS.items():
        for name in _tracked(repo, folder):
            expected.add(package + name[len(folder) :])
    packaged = {name for name in wheel_names if ".dist-info/" not in name}
    assert expected - packaged == set(), (
        "in the tree, not in the wheel: list the subpackage in pyproject.toml"
    )
    assert packaged - expected == set(), "in the wheel, not in the tree"


@pytest.mark.slow
def test_the_wheel_carries_its_licences(wheel_names: set[str]) -> None:
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in wheel_names if ".dist-info/" in name}


def test_the_links_for_type_checkers_lead_to_the_sources(repo: Path) -> None:
    for name in ("export", "calibration"):
        assert (repo / "typings" / "edgeclip" / name).resolve() == (repo / name).resolve()
    assert not (repo / "typings" / "edgeclip" / "__init__.py").exists()

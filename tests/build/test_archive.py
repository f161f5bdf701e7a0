"""native/package.py: an archive out of a build folder, also of one that pip made and whose ninja is gone."""

import importlib.util
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "native" / "package.py"
PROJECT = """
cmake_minimum_required(VERSION 3.21)
project(few LANGUAGES NONE)
option(SFI_PORTABLE "" OFF)
file(WRITE "${CMAKE_BINARY_DIR}/sfi.pc" "Version: 1.2.3")
add_custom_target(sfi-embed-tree COMMAND "${CMAKE_COMMAND}" -E copy sfi.pc embed/lib/pkgconfig/sfi.pc)
"""


@pytest.fixture
def package():
    spec = importlib.util.spec_from_file_location("package", PACKAGE)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def wheels_build(tmp_path):
    """The folder in which pip built a wheel."""
    ninja = shutil.which("ninja")
    if not ninja or not shutil.which("cmake"):
        pytest.skip("cmake or ninja is missing")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "CMakeLists.txt").write_text(PROJECT)
    pips = Path(shutil.copy(ninja, tmp_path / "pips-ninja"))
    subprocess.run(["cmake", "-S", tmp_path / "source", "-B", tmp_path / "build", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={pips}", "-DSFI_PORTABLE=ON"],
                   check=True, capture_output=True)
    pips.unlink()
    return tmp_path / "build"


def test_a_wheels_folder_is_packed_with_a_ninja_that_is_there(package, wheels_build, tmp_path):
    archive = package.package(wheels_build, True, tmp_path / "dist")
    assert archive.name.startswith("sfi-1.2.3-linux-")
    assert tarfile.open(archive).getnames() == [archive.name.removesuffix(".tar.gz") + "/lib/pkgconfig/sfi.pc"]


def test_no_ninja_at_all_is_a_sentence(package, wheels_build, tmp_path, monkeypatch):
    monkeypatch.setattr(package.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="pips-ninja, which is gone, and there is no ninja: pip install ninja"):
        package.package(wheels_build, True, tmp_path)

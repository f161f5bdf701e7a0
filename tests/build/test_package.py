"""The package as it is installed: one native library in the process, the one this build made, with all of sfi.h."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sfi_local._sfi", reason="the native library is not built")

from sfi_local import _build_info, _sfi  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(_sfi.__file__).parent
LIB = PACKAGE / "lib"
HEADERS = [ROOT / "native" / "include" / name for name in ("sfi.h", "sfi-research.h")]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")


def load(path: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def header_text() -> str:
    return "".join(header.read_text(encoding="utf-8") for header in HEADERS)


def declared_functions() -> set[str]:
    """The names behind SFI_API in the headers, found without build_ffi.py."""
    text = re.sub(r"/\*.*?\*/", "", header_text(), flags=re.DOTALL)
    return set(re.findall(r"^SFI_API\b[^;(]*?(\w+)\s*\(", text, flags=re.MULTILINE))


# ---- one library ---------------------------------------------------------------------------------------------------

IMPORT_BOTH = """
import os
os.environ["LLAMA_CPP_LIB_PATH"] = {lib!r}
{imports}
import llama_cpp
from sfi_local import _sfi
import ctypes
here = int(_sfi.ffi.cast("uintptr_t", _sfi.lib.sfi_source_id()))  # a string constant inside the library
source_id = llama_cpp.llama_cpp._lib.sfi_source_id
source_id.restype = ctypes.c_void_p
print("same constant:", here == source_id())
for line in open("/proc/self/maps"):
    if "llama" in line or "ggml" in line:
        print("mapped:", line.split(maxsplit=5)[-1].strip())
"""


def decoys(directory: Path) -> Path:
    """Libraries with the names of llama.cpp's, loadable but not llama.cpp."""
    directory.mkdir()
    for name in ("libllama.so", "libllama.so.0", "libggml.so", "libggml-base.so", "libggml-cpu.so"):
        shutil.copy(_sfi.__file__, directory / name)
    return directory


@linux
@pytest.mark.parametrize("imports", ["import llama_cpp", "from sfi_local import _sfi"])
def test_both_bindings_share_one_library(tmp_path, imports):
    """Whichever is imported first, and with other libraries of those names on LD_LIBRARY_PATH."""
    other = decoys(tmp_path / "other")
    env = os.environ | {"LD_LIBRARY_PATH": str(other), "PYTHONPATH": str(PACKAGE.parent)}
    script = IMPORT_BOTH.format(lib=str(LIB), imports=imports)
    out = subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, text=True, capture_output=True, check=True)
    mapped = {line.removeprefix("mapped: ") for line in out.stdout.splitlines() if line.startswith("mapped: ")}
    real = {os.path.realpath(path) for path in mapped}
    assert "same constant: True" in out.stdout
    assert not any(path.startswith(str(other)) for path in mapped)
    for name in ("libsfi-llama.so", "libsfi-ggml.so", "libsfi-ggml-base.so"):
        assert [path for path in real if path.endswith(f"/{name}")] == [os.path.realpath(LIB / name)]


@linux
def test_nobody_else_finds_our_libraries_by_name():
    """A library answers to its SONAME: ours is called sfi-, or has none."""
    readelf = shutil.which("readelf") or pytest.skip("no readelf")
    for path in LIB.glob("*.so"):
        dynamic = subprocess.run([readelf, "-d", path], text=True, capture_output=True, check=True).stdout
        soname = re.findall(r"SONAME\).*\[(.*)\]", dynamic)
        assert all(name.startswith("libsfi-") for name in soname)
        assert re.findall(r"R(?:UN)?PATH\).*\[(.*)\]", dynamic) == ["$ORIGIN"]


def test_libraries_are_plain_files():
    """Wheels cannot carry links, so the names must not need any."""
    names = [path for path in LIB.iterdir() if not path.name.startswith(("test-", "sfi-example"))]
    assert names and not any(path.is_symlink() for path in names)


# ---- this build ----------------------------------------------------------------------------------------------------


def test_library_and_package_are_one_build():
    assert _sfi.ffi.string(_sfi.lib.sfi_source_id()).decode() == _build_info.source_id


def test_build_info_names_the_pin():
    patchset = load(ROOT / "patches" / "patchset.py", "patchset")
    pin = patchset.read_pin()
    assert _build_info.source_id.startswith(pin["llama_commit"] + "+")
    assert _build_info.upstream == f"{pin['package']} {pin['version']}"
    assert isinstance(_build_info.portable, bool)


def test_pin_is_the_dependency():
    """One version, in patches/upstream and in pyproject.toml."""
    patchset = load(ROOT / "patches" / "patchset.py", "patchset")
    pin = patchset.read_pin()
    assert f'"{pin["package"]}=={pin["version"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@linux
def test_this_machine_has_the_flags_of_its_build():
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    assert set(_build_info.cpu_flags) <= set(flags[1].split())
    assert _build_info.portable == (not _build_info.cpu_flags)


# ---- the cffi module is sfi.h ----------------------------------------------------------------------------------------


def test_every_function_of_the_header_is_bound():
    functions = declared_functions()
    assert len(functions) > 15
    assert functions <= set(dir(_sfi.lib))


def test_cdef_declares_what_the_header_declares():
    build_ffi = load(ROOT / "native" / "ffi" / "build_ffi.py", "build_ffi")
    cdef = build_ffi.whole(HEADERS)
    assert declared_functions() <= set(re.findall(r"\b(sfi_\w+)\s*\(", cdef))
    assert "#" not in cdef and "SFI_API" not in cdef


def test_enum_values_are_those_of_the_header():
    for name, value in re.findall(r"\b(SFI_\w+)\s*=\s*(-?\d+)", header_text()):
        assert getattr(_sfi.lib, name) == int(value)


def test_progress_can_be_a_python_function():
    seen = []

    @_sfi.ffi.callback("sfi_progress_fn")
    def progress(user, phase, done, total):
        seen.append((done, total))
        return True

    assert progress(_sfi.ffi.NULL, 0, 3, 7) and seen == [(3, 7)]


# ---- the headers are plain C, and a lesson -------------------------------------------------------------------------------


def example_of(header: Path) -> str:
    """The program in the comment at the top of a header, from its first #include to the end of its function."""
    lines = [line.removeprefix(" *     ") if line.startswith(" *     ") else line.removeprefix(" *")
             for line in header.read_text(encoding="utf-8").splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("#include"))
    return "\n".join(lines[first:lines.index("}", first) + 1])


def test_the_example_of_the_header_is_the_one_that_is_compiled():
    program = (ROOT / "native" / "examples" / "header.c").read_text(encoding="utf-8")
    assert example_of(HEADERS[0]) in program


@pytest.mark.parametrize("name", ["header.c", "generate.c", "research"])
def test_the_headers_are_plain_c(tmp_path, name):
    gcc = shutil.which("cc") or pytest.skip("no C compiler")
    trees = [*ROOT.glob("build/*/llama.cpp"), PACKAGE / "include"]
    llama = next((tree for tree in trees if (tree / "include" / "llama.h").exists() or (tree / "llama.h").exists()), None)
    if llama is None:
        pytest.skip("no headers of llama.cpp are here")
    source = ROOT / "native" / "examples" / name
    if name == "research":
        source = tmp_path / "research.c"
        source.write_text('#include "sfi-research.h"\nint main(void) { return sfi_version() != SFI_VERSION; }\n')
    system = [f"-isystem{llama / part}" for part in ("", "include", "ggml/include")]
    done = subprocess.run([gcc, "-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only", f"-I{HEADERS[0].parent}", *system, source],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_versions_of_header_and_library_agree():
    parts = re.findall(r"#define SFI_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header_text())
    major, minor, patch = map(int, parts)
    assert _sfi.lib.sfi_version() == major * 10000 + minor * 100 + patch
    assert f'version = "{major}.{minor}.{patch}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")

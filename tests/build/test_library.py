"""Which library may be loaded: ours, of this build, on a CPU that can run it; all else is refused with the remedy."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from support.command_line import cli_env

from sfi_local.binding import library
from sfi_local.errors import STATUS_ERRORS, LibraryError, SfiError, exit_code, from_status

INFO = SimpleNamespace(cpu_flags=(), source_id="x+y", upstream="llama-cpp-python 0.3.36", portable=False)


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env=cli_env(), capture_output=True, text=True)


def test_a_cpu_that_lacks_a_feature_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(library, "cpu_flags", lambda: {"avx2"})
    with pytest.raises(LibraryError, match="avx512f, amx_int8.*SFI_PORTABLE"):
        library._check_cpu(SimpleNamespace(cpu_flags=("avx2", "avx512f", "amx_int8")))


def test_a_system_that_does_not_list_its_features_is_trusted(monkeypatch):
    monkeypatch.setattr(library, "cpu_flags", lambda: None)
    library._check_cpu(SimpleNamespace(cpu_flags=("avx512f",)))


@pytest.mark.parametrize("package", ["llama-cpp-python 9.9.9", "no-such-package-anywhere 1.0"])
def test_another_llama_cpp_python_is_refused(package):
    with pytest.raises(LibraryError, match="pip install"):
        library._check_llama_cpp_version(package)


def test_a_library_of_another_build_is_refused(native):
    with pytest.raises(LibraryError, match="built from .* this package from x\\+y"):
        library._import_sfi(INFO)


def test_llama_cpp_on_another_library_is_refused(native):
    code = ("import sys, types; m = types.ModuleType('llama_cpp.llama_cpp'); m._base_path = '/elsewhere'\n"
            "sys.modules['llama_cpp.llama_cpp'] = m\nimport sfi_local\nsfi_local.SlowFastLlama")
    done = python(code)
    assert "runs on the library in /elsewhere: import sfi_local" in done.stderr


def test_llama_cpp_imported_after_us_runs_on_our_library(native):
    code = ("import os; from sfi_local import SlowFastLlama; import llama_cpp.llama_cpp as l\n"
            "from sfi_local.binding.library import LIB_DIR, open_library\nopen_library()\n"
            "assert str(l._base_path) == str(LIB_DIR) and 'LLAMA_CPP_LIB_PATH' not in os.environ")
    done = python(code)
    assert done.returncode == 0, done.stderr


LAZY = """
import sys
from sfi_local.binding.library import log, open_library
native = open_library()
assert native.llama_cpp.llama_max_devices() > 0 and not {"numpy", "jinja2", "llama_cpp.llama"} & set(sys.modules)
import llama_cpp
from llama_cpp import Llama
assert Llama is sys.modules["llama_cpp.llama"].Llama and llama_cpp.__version__
with log.collected() as lines:
    llama_cpp.llama_model_load_from_file(b"/none", llama_cpp.llama_model_default_params())
assert any("/none" in line for line in lines)
assert not hasattr(llama_cpp, "nothing")
"""


def test_of_llama_cpp_the_functions_come_first_and_the_rest_when_it_is_asked_for(native):
    """... and its logger, which comes with the rest, does not take llama.cpp's log from ours."""
    done = python(LAZY)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("given, expected", [({}, {"GOMP_SPINCOUNT": "3000"}), ({"OMP_WAIT_POLICY": "active"}, {}),
                                             ({"GOMP_SPINCOUNT": "7"}, {})])
def test_threads_sleep_soon_unless_the_user_says_otherwise(monkeypatch, given, expected):
    for name in library.SPIN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert library._spin_settings() == expected


def test_the_environment_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", "/mine")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    with library._environment({"LLAMA_CPP_LIB_PATH": "/ours", "GOMP_SPINCOUNT": "1"}):
        assert library.os.environ["LLAMA_CPP_LIB_PATH"] == "/ours"
    assert library.os.environ["LLAMA_CPP_LIB_PATH"] == "/mine" and "GOMP_SPINCOUNT" not in library.os.environ


def test_importing_the_package_loads_nothing():
    done = python("import sys, sfi_local; assert not {'llama_cpp', 'cffi', 'numpy', 'click'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there(native):
    import sfi_local

    assert all(getattr(sfi_local, name) for name in sfi_local.__all__ if name != "__version__")
    with pytest.raises(AttributeError):
        getattr(sfi_local, "nothing")  # noqa: B009


def test_every_status_has_its_exception(native):
    names = {native.ffi.string(native.lib.sfi_status_name(-n)).decode() for n in range(1, 20)} - {"unknown status"}
    assert names == set(STATUS_ERRORS)
    error = from_status("SFI_ERR_FULL", "No room.")
    assert type(error) is STATUS_ERRORS["SFI_ERR_FULL"] and str(error) == "No room." and exit_code(error) == 1
    assert isinstance(from_status("SFI_ERR_NEW", ""), SfiError)


def test_names_of_kinds_and_reasons_are_those_of_the_library(native):
    from sfi_local.binding.engine import KINDS

    assert KINDS == {native.ffi.string(native.lib.sfi_kind_name(n)).decode(): n for n in range(4)}


def test_doctor_reports_whatever_is_broken(monkeypatch):
    from sfi_local.cli import doctor

    def broken():
        raise LibraryError("nothing there.")

    monkeypatch.setattr(library, "build_info", broken)
    monkeypatch.setattr(library, "open_library", broken)
    monkeypatch.setattr(doctor.machine, "cpu_name", lambda: 1 / 0)
    facts = doctor.collect()
    assert facts["library"] == {"path": str(library.LIB_DIR), "usable": False, "why": "nothing there."}
    assert "ZeroDivisionError" in facts["machine"]["error"] and facts["versions"]["python"]
    assert "nothing there" in doctor.as_text(facts)

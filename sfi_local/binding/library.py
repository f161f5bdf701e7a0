"""Load the native library once: ours, whole, of this build, able to run on this CPU, and the one llama_cpp uses."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import threading
from collections import deque
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import sfi_local
from sfi_local.cgroup import read
from sfi_local.errors import LibraryError
from sfi_local.machine import cpu_flags, cpu_name

LIB_DIR = next((Path(folder).resolve() / "lib" for folder in sfi_local.__path__ if (Path(folder) / "lib").is_dir()),
               Path(__file__).resolve().parents[1] / "lib")
REBUILD = "install sfi-local again (`CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install .` in its source)"

# How often a thread of libgomp looks for work before it sleeps. By default it looks for milliseconds, which on a machine that
# has something else to do costs most of the speed; but waking a thread of a virtual machine can cost as much as the work of
# a layer. Measured with SmolLM2-135M, stock steps per second with 300, 3000 and the default of 300000: two cores of an EPYC
# 192, -, 194 idle and 67, -, 7 beside a busy process; two of a Xeon 44, 260, 256 idle and 83, 53, 63 beside one.
SPIN_COUNT = "3000"
SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # where the user set one of them, it stays

_LEVEL_ERROR, _LEVEL_CONT = 4, 5  # enum ggml_log_level
_lock = threading.Lock()


@lru_cache
def open_library() -> Any:
    """Load everything; returns a namespace of ``ffi`` and ``lib`` (sfi.h) and ``llama_cpp`` (the Python package).

    Raises LibraryError with the remedy. The environment is left as it was.
    """
    with _lock:
        info = build_info()
        _check_cpu(info)
        _check_llama_cpp_version(info.upstream)
        _check_not_foreign()
        with _environment(_spin_settings()):
            sfi = _import_sfi(info)
        with _environment({"LLAMA_CPP_LIB_PATH": str(LIB_DIR)}):
            llama_cpp = _import_llama_cpp()
        log.install(llama_cpp)
        if info.portable:  # now that the log is ours: each that is opened says so
            with _environment(_spin_settings()):
                sfi.lib.ggml_backend_load_all_from_path(str(LIB_DIR).encode())
        return SimpleNamespace(ffi=sfi.ffi, lib=sfi.lib, llama_cpp=llama_cpp, info=info)


def build_info() -> ModuleType:
    """sfi_local._build_info, written by the build: source_id, upstream, cpu_flags, portable, compiler ..."""
    try:
        from sfi_local import _build_info
    except ImportError:
        raise LibraryError(f"sfi-local has no native library here ({LIB_DIR.parent}): {REBUILD}.") from None
    return _build_info


def cpu_library() -> str:
    """The file of the CPU's operations, which in a portable build is one of several; "" where the system does not tell.

    Others may be in memory too: all are opened and asked how well they suit the CPU, and not every one can be unloaded again.
    """
    by_name = open_library().llama_cpp.llama_cpp._lib.ggml_backend_reg_by_name
    by_name.restype, by_name.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    registered = by_name(b"CPU")  # struct ggml_backend_reg: int api_version; then pointers to its functions
    function = ctypes.c_void_p.from_address(registered + 8).value if registered else 0
    for line in read("/proc/self/maps").splitlines():
        first, last = (int(n, 16) for n in line.split()[0].split("-"))
        if first <= (function or 0) < last:
            return Path(line.split(maxsplit=5)[-1]).name
    return ""


def source_id() -> str:
    """What the library was built from: llama.cpp commit + hash of our patches and native code."""
    return build_info().source_id


_process: int | None = None  # that made the first context


def claim_process() -> None:
    """A context is made: from now on forks of this process are refused."""
    global _process
    check_process()
    _process = os.getpid()


def check_process(quiet: bool = False) -> bool:
    """Whether this is the process whose contexts there are; raises LibraryError if not, unless quiet.

    A fork has their memory but not their threads, and would wait for those for ever.
    """
    if _process in (None, os.getpid()):
        return True
    if quiet:
        return False
    raise LibraryError("This process is a fork of one that has used a model, whose threads it lacks: load models after the fork, "
                       "or start processes with multiprocessing's method \"spawn\".")


def last_log_lines() -> str:
    """The last errors that llama.cpp logged, on one line; "" if there were none."""
    return "; ".join(log.errors)


def _check_cpu(info: ModuleType) -> None:
    """Before anything is loaded: an illegal instruction could not be reported."""
    have = cpu_flags()
    missing = [] if have is None else [flag for flag in info.cpu_flags if flag not in have]
    if missing:
        raise LibraryError(
            f"sfi-local was built for a CPU with {', '.join(missing)}, which this one ({cpu_name()}) lacks: {REBUILD} "
            f"on this machine, or build it with -DSFI_PORTABLE=ON for any CPU.")


def _check_llama_cpp_version(upstream: str) -> None:
    """llama-cpp-python's ctypes structs must match the library: exactly the pinned release will do."""
    package, _, wanted = upstream.partition(" ")
    if _installed_beside_llama_cpp(package, wanted):
        return
    found = _version_of(package)
    if found.partition("+")[0] != wanted:
        raise LibraryError(f"sfi-local needs {package} {wanted} and found {found}: run `CMAKE_ARGS=-DLLAMA_BUILD=OFF "
                           f"pip install {package}=={wanted}`.")


def _installed_beside_llama_cpp(package: str, version: str) -> bool:
    """Whether pip's record of this very version lies beside the module that will be imported: seen sooner than importlib.metadata is there."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.origin:
        return False
    return (Path(spec.origin).parents[1] / f"{package.replace('-', '_')}-{version}.dist-info" / "METADATA").is_file()


def _version_of(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _check_not_foreign() -> None:
    """llama_cpp loads its library when it is imported; too late to change that."""
    module = sys.modules.get("llama_cpp.llama_cpp")
    where = getattr(module, "_base_path", None)
    if module is not None and not (where and Path(where).resolve() == LIB_DIR.resolve()):
        raise LibraryError(f"llama_cpp was imported before sfi_local and runs on the library in {where}: import "
                           f"sfi_local (or SlowFastLlama from it) first in your program.")


def _import_sfi(info: ModuleType) -> ModuleType:
    if sys.platform == "win32":
        os.add_dll_directory(str(LIB_DIR))
    try:
        from sfi_local import _sfi
    except ImportError as error:
        raise LibraryError(f"The native library of sfi-local cannot be loaded ({error}): {REBUILD}.") from None
    loaded = _sfi.ffi.string(_sfi.lib.sfi_source_id()).decode()
    if loaded != info.source_id:
        raise LibraryError(f"The library that was loaded was built from {loaded}, this package from {info.source_id}: "
                           f"{REBUILD}, and keep other copies out of LD_LIBRARY_PATH.")
    return _sfi


def _import_llama_cpp() -> ModuleType:
    """Import llama-cpp-python on our library, its functions alone at first; it reads the path from the environment, once."""
    try:
        package = _package()
        for name in ("llama_cpp", "_utils", "_logger"):  # the last takes llama.cpp's log, and we after it
            importlib.import_module(f"llama_cpp.{name}")
    except (ImportError, OSError, RuntimeError) as error:
        raise LibraryError(f"llama-cpp-python cannot be loaded on the library in {LIB_DIR} ({error}): "
                           f"{REBUILD}.") from None
    for name in ("_utils", "_internals", "llama"):  # those that are imported later take it from the first
        if module := sys.modules.get(f"llama_cpp.{name}"):
            # it would point stdout and stderr of the whole process elsewhere, for all threads, and fails where there are none; that
            # llama.cpp is quiet is the work of our log
            module.suppress_stdout_stderr = lambda disable=True: nullcontext()  # type: ignore[attr-defined]
    package.llama_backend_init()
    return package


def _package() -> ModuleType:
    """The package llama_cpp, which imports all of itself when something else than a function of llama.cpp is asked of it."""
    if "llama_cpp" in sys.modules:
        return sys.modules["llama_cpp"]
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None:
        raise ImportError("there is no module llama_cpp")
    package = importlib.util.module_from_spec(spec)
    package.__class__ = _LazyPackage
    sys.modules["llama_cpp"] = package
    return package


class _LazyPackage(ModuleType):
    """numpy, Jinja, a cache on disks and more are most of a start's imports, and decoding needs none of them."""

    _importing = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        functions = self.__dict__.get("llama_cpp")  # set by the import of that module
        if functions is not None and hasattr(functions, name):
            return getattr(functions, name)
        with self._importing:
            if self.__class__ is _LazyPackage and not self.__dict__.get("_begun"):
                self.__dict__["_begun"] = True
                try:
                    self.__spec__.loader.exec_module(self)  # type: ignore[union-attr]
                    self.__class__ = ModuleType  # type: ignore[assignment]
                finally:
                    del self.__dict__["_begun"]
            if name in self.__dict__:
                return self.__dict__[name]
        raise AttributeError(f"module 'llama_cpp' has no attribute {name!r}")


def _spin_settings() -> dict[str, str]:
    """What libgomp reads from the environment when it is loaded, unless the user has set it."""
    return {} if any(name in os.environ for name in SPIN_VARIABLES) else {"GOMP_SPINCOUNT": SPIN_COUNT}


@contextmanager
def _environment(values: dict[str, str]):
    """Set variables for a moment; child processes are not to inherit them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class _Log:
    """llama.cpp's log: shown on stderr if ``verbose``; its last errors are kept for our own messages."""

    def __init__(self):
        self.verbose = False
        self.errors: deque[str] = deque(maxlen=3)
        self._level = 0
        self._callback = None
        self._collected: list[str] | None = None

    def install(self, llama_cpp: ModuleType) -> None:
        self._callback = llama_cpp.llama_log_callback(self._on_line)  # kept alive: the library calls it
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _on_line(self, level: int, text: bytes, user: Any) -> None:
        self._level = self._level if level == _LEVEL_CONT else level
        line = text.decode("utf-8", errors="replace")
        if self._collected is not None:
            self._collected.append(line)
            return
        if self._level == _LEVEL_ERROR and line.strip(". \n"):
            self.errors.append(line.strip())
        if self.verbose and sys.stderr:
            sys.stderr.write(line)

    @contextmanager
    def collected(self):
        """The lines of what is done inside ``with``, which are shown and kept nowhere else."""
        self._collected = []
        try:
            yield self._collected
        finally:
            self._collected = None


log = _Log()

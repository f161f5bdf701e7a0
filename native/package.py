"""Pack libsfi for those who write C and C++: dist/sfi-VERSION-linux-x86_64-cpu.tar.gz, out of a build folder.

usage: package.py [BUILD] [--portable] [--out DIR]

BUILD       a folder that CMake has configured; by default build/package, which is made if it is not there
--portable  build for any CPU of this architecture, not for this machine (build/package-portable)
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", nargs="?", type=Path, help="a folder that CMake has configured")
    parser.add_argument("--portable", action="store_true", help="build for any CPU of this architecture")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the archive goes (dist)")
    args = parser.parse_args()
    build = args.build or ROOT / "build" / ("package-portable" if args.portable else "package")
    try:
        print(package(build, args.portable, args.out))
    except (subprocess.CalledProcessError, OSError, ValueError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")


def package(build: Path, portable: bool, out: Path) -> Path:
    """Build what is not built, and pack it; returns the archive."""
    if not (build / "CMakeCache.txt").exists():
        configure(build, portable)
    elif portable and cached(build, "SFI_PORTABLE") != "ON":
        raise ValueError(f"{build} is configured for one machine: leave it out, or configure it with -DSFI_PORTABLE=ON.")
    elif not Path(cached(build, "CMAKE_MAKE_PROGRAM")).exists():
        give_ninja(build)
    subprocess.run(["cmake", "--build", str(build), "--parallel", "2", "--target", "sfi-embed-tree"], check=True, stdout=sys.stderr)
    return pack(build / "embed", out, platform_of(build))


def configure(build: Path, portable: bool) -> None:
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    subprocess.run(["cmake", "-S", str(ROOT / "native"), "-B", str(build), *generator, f"-DPython_EXECUTABLE={sys.executable}",
                    "-DSFI_PYTHON=OFF", f"-DSFI_PORTABLE={'ON' if portable else 'OFF'}"], check=True, stdout=sys.stderr)


def give_ninja(build: Path) -> None:
    """To a folder in which pip built a wheel: its CMake and its Ninja were of an environment that is gone."""
    ninja = shutil.which("ninja")
    if not ninja:
        raise ValueError(f"{build} was built by {cached(build, 'CMAKE_MAKE_PROGRAM')}, which is gone, and there is no ninja: pip install ninja.")
    subprocess.run(["cmake", "-S", cached(build, "CMAKE_HOME_DIRECTORY"), "-B", str(build), f"-DCMAKE_MAKE_PROGRAM={ninja}"], check=True, stdout=sys.stderr)


def cached(build: Path, name: str) -> str:
    """A variable of a build folder; "" if it has none."""
    found = re.search(rf"^{name}:\w+=(.*)$", (build / "CMakeCache.txt").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else ""


def platform_of(build: Path) -> str:
    """linux-x86_64-cpu: the system that a build is for, not that on which it is made."""
    facts = next(build.glob("CMakeFiles/*/CMakeSystem.cmake")).read_text(encoding="utf-8")
    system, processor = (re.search(rf'set\({name} "(.+)"\)', facts)[1] for name in ("CMAKE_SYSTEM_NAME", "CMAKE_SYSTEM_PROCESSOR"))
    return f"{system.lower()}-{processor}-cpu"


def pack(tree: Path, out: Path, platform: str) -> Path:
    version = re.search(r"^Version: (.+)$", (tree / "lib" / "pkgconfig" / "sfi.pc").read_text(encoding="utf-8"), re.MULTILINE)[1]
    name = f"sfi-{version}-{platform}"
    out.mkdir(parents=True, exist_ok=True)
    archive = out / f"{name}.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=9) as tar:
        for path in sorted(tree.rglob("*")):
            if path.is_symlink() or path.is_file():
                tar.add(path, f"{name}/{path.relative_to(tree)}", filter=anonymous)
    return archive


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Of nobody in particular, and readable by all."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.mode & 0o100 else 0o644
    return entry


if __name__ == "__main__":
    main()

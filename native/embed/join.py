"""Join the objects of one kind of CPU: all that they define is made local, but for two functions, which get a name of their kind.

usage: join.py LD NM OBJCOPY OUT KIND OBJECT...

ggml_backend_cpu_reg becomes sfi_cpu_reg_KIND, ggml_backend_score sfi_cpu_score_KIND.
"""

import subprocess
import sys

FUNCTIONS = {"ggml_backend_cpu_reg": "sfi_cpu_reg_", "ggml_backend_score": "sfi_cpu_score_"}


def unique(nm: str, path: str) -> list[str]:
    """What GCC marks as unique in the process, such as a static variable of an inline function: objcopy makes none of it local."""
    lines = subprocess.run([nm, "--defined-only", path], check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split()[2] for line in lines if line.split()[1] == "u"]


def main(ld: str, nm: str, objcopy: str, out: str, kind: str, *objects: str) -> None:
    subprocess.run([ld, "-r", "--force-group-allocation", "-o", out, *objects], check=True)
    # weak, they can be local. Not all symbols: a weak reference takes nothing out of libgcc and libstdc++, and would be 0
    options = [f"--weaken-symbol={name}" for name in unique(nm, out)]
    for name, prefix in FUNCTIONS.items():
        options += ["--redefine-sym", f"{name}={prefix}{kind}", "--keep-global-symbol", f"{prefix}{kind}"]
    subprocess.run([objcopy, *options, out], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

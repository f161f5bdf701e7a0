"""Write what libsfi.so is linked and used by: the headers it ships, the names it exports and those it gives to llama.cpp's functions.

usage: headers.py LLAMA_TREE INCLUDE OUT SFI_H...

INCLUDE/         llama.h, in which every function has the name that libsfi exports, and the types of ggml that it needs
OUT/llama.names  `objcopy --redefine-syms`: llama_decode sfi_llama_decode, and so on
OUT/libsfi.map   the linker's version script: every function that a shipped header declares, and nothing else

The functions of llama.h are renamed because the dynamic linker has one name space: of two libraries with a llama_decode(), the one that
was loaded first would serve the callers of both, whatever its version. A program writes llama_decode(), as it always did.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "patches"))
from patchset import write_if_changed  # noqa: E402

TYPES_OF_GGML = ("ggml.h", "ggml-cpu.h", "ggml-backend.h", "ggml-alloc.h", "ggml-opt.h", "gguf.h")
OURS_INSTEAD = {"llama_context_default_params"}  # native/embed/backend.cpp has the function that is exported
QUIET = "#ifdef __GNUC__\n#pragma GCC system_header\n#endif\n\n"  # of what is not ours a program's own flags do not complain
NAMES_GUARD = """#ifndef SFI_LLAMA_NAMES
#define SFI_LLAMA_NAMES

/* libsfi exports llama.cpp's functions by names of its own, so that it can live beside another llama.cpp. */
{defines}

#endif
"""
TYPES_BANNER = "/* Types of ggml that llama.h needs. libsfi exports no function of ggml: it can live beside another one. */\n"


def without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)


def is_directive(line: str) -> bool:
    return line.lstrip().startswith("#")


def functions(header: str, macro: str) -> list[str]:
    """The names of the functions that a header declares behind a macro, in its order."""
    text = "\n".join(line for line in without_comments(header).splitlines() if not is_directive(line))
    return list(dict.fromkeys(re.findall(rf"\b{macro}\b[^;]*?\b((?:llama|sfi)_\w+)\s*\(", text)))


def types_alone(header: str) -> str:
    """A header of ggml without comments and functions."""
    lines: list[str] = []
    begun: list[str] = []  # a declaration that has not ended
    for line in filter(str.strip, without_comments(header).splitlines()):
        if not begun and (is_directive(line) or continued(lines)):
            lines.append(line)
            continue
        begun.append(line)
        if line.rstrip().endswith((";", "{", "}")):
            lines += [] if re.search(r"\bGGML_(BACKEND_)?API\b", "\n".join(begun)) else begun
            begun = []
    if begun:
        raise ValueError(f"a declaration has no end: {begun[0]}")
    return TYPES_BANNER + QUIET + "\n".join(line.rstrip() for line in lines) + "\n"


def continued(lines: list[str]) -> bool:
    """Whether the next line belongs to the macro before it."""
    return bool(lines) and lines[-1].endswith("\\")


def renamed(name: str) -> str:
    return f"sfi_{name}"


def llama_header(text: str, names: list[str]) -> str:
    defines = "\n".join(f"#define {name} {renamed(name)}" for name in names)
    return text.replace("#define LLAMA_H\n", "#define LLAMA_H\n\n" + QUIET + NAMES_GUARD.format(defines=defines), 1)


def version_script(exported: list[str], soversion: str) -> str:
    return f"SFI_{soversion} {{\n    global:\n" + "".join(f"        {name};\n" for name in exported) + "    local: *;\n};\n"


def main(tree: str, include: str, out: str, *sfi_headers: str) -> None:
    llama = (Path(tree) / "include" / "llama.h").read_text(encoding="utf-8")
    sfi = "".join(Path(header).read_text(encoding="utf-8") for header in sfi_headers)
    names = functions(llama, "LLAMA_API")
    exported = functions(sfi, "SFI_API") + [renamed(name) for name in names]
    soversion = re.search(r"#define SFI_SOVERSION (\d+)", sfi)[1]

    write_if_changed(Path(include) / "llama.h", llama_header(llama, names))
    for header in TYPES_OF_GGML:
        write_if_changed(Path(include) / header, types_alone((Path(tree) / "ggml" / "include" / header).read_text(encoding="utf-8")))
    write_if_changed(Path(out) / "llama.names", "".join(f"{name} {renamed(name)}\n" for name in names if name not in OURS_INSTEAD))
    write_if_changed(Path(out) / "libsfi.map", version_script(sorted(exported), soversion))


if __name__ == "__main__":
    main(*sys.argv[1:])

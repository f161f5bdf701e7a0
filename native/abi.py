"""Write what a program that is linked with libsfi relies on: functions with their types, layouts of structs, values of enums.

usage: abi.py INCLUDE > native/embed/abi.txt

One line for each, so that a change is a difference between two files. What a line says no more, or says otherwise, breaks programs that
are there: SFI_SOVERSION in sfi.h becomes another. What is new breaks nothing, but for structs without a size that grow. Needs cc and
pycparser.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Iterator

from pycparser import c_ast, c_generator, c_parser

# the standard headers, as far as ours need them, for a parser that knows C99 alone
STANDARD = {
    "stddef.h": "typedef unsigned long size_t;\n#define NULL ((void *) 0)\n",
    "stdint.h": "".join(f"typedef {kind} {sign}int{bits}_t;\n" for bits, base in ((8, "char"), (16, "short"), (32, "int"), (64, "long"))
                        for sign, kind in (("", f"signed {base}"), ("u", f"unsigned {base}"))),
    "stdbool.h": "#define bool _Bool\n",
    "stdio.h": "#ifndef FAKE_STDIO\n#define FAKE_STDIO\ntypedef struct fake_file FILE;\n#endif\n",
}
OURS = ("sfi", "llama_")


def preprocessed(include: Path, folder: Path) -> str:
    for name, text in STANDARD.items():
        guard = name.replace(".", "_").upper()
        (folder / name).write_text(f"#ifndef FAKE_{guard}_\n#define FAKE_{guard}_\n{text}#endif\n", encoding="utf-8")
    (folder / "all.c").write_text('#include "sfi-research.h"\n', encoding="utf-8")
    options = ["-E", "-P", "-std=c99", "-nostdinc", "-D__attribute__(x)=", f"-I{folder}", f"-I{include}"]
    return subprocess.run(["cc", *options, str(folder / "all.c")], check=True, capture_output=True, text=True).stdout


def is_ours(name: str | None) -> bool:
    return bool(name) and name.startswith(OURS)


def declared(tree: c_ast.FileAST) -> Iterator[tuple[str, str, c_ast.Node]]:
    """(kind, name, node) of the functions, structs and enums of ours."""
    for node in tree.ext:
        kind = node.type
        if isinstance(kind, c_ast.TypeDecl):  # of a typedef
            kind = kind.type
        if isinstance(node, c_ast.Decl) and isinstance(kind, c_ast.FuncDecl) and is_ours(node.name):
            yield "function", node.name, kind
        elif isinstance(kind, c_ast.Struct) and kind.decls and is_ours(kind.name or node.name):
            yield "struct", f"struct {kind.name}" if kind.name else node.name, kind
        elif isinstance(kind, c_ast.Enum) and kind.values and is_ours(kind.name or node.name):
            yield "enum", f"enum {kind.name}" if kind.name else node.name, kind
        elif isinstance(node, c_ast.Typedef) and is_ours(node.name):
            yield "typedef", node.name, node


def written(node: c_ast.Node) -> str:
    return " ".join(c_generator.CGenerator().visit(node).split())


def fields(struct: c_ast.Struct) -> Iterator[tuple[str, str]]:
    """(name, declaration) of each field, those of unnamed unions too."""
    for field in struct.decls:
        if field.name:
            yield field.name, written(field)
        else:
            yield from fields(field.type)


def measured(things: list[tuple[str, str, c_ast.Node]], include: Path, folder: Path) -> dict[str, str]:
    """What the compiler says of expressions: sizes, offsets, values."""
    asked = []
    for kind, name, node in things:
        if kind == "struct":
            asked += [f"sizeof({name})"] + [f"offsetof({name}, {field})" for field, _ in fields(node)]
        elif kind == "enum":
            asked += [value.name for value in node.values.enumerators]
    lines = "".join(f'    printf("%lld\\n", (long long) ({expression}));\n' for expression in asked)
    (folder / "ask.c").write_text(f'#include "sfi-research.h"\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {{\n{lines}    return 0;\n}}\n',
                                  encoding="utf-8")
    subprocess.run(["cc", "-std=c11", f"-I{include}", str(folder / "ask.c"), "-o", str(folder / "ask")], check=True)
    answers = subprocess.run([str(folder / "ask")], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(asked, answers, strict=True))


def dump(include: Path) -> list[str]:
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as other:
        text = preprocessed(include, Path(name))
        things = list(declared(c_parser.CParser().parse(text)))
        known = measured(things, include, Path(other))
    lines = []
    for kind, name, node in things:
        if kind in ("function", "typedef"):
            lines.append(f"{kind} {written(node)}")
            continue
        if kind == "struct":
            lines.append(f"{name}: {known[f'sizeof({name})']} bytes")
            lines += [f"{name}: {declaration} at {known[f'offsetof({name}, {field})']}" for field, declaration in fields(node)]
        else:
            lines += [f"{name}: {value.name} = {known[value.name]}" for value in node.values.enumerators]
    return sorted(set(lines))


if __name__ == "__main__":
    print("\n".join(dump(Path(sys.argv[1]))))

"""sfi-local embed: what a C or C++ program needs to be compiled and linked with the library of this installation."""

from __future__ import annotations

import click

from sfi_local.binding import embedding


@click.command("embed", short_help="Print what a C program is compiled and linked with.")
@click.option("--cflags", is_flag=True, help="Options for the compiler.")
@click.option("--libs", is_flag=True, help="Options for the linker.")
@click.option("--cmakedir", is_flag=True, help="The folder for cmake -Dsfi_DIR=.")
@click.option("--prefix", is_flag=True, help="The folder that has include/, lib/ and examples/.")
def command(cflags: bool, libs: bool, cmakedir: bool, prefix: bool) -> None:
    """Print what a C or C++ program is compiled and linked with; the folder of the library, if nothing is asked for.

    \b
    cc app.c $(sfi-local embed --cflags --libs) -o app
    cmake -B build -Dsfi_DIR=$(sfi-local embed --cmakedir)

    docs/embed.md says how to embed, and native/package.py makes a folder of the library that needs no Python.
    """
    tree = embedding.prefix()
    asked = [(cflags, embedding.compile_flags), (libs, embedding.link_flags), (cmakedir, embedding.cmake_folder), (prefix, lambda tree: tree)]
    click.echo(" ".join(str(text(tree)) for wanted, text in asked if wanted) or tree)

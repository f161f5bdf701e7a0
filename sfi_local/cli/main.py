"""The command line: one file per subcommand, imported when it is used; errors become sentences and exit codes here."""

from __future__ import annotations

import importlib
import os
import sys

import click

from sfi_local.binding.library import source_id
from sfi_local.cli import streams
from sfi_local.cli.spelling import spelled
from sfi_local.errors import EXIT_INTERRUPTED, EXIT_OK, SfiError, exit_code

# name: (module, function, short help); the short help is here so that --help imports nothing
COMMANDS = {
    "run": ("cli.run", "command", "Answer a prompt, about a file if one is given; chat on a terminal."),
    "serve": ("serve.command", "command", "Serve the OpenAI API and a page for chats."),
    "rpc-server": ("serve.rpc_server", "command", "Lend this machine to another one's `serve --rpc`."),
    "view": ("view.command", "command", "Show where each generated token looked, as an HTML page."),
    "models": ("cli.models", "models_command", "List the known models, where they are and what fits."),
    "pull": ("cli.models", "pull_command", "Fetch a model into the cache."),
    "rm": ("cli.models", "rm_command", "Remove a fetched model from the cache."),
    "cache": ("cli.cache", "command", "Show, check, empty or fill the store of texts that were read."),
    "bench": ("lab.bench.command", "command", "Measure modes side by side at several depths."),
    "eval": ("lab.eval.command", "command", "Measure fidelity: how close modes and policies are to dense decoding."),
    "calibrate": ("lab.eval.calibrate", "command", "Measure once what modes auto and sfi take for a model."),
    "make-model": ("lab.make_model", "command", "Write a model with random weights, to measure speed."),
    "inspect": ("cli.show", "command", "Show a model's layers and the cost of its KV cache."),
    "help": ("cli.help", "command", "Explain what can be set: knobs, environment, statistics."),
    "embed": ("cli.embed", "command", "Print what a C program is compiled and linked with."),
    "doctor": ("cli.doctor", "command", "Report on the installation and this machine."),
}


class LazyGroup(click.Group):
    """A group whose subcommands are imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, function, _ = COMMANDS[name]
        return getattr(importlib.import_module(f"sfi_local.{module}"), function)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        """A reader that closed the pipe has what it wanted: leave quietly."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail again
            return None


def print_version(ctx: click.Context, option: click.Parameter, wanted: bool) -> None:
    """Print the version and what the native library was built from, if there is one."""
    if not wanted or ctx.resilient_parsing:
        return
    import sfi_local

    try:
        built_from = f", library {source_id()}"
    except SfiError:
        built_from = ", no native library"
    click.echo(f"sfi-local {sfi_local.__version__}{built_from}")
    ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=print_version,
              help="Show the version and exit.")
def cli() -> None:
    """Slow-fast decoding of GGUF models: long contexts at the price of short ones.

    \b
    sfi-local run smollm2-135m -p "Name three rivers."
    sfi-local run smollm2-135m -f report.txt -p "What does the report conclude?"
    sfi-local inspect smollm2-135m
    sfi-local doctor

    Exit codes: 0; 1 with a sentence on stderr; 2 for a wrong use of the command; 130 after Ctrl-C.
    """


def main() -> int:
    """Entry point; returns the exit code."""
    streams.prepare()
    try:
        code = cli.main(prog_name="sfi-local", standalone_mode=False)
        return code if isinstance(code, int) else EXIT_OK
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except SfiError as error:
        click.echo(f"sfi-local: {error.told(spelled)}", err=True)
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())

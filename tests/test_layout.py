"""The rooms of sfi_local/: who may import whom, what is loaded with them, and who may print."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.command_line import cli_env

PACKAGE = Path(__file__).resolve().parents[1] / "sfi_local"
MOST_LEVELS = 8
HEAVY = ("click", "prompt_toolkit", "huggingface_hub", "matplotlib", "jinja2", "numpy", "llama_cpp")
FACES = ("cli", "lab", "serve", "view")  # these print
LOG = "sfi_local.binding.library"  # llama.cpp's own log, for --verbose
BUILT = ("sfi_local._sfi", "sfi_local._build_info")  # by CMake, not in this tree
AFTER_THE_LIBRARY = "sfi_local.llama"  # its class inherits from llama_cpp's, so importing it loads the library
# what a start would wait for: imported while weights are loaded, or for a chat alone
LATE = {"sfi_local.loading": {"sfi_local.runtime.model", "sfi_local.runtime.template", "sfi_local.tuning.auto_depth"},
        "sfi_local.cli.run": {"sfi_local.cli.chat"}}


def name_of(path):
    return ".".join(("sfi_local", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


SOURCES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py") if name_of(path) not in BUILT}


def imports_of(tree):
    """The modules of ours that a file imports, in functions and for type hints too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in SOURCES and alias.name != "sfi_local")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sfi_local":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in SOURCES or inner in BUILT else node.module


GRAPH = {name: {other for other in imports_of(tree) if other not in BUILT} for name, tree in SOURCES.items()}


GROUND = ("errors", "params", "fields", "environment", "machine", "cgroup", "cpus", "whole_file", "catalogue")  # one room without a folder


def room(name):
    """The part of the package that a module is in: a module beside __init__ is one of its own, but for those of the ground."""
    first = name.split(".")[1] if "." in name else name
    return "ground" if first in GROUND else first


def levels(graph):
    """{node: 1 + the largest level of what it stands on}; CycleError where there is a circle."""
    level = {}
    for name in TopologicalSorter(graph).static_order():
        level[name] = 1 + max((level[other] for other in graph[name]), default=0)
    return level


ROOMS = {room(name): set() for name in GRAPH}
for name, others in GRAPH.items():
    ROOMS[room(name)] |= {room(other) for other in others} - {room(name)}


def test_the_reader_of_imports_finds_them_wherever_they_stand():
    tree = ast.parse("from sfi_local.binding import library\nif True:\n    from sfi_local.errors import SfiError\n"
                     "def f():\n    import sfi_local.machine\n    from sfi_local import _sfi")
    assert set(imports_of(tree)) == {"sfi_local.binding.library", "sfi_local.errors", "sfi_local.machine", "sfi_local._sfi"}
    with pytest.raises(CycleError):
        levels({"a": {"b"}, "b": {"a"}})


def test_no_file_imports_in_a_circle():
    assert len(levels(GRAPH)) == len(GRAPH) > 60


def test_the_rooms_stand_on_few_levels_and_arrows_go_down_only():
    found = levels(ROOMS)
    assert max(found.values()) <= MOST_LEVELS, found
    assert found["binding"] < found["runtime"] < found["tuning"] < found["loading"] < found["cli"]


def test_the_product_does_not_stand_on_the_lab():
    assert [name for name, others in GRAPH.items() if room(name) not in ("lab", "sfi_local") and "lab" in map(room, others)] == []


def test_own_modules_are_imported_at_the_head_of_a_file():
    """But for what the build makes, what loads the library, and what a start does not wait for. `import sfi_local` is for its version."""
    late = [(name, node.lineno) for name, tree in SOURCES.items() for outer in ast.walk(tree)
            if isinstance(outer, (ast.FunctionDef, ast.If)) for node in ast.walk(outer)
            if isinstance(node, ast.ImportFrom) and set(imports_of(node)) - {*BUILT, AFTER_THE_LIBRARY} - LATE.get(name, set())]
    assert late == []


@pytest.mark.parametrize("module", ["sfi_local.loading", "sfi_local.runtime.model", "sfi_local.tuning.auto_depth", "sfi_local.store.pull",
                                    "sfi_local.binding.engine"])
def test_what_a_program_embeds_loads_nothing_of_a_terminal_or_a_hub(module):
    code = f"import sys\nfor name in {HEAVY}: sys.modules[name] = None  # its import fails\nimport {module}"
    done = subprocess.run([sys.executable, "-c", code], env=cli_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def prints(tree):
    """Lines that write where a user sees it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "print":
            yield node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) in (
                ("sys", "stdout"), ("sys", "stderr"), ("click", "echo")):
            yield node.lineno


def test_only_faces_print():
    assert [(name, line) for name, tree in SOURCES.items() if room(name) not in FACES and name != LOG for line in prints(tree)] == []
    assert [name for name in SOURCES if any(prints(SOURCES[name]))]


def test_what_the_library_says_names_parameters_and_not_options():
    """An app has no command line: cli/spelling.py says how the parameters of a remedy are typed there."""
    for room in ("binding", "store", "runtime", "tuning"):
        for path in sorted((PACKAGE / room).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            said = [node for raised in ast.walk(tree) if isinstance(raised, ast.Raise) for node in ast.walk(raised)]
            texts = [node.value for node in said if isinstance(node, ast.Constant) and isinstance(node.value, str)]
            assert not [text for text in texts if " --" in text or text.startswith("--")], path

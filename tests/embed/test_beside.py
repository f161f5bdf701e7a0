"""libsfi beside another ggml, llama.cpp and OpenMP in one process: neither takes a function of the other, in whatever order they are linked."""

import importlib.util
import re
from pathlib import Path

import pytest
from support.embedding import ROOT, compiled, run, tool, tree

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def prefix(native):
    return tree()


@pytest.fixture(scope="module")
def alone(prefix, smollm2, tmp_path_factory):
    """What it says with nothing beside it."""
    program = compiled(prefix, HERE / "beside.c", out=tmp_path_factory.mktemp("alone") / "beside")
    done = run(program, smollm2)
    assert done.returncode == 0 and len(done.stdout.split()) == 8
    return done.stdout


def names_of_llama_and_ggml(prefix) -> set[str]:
    """Every function that this build's own libraries for Python export in C."""
    names = set()
    for library in (ROOT / "sfi_local" / "lib", *(prefix.parent / name for name in ("lib", "bin"))):
        for path in library.glob("libsfi-*.so"):
            lines = run(tool("nm"), "-D", "--defined-only", path).stdout.splitlines()
            names |= {line.split()[2] for line in lines if " T " in line}
    return {name for name in names if re.match(r"(llama|ggml|gguf|quantize|dequantize)_", name)}


@pytest.fixture(scope="module")
def other(prefix, tmp_path_factory) -> Path:
    """A library that has all these names and OpenMP's; each of them ends the program, but for one."""
    folder = tmp_path_factory.mktemp("other")
    names = names_of_llama_and_ggml(prefix) | {"GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads"}
    assert len(names) > 500 and {"llama_decode", "ggml_graph_compute", "ggml_backend_cpu_reg"} < names
    lines = [f'void {name}(void) {{ write(2, "{name} of the other\\n", {len(name) + 14}); abort(); }}'
             for name in sorted(names - {"llama_print_system_info"})]
    source = folder / "other.c"
    lines += ['const char * llama_print_system_info(void) { return "I am the other"; }']
    source.write_text("\n".join(["#include <stdlib.h>", "#include <unistd.h>", *lines, ""]))
    done = run(tool("cc"), "-shared", "-fPIC", "-fno-builtin", "-Wl,-soname,libother.so", source, "-o", folder / "libother.so")
    assert done.returncode == 0, done.stderr
    return folder


def linked(prefix, folder: Path, order: str, others: list[str], function: str) -> Path:
    """beside.c with libraries before libsfi or after it. `function` is one of the other's, under the name that it has there."""
    caller = folder / f"call-{order}.c"
    caller.write_text(f"extern const char * {function}(void);\nextern const char * of_the_other(void);\n"
                      f"const char * of_the_other(void) {{ return {function}(); }}\n")  # without our llama.h: it calls the other's
    ours = [f"-L{prefix / 'lib'}", "-lsfi"]
    program = folder / f"beside-{order}"
    done = run(tool("cc"), "-DOTHER=of_the_other", HERE / "beside.c", caller, f"-I{prefix / 'include'}", "-Wl,--no-as-needed",
               *(others + ours if order == "before" else ours + others), f"-Wl,-rpath,{prefix / 'lib'}", "-o", program)
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.parametrize("order", ["before", "after"])
def test_it_calls_no_function_of_another_and_lends_none(prefix, alone, other, smollm2, order):
    program = linked(prefix, other, order, [f"-L{other}", "-lother", f"-Wl,-rpath,{other}"], "llama_print_system_info")
    done = run(program, smollm2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "I am the other\n" + alone


def test_another_one_before_everything_changes_nothing(prefix, alone, other, smollm2, tmp_path):
    program = compiled(prefix, HERE / "beside.c", out=tmp_path / "beside")
    done = run(program, smollm2, LD_PRELOAD=str(other / "libother.so"))
    assert done.returncode == 0 and done.stdout == alone, done.stderr


@pytest.mark.parametrize("order", ["before", "after"])
def test_whisper_of_the_package_index(prefix, alone, smollm2, tmp_path, order):
    spec = importlib.util.find_spec("_pywhispercpp")
    if spec is None:
        pytest.skip("pywhispercpp is not installed")
    folder = Path(spec.origin).parent
    others = sorted(str(path) for name in ("libwhisper.so.?", "libggml*.so.?") for path in folder.glob(name))
    if not others:
        pytest.skip("this wheel of pywhispercpp has no libraries of its own beside the module")
    program = linked(prefix, tmp_path, order, [*others, f"-Wl,-rpath,{folder}"], "whisper_print_system_info")
    done = run(program, smollm2)
    assert done.returncode == 0 and done.stdout.startswith("WHISPER") and done.stdout.endswith(alone), done.stderr

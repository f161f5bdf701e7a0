"""libsfi, the one library that C programs link: what it exports and needs, and that a stranger gets from the archive to a running program."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from support.embedding import STRICT, compiled, run, tool, tree, unpacked

from sfi_local.binding import embedding

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def prefix(native):
    return tree()


@pytest.fixture(scope="module")
def package(native, tmp_path_factory):
    return unpacked(tmp_path_factory.mktemp("package"))


def preprocessed(prefix, header: str) -> str:
    return run(tool("cc"), "-E", "-P", f"-I{prefix / 'include'}", prefix / "include" / header).stdout


def exported(prefix) -> set[str]:
    lines = run(tool("nm"), "-D", "--defined-only", prefix / "lib" / "libsfi.so").stdout.splitlines()
    names = {line.split()[2].partition("@")[0] for line in lines}
    assert {kind for _, kind, name in map(str.split, lines) if not re.fullmatch(r"SFI_\d+", name)} == {"T"}
    return {name for name in names if not re.fullmatch(r"SFI_\d+", name)}  # the version itself is listed too


# ---- the library -----------------------------------------------------------------------------------------------------


def test_it_exports_what_its_headers_declare_and_nothing_else(prefix):
    """A preprocessor reads the headers, not the script that wrote them."""
    text = preprocessed(prefix, "sfi-research.h")
    declared = set(re.findall(r"\b(sfi_\w+)\s*\((?!\*)", re.sub(r"typedef[^;]*;", "", text)))
    assert exported(prefix) == declared and len(declared) > 280
    assert {"sfi_step", "sfi_llama_decode"} < declared and "llama_decode" not in declared


def test_no_function_of_ggml_is_declared_that_cannot_be_linked(prefix):
    text = preprocessed(prefix, "sfi.h")
    bodies = re.sub(r"typedef[^;{]*;|\{[^{}]*\}", "", text)
    assert re.findall(r"\b(ggml_\w+|gguf_\w+)\s*\((?!\s*\*)", bodies) == []


def test_it_needs_the_c_library_alone_and_has_a_version(prefix):
    dynamic = run(tool("readelf"), "-d", "-V", prefix / "lib" / "libsfi.so").stdout
    needed = re.findall(r"NEEDED\).*\[(.*)\]", dynamic)
    assert needed and all(re.match(r"(libc|libm|libdl|libpthread|ld-linux[\w-]*)\.so", name) for name in needed), needed
    assert re.findall(r"SONAME\).*\[(.*)\]", dynamic) == ["libsfi.so.0"] and "SFI_0" in dynamic
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_nothing_is_missing_that_a_linker_does_not_ask_for(prefix):
    """A weak reference takes nothing out of libgcc or libstdc++, and is 0 then: a call of it is a crash."""
    lines = run(tool("nm"), "-D", "--undefined-only", prefix / "lib" / "libsfi.so").stdout.splitlines()
    weak = {name.partition("@")[0] for kind, name in map(str.split, lines) if kind == "w"}
    assert weak <= {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__",  # of every library
                    "__cxa_finalize", "__cxa_pure_virtual", "__pthread_key_create"}


def test_archive_header_and_package_have_one_version(prefix):
    header = (ROOT / "native" / "include" / "sfi.h").read_text(encoding="utf-8")
    version = ".".join(re.findall(r"#define SFI_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header))
    assert f"Version: {version}\n" in (prefix / "lib" / "pkgconfig" / "sfi.pc").read_text(encoding="utf-8")
    assert f'version = "{version}"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


# ---- the tree, from the archive ----------------------------------------------------------------------------------------


def test_three_commands_lead_to_a_running_program(package, smollm2):
    """The first of them unpacked the archive; no path is typed."""
    tool("cmake")
    done = subprocess.run("cmake -S examples -B build && cmake --build build", shell=True, cwd=package, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = run("build/chat", smollm2, "512", cwd=package, input="Name a colour.\nAnd another.\n")
    assert said.returncode == 0 and len(said.stdout) > 10, said.stderr
    assert "512 cells take" in said.stderr and "by fast steps" in said.stderr


def test_a_conversation_goes_on_after_ctrl_c(package, smollm2):
    """What the stopped answer left in the context is taken back or kept, and the next message is read behind it."""
    tool("make")
    assert run("make", "-C", "examples", "chat", cwd=package).returncode == 0
    chat = subprocess.Popen([package / "examples" / "chat", smollm2, "2048"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    chat.stdin.write(b"Write a very long story about a fox.\n")
    chat.stdin.flush()
    assert len(chat.stdout.read(20)) == 20
    chat.send_signal(signal.SIGINT)
    said, told = chat.communicate(b"Name one colour.\n", timeout=240)
    assert chat.returncode == 0, told
    assert len(said.splitlines()) > 1 and b"tokens/s" in told and b"SFI_ERR" not in told


def test_a_conversation_goes_on_from_its_file_without_reading_again(prefix, smollm2, tmp_path):
    """The second program reads the new message alone; a file that is broken or needs more cells is a sentence and a new conversation."""
    program = compiled(prefix, ROOT / "native" / "examples" / "chat.c", out=tmp_path / "chat")
    file = tmp_path / "kept"

    def chat(message: str, cells: int = 1024) -> tuple[int, str]:
        done = run(program, smollm2, cells, file, input=message + "\n")
        assert done.returncode == 0 and done.stdout, done.stderr
        return int(re.search(r"(\d+) tokens read", done.stderr)[1]), done.stderr

    first, _ = chat("Say yes, and nothing else, whatever this list is: " + "apple, pear, plum, " * 40)
    kept = file.read_bytes()
    again, told = chat("Why?")
    assert first > 200 and again < 40 and re.search(r"\d{3} tokens of 2 messages are there again", told)
    assert len(file.read_bytes()) > len(kept) and not file.with_name("kept.new").exists()
    for broken, cells in ((kept[:-3000] + bytes([kept[-3000] ^ 1]) + kept[-2999:], 1024), (kept, 256)):
        file.write_bytes(broken)
        assert "a new one begins" in chat("Say yes.", cells)[1]


def test_make_and_pkg_config_lead_there_too_and_no_example_has_a_warning(package, smollm2):
    flags = " ".join(STRICT)
    tool("pkg-config")
    done = run(tool("make"), "-C", "examples", "CFLAGS=-O1 -std=c99 " + flags, "CXXFLAGS=-O1 " + flags, cwd=package)
    assert done.returncode == 0, done.stderr
    told = run(package / "examples" / "raii", smollm2, "The capital of France is", "8")
    assert told.returncode == 0 and "Paris" in told.stdout and "8 fast steps of 8" in told.stderr
    shown = run(package / "examples" / "header", smollm2, "The capital of France is", "8")
    assert shown.returncode == 0 and len(shown.stdout.split()) == 8


def test_pkg_config_alone(prefix, tmp_path):
    (tmp_path / "app.c").write_text('#include "sfi.h"\nint main(void) { return sfi_version() != SFI_VERSION; }\n')
    tool("pkg-config")
    done = subprocess.run("cc app.c $(pkg-config --cflags --libs sfi) -o app && ./app", shell=True, cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PKG_CONFIG_PATH": str(prefix / "lib" / "pkgconfig")})
    assert done.returncode == 0, done.stderr


def test_the_folder_does_not_say_where_it_was_made(package, prefix):
    """A build for development does in its assertions; what is installed does not."""
    developed = not (prefix.parent / "_build_info.py").exists()
    built_here = (package / "build", package / "examples")
    for path in (path for path in package.rglob("*") if path.is_file() and not {path.parent, *path.parents} & {*built_here}):
        content = path.read_bytes()
        if not (developed and ".so" in path.name):
            assert str(ROOT).encode() not in content and b"/build/" not in content, path


def test_headers_alone_and_in_every_dialect(package, tmp_path):
    source = tmp_path / "all.c"
    source.write_text('#include "sfi-research.h"\nint main(void) { return llama_max_devices() == 0 || sfi_version() != SFI_VERSION; }\n')
    for compiler, language, standards in (("cc", "c", ("c99", "c11", "c17")), ("c++", "c++", ("c++11", "c++17", "c++20"))):
        for standard in standards:
            done = run(tool(compiler), "-x", language, f"-std={standard}", *STRICT, "-fsyntax-only", f"-I{package / 'include'}", source)
            assert done.returncode == 0, done.stderr


# ---- the command -------------------------------------------------------------------------------------------------------


def test_the_command_says_what_a_compiler_wants(cli, prefix, tmp_path):
    (tmp_path / "app.c").write_text('#include "sfi.h"\nint main(void) { return sfi_init(NULL) ? 1 : sfi_threads() < 1; }\n')
    said = cli("embed", "--cflags", "--libs")
    assert said.returncode == 0
    done = run(tool("cc"), "app.c", *said.stdout.decode().split(), "-o", "app", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert run(tmp_path / "app").returncode == 0
    assert Path(cli("embed", "--cmakedir").stdout.decode().strip(), "sfiConfig.cmake").is_file()
    assert cli("embed").stdout == cli("embed", "--prefix").stdout == f"{prefix}\n".encode()


def test_a_wheel_carries_no_link_so_it_is_made(tmp_path, monkeypatch):
    lib = tmp_path / "embed" / "lib"
    lib.mkdir(parents=True)
    monkeypatch.setattr(embedding, "LIB_DIR", tmp_path / "lib")
    with pytest.raises(embedding.LibraryError, match="There is no libsfi"):
        embedding.prefix()
    (lib / "libsfi.so.0").write_text("")
    monkeypatch.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(OSError))
    assert embedding.link_flags(embedding.prefix()).endswith("-l:libsfi.so.0")  # a folder that nobody may write to
    monkeypatch.undo()
    monkeypatch.setattr(embedding, "LIB_DIR", tmp_path / "lib")
    assert embedding.link_flags(embedding.prefix()).endswith("-lsfi") and (lib / "libsfi.so").is_symlink()

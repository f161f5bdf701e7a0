"""The patch tool, on a small tree with every kind of change it must carry. No network; git only where it is tested."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")

PRISTINE = {
    "ggml/CMakeLists.txt": b"project(ggml)\n",
    "ggml/ggml.h": b"".join(b"line %d\n" % i for i in range(60)),
    "src/no-newline.cpp": b"first\nlast without newline",
    "src/windows.cpp": b"one\r\ntwo\r\nthree\r\n",
    "src/gone.cpp": b"to be deleted\n",
    "src/odd.cpp": b"form\x0cfeed\x85\nnext\n",
}
PATCHED = PRISTINE | {
    "ggml/ggml.h": PRISTINE["ggml/ggml.h"].replace(b"line 3\n", b"line 3\nnew\n").replace(b"line 50\n", b""),
    "src/no-newline.cpp": b"first\nlast without newline\n",
    "src/windows.cpp": b"one\r\nzwei\r\nthree\r\n",
    "src/odd.cpp": b"form\x0cfeed\x85\nnew next",
    "src/new/file.cpp": b"brand new\n",
}
del PATCHED["src/gone.cpp"]

MESSAGE = """branch: take a branch

The reason, in two paragraphs,
  indented where it wants:

* a second one.

Proof: test-backend-ops -o SPARSE_ATTN,
tests/test_patchset.py::test_real_series_is_in_order
"""


def write_tree(tree: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(data)
    return tree


def read_tree(tree: Path) -> dict[str, bytes]:
    files = (p for p in tree.rglob("*") if p.is_file() and ".git" not in p.parts and p.name != ".sfi-patched")
    return {p.relative_to(tree).as_posix(): p.read_bytes() for p in files}


@pytest.fixture
def tool():
    """patchset.py as a module."""
    spec = importlib.util.spec_from_file_location("patchset_under_test", ROOT / "patches" / "patchset.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tool, tmp_path, monkeypatch):
    """A project with an empty series and a pristine tree given as SFI_LLAMA_DIR; returns its directory."""
    patches = write_tree(tmp_path / "project" / "patches", {"series": b""})
    shutil.copy(ROOT / "patches" / "upstream", patches)
    (patches / "README.md").write_text("before\n" + tool.BEGIN + tool.END + "after\n")
    monkeypatch.setattr(tool, "ROOT", tmp_path / "project")
    monkeypatch.setattr(tool, "PATCHES", patches)
    monkeypatch.setattr(tool, "NATIVE", write_tree(tmp_path / "project" / "native", {"a.cpp": b"int a;\n"}))
    monkeypatch.setattr(tool, "VENDOR", tmp_path / "project" / "native" / "vendor")
    monkeypatch.setenv("SFI_LOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SFI_LLAMA_DIR", str(write_tree(tmp_path / "pristine", PRISTINE)))
    write_tree(tmp_path / "project" / "tests", {"test_patchset.py": b"def test_real_series_is_in_order(): ..."})
    return tmp_path / "project"


@pytest.fixture
def exported(tool, project, tmp_path):
    """The project with one patch, made the way a developer makes it."""
    tree = tmp_path / "work"
    tool.checkout(tree)
    (tree / "src/gone.cpp").unlink()
    write_tree(tree, PATCHED)
    tool.commit_all(tree, MESSAGE)
    tool.export(tree)
    return project


# ---- apply -----------------------------------------------------------------------------------------------------------


@needs_git
def test_apply_gives_the_tree_that_was_exported(tool, exported, tmp_path):
    tool.apply(tmp_path / "out")
    assert read_tree(tmp_path / "out") == PATCHED


@needs_git
def test_apply_inside_another_repository(tool, exported, tmp_path):
    """git would skip every path silently there; ours does not ask git."""
    tool.git(tmp_path, "init", "--quiet")
    tool.apply(tmp_path / "deep" / "out")
    assert read_tree(tmp_path / "deep" / "out") == PATCHED


@needs_git
def test_git_applies_our_patches_to_the_same_tree(tool, exported, tmp_path):
    tree = write_tree(tmp_path / "by-git", PRISTINE)
    tool.git(tree, "init", "--quiet")
    tool.git(tree, "apply", str(exported / "patches" / "branch.patch"))
    assert read_tree(tree) == PATCHED


@needs_git
def test_apply_again_touches_nothing(tool, exported, tmp_path):
    tool.apply(tmp_path / "out")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.*") if p.is_file() and p.name != ".sfi-patched"}
    tool.apply(tmp_path / "out")
    assert times == {p: p.stat().st_mtime_ns for p in times}


@needs_git
def test_apply_accepts_a_local_tree_that_is_patched_already(tool, exported, tmp_path, monkeypatch):
    monkeypatch.setenv("SFI_LLAMA_DIR", str(write_tree(tmp_path / "patched", PATCHED)))
    tool.apply(tmp_path / "out")
    assert read_tree(tmp_path / "out") == PATCHED


@needs_git
def test_the_local_tree_is_never_changed(tool, exported, tmp_path):
    tool.apply(tmp_path / "out")
    assert read_tree(tmp_path / "pristine") == PRISTINE


def test_builds_and_models_of_the_local_tree_stay_behind(tool, project, tmp_path):
    """A build is a folder at the root; a file of upstream's may be called like one."""
    left = {"build/ggml.h": b"", "build-arm/cmake/x.cmake": b"", "models/tiny.gguf": b"", "src/__pycache__/a.pyc": b""}
    kept = {"cmake/build-info.cmake": b"set(X 1)\n", "src/build/a.cpp": b"int a;\n", "build-all.sh": b"make\n"}
    write_tree(tmp_path / "pristine", left | kept)
    tool.apply(tmp_path / "out")
    assert read_tree(tmp_path / "out") == PRISTINE | kept


def test_a_tree_reached_by_a_link_is_copied_alike(tool, project, tmp_path, monkeypatch):
    write_tree(tmp_path / "pristine", {"build/ggml.h": b""})
    (tmp_path / "link").symlink_to(tmp_path / "pristine")
    monkeypatch.setenv("SFI_LLAMA_DIR", str(tmp_path / "link"))
    tool.apply(tmp_path / "out")
    assert read_tree(tmp_path / "out") == PRISTINE


@needs_git
def test_a_tree_that_does_not_fit_is_refused_by_name(tool, exported, tmp_path, monkeypatch):
    other = PRISTINE | {"ggml/ggml.h": b"something else\n"}
    monkeypatch.setenv("SFI_LLAMA_DIR", str(write_tree(tmp_path / "other", other)))
    with pytest.raises(tool.PatchsetError, match="branch.patch does not fit ggml/ggml.h at line"):
        tool.apply(tmp_path / "out")


def test_a_directory_of_the_user_is_left_alone(tool, project, tmp_path):
    mine = write_tree(tmp_path / "mine", {"notes.txt": b"dear diary"})
    with pytest.raises(tool.PatchsetError, match="left alone"):
        tool.apply(mine)
    assert read_tree(mine) == {"notes.txt": b"dear diary"}


@pytest.mark.parametrize("line", ["rename from a", "old mode 100644", "GIT binary patch", "new file mode 100755"])
def test_more_than_text_is_refused(tool, line):
    with pytest.raises(tool.PatchsetError, match="more than a change of text"):
        tool.parse_changes(f"---\ndiff --git a/x b/x\n{line}\n".encode(), "slug")


def test_paths_outside_the_tree_are_refused(tool):
    patch = b"diff --git a/x b/x\n--- /dev/null\n+++ b/../../x\n@@ -0,0 +1 @@\n+x\n"
    with pytest.raises(tool.PatchsetError, match="outside"):
        tool.parse_changes(patch, "slug")


# ---- export and check ------------------------------------------------------------------------------------------------


@needs_git
def test_export_is_stable_and_anonymous(tool, exported, tmp_path, monkeypatch):
    """Another checkout, at another time, by someone with other settings, gives the same bytes."""
    before = read_tree(exported / "patches")
    for name in ("GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE"):
        monkeypatch.setenv(name, "2001-01-01T00:00:00")
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "diff.noprefix")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "true")
    tool.checkout(tmp_path / "again")
    tool.export(tmp_path / "again")
    assert read_tree(exported / "patches") == before
    assert b"index " not in before["branch.patch"].partition(b"---\n")[2]


@needs_git
def test_check_accepts_what_export_wrote(tool, exported, capsys):
    tool.check()
    assert "1 patches" in capsys.readouterr().out


@needs_git
def test_check_finds_an_edited_patch(tool, exported):
    patch = exported / "patches" / "branch.patch"
    patch.write_bytes(patch.read_bytes().replace(b"@@ line", b"@@ Line", 1).replace(b"Origin: vendor", b"Origin: other"))
    with pytest.raises(tool.PatchsetError, match="not what 'export' writes"):
        tool.check()


@needs_git
def test_check_wants_reason_proof_and_one_intent(tool, exported, tmp_path):
    tree = tmp_path / "work"
    (tree / "src/windows.cpp").write_bytes(b"again\n")
    tool.commit_all(tree, "bare: do this; do that\n")
    tool.export(tree)
    problems = "\n".join(tool.check_files())
    assert "gives no reason" in problems and "no 'Proof:' line" in problems and "more than one intent" in problems


@needs_git
def test_check_wants_the_tests_to_exist(tool, exported):
    (exported / "tests" / "test_patchset.py").write_text("")
    assert any("test_real_series_is_in_order, which does not exist" in p for p in tool.check_files())


@needs_git
def test_index_says_what_each_patch_does(tool, exported):
    row = (exported / "patches" / "README.md").read_text(encoding="utf-8").splitlines()[4]
    assert row.startswith("| [branch](branch.patch) | take a branch |")
    assert "ggml.h (+1 −1)" in row and "test-backend-ops -o SPARSE_ATTN" in row


def test_message_and_header_say_the_same(tool):
    message = tool.Message.of_commit(MESSAGE)
    assert message.proof == "test-backend-ops -o SPARSE_ATTN, tests/test_patchset.py::test_real_series_is_in_order"
    assert tool.Message.of_patch(message.header().encode()) == message
    assert tool.Message.of_commit(message.commit()) == message


# ---- fetch -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def download(tool, project, monkeypatch):
    """Set what pip brings: a function of bytes."""
    pin = tool.read_pin()

    def brings(data: bytes) -> None:
        def pip_download(pin, directory):
            (directory / pin["file"]).write_bytes(data)
            return directory / pin["file"]

        monkeypatch.setattr(tool, "pip_download", pip_download)

    monkeypatch.setattr(tool, "read_pin", lambda: pin | {"sha256": hashlib.sha256(b"the archive").hexdigest()})
    return brings


def test_fetch_downloads_once(tool, download):
    download(b"the archive")
    assert tool.fetch().read_bytes() == b"the archive"
    download(b"must not be asked again")
    assert tool.fetch().read_bytes() == b"the archive"


def test_a_wrong_download_is_not_kept(tool, download):
    download(b"the arch")
    with pytest.raises(tool.PatchsetError, match="is not the pinned file"):
        tool.fetch()
    assert list(tool.cache_dir().iterdir()) == []


def test_the_vendored_archive_comes_first(tool, download):
    download(b"the archive")
    assert tool.vendor() == tool.VENDOR / tool.read_pin()["file"]
    download(b"must not be asked")
    shutil.rmtree(tool.cache_dir())
    assert tool.fetch() == tool.VENDOR / tool.read_pin()["file"]


def test_without_a_network_the_remedy_is_said(project):
    """The real pip, with an index that nobody answers for."""
    env = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(project)}
    env.pop("SFI_LLAMA_DIR")
    done = subprocess.run([sys.executable, ROOT / "patches" / "patchset.py", "fetch"], env=env, text=True, capture_output=True)
    if done.returncode == 0:
        pytest.skip("native/vendor/ holds the archive")
    assert done.returncode == 1 and "Without a network, put that file into" in done.stderr


# ---- the source id and the real series ---------------------------------------------------------------------------------


def test_source_id_follows_native_sources(tool, project):
    before = tool.source_id()
    (project / "native" / "a.cpp").write_bytes(b"int a;\r\n")
    write_tree(project / "native", {"tests/t.cpp": b"", "examples/e.c": b"", "notes.md": b""})
    assert tool.source_id() == before
    (project / "native" / "a.cpp").write_bytes(b"int b;\n")
    assert tool.source_id() != before
    assert before.startswith(tool.read_pin()["llama_commit"] + "+") and len(before.split("+")[1]) == 12


@needs_git
def test_source_id_follows_the_series(tool, exported):
    before = tool.source_id()
    patch = exported / "patches" / "branch.patch"
    patch.write_bytes(patch.read_bytes().replace(b"reason", b"season"))
    assert tool.source_id() != before


def test_real_series_is_in_order(tool):
    assert tool.check_files() == []

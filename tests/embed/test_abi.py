"""What programs that are linked with libsfi rely on is in native/embed/abi.txt, and changes in no other way than that file does."""

import re
import subprocess
import sys

import pytest
from support.embedding import ROOT, run, tool, tree

COMMITTED = ROOT / "native" / "embed" / "abi.txt"
NEW = f"python native/abi.py PREFIX/include > {COMMITTED.relative_to(ROOT)}"


@pytest.fixture(scope="module")
def found(native) -> list[str]:
    tool("cc")
    done = subprocess.run([sys.executable, str(ROOT / "native" / "abi.py"), str(tree() / "include")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_nothing_is_gone_or_otherwise(found):
    """A program that was built before would break: SFI_SOVERSION becomes another, and the file is written anew."""
    gone = sorted(set(COMMITTED.read_text(encoding="utf-8").splitlines()) - set(found))
    assert not gone, f"raise SFI_SOVERSION in sfi.h and SFI_VERSION_MINOR, and run `{NEW}`:\n" + "\n".join(gone)


def test_what_is_new_is_committed(found):
    new = sorted(set(found) - set(COMMITTED.read_text(encoding="utf-8").splitlines()))
    assert not new, f"raise SFI_VERSION_MINOR in sfi.h, and run `{NEW}`:\n" + "\n".join(new)


def test_every_exported_function_is_in_it(found):
    listed = {re.search(r"(\w+)\(", line)[1] for line in found if line.startswith("function")}
    lines = run(tool("nm"), "-D", "--defined-only", tree() / "lib" / "libsfi.so").stdout.splitlines()
    exported = {line.split()[2].partition("@")[0] for line in lines if " T " in line}
    assert exported == listed and len(listed) > 280


def test_a_changed_struct_would_be_seen(tmp_path, found):
    """The tool itself: a field in the middle moves those behind it."""
    for header in (tree() / "include").glob("*.h"):
        text = header.read_text(encoding="utf-8")
        (tmp_path / header.name).write_text(text.replace("    int32_t n_recent; ", "    int64_t added;\n    int32_t n_recent; "), encoding="utf-8")
    done = subprocess.run([sys.executable, str(ROOT / "native" / "abi.py"), str(tmp_path)], capture_output=True, text=True)
    changed = set(done.stdout.splitlines()) - set(found)
    assert any(line.startswith("struct sfi_params: int64_t added at") for line in changed) and any("n_recent at" in line for line in changed)

#!/usr/bin/env python3
"""Keep the series of patches that turns the pinned llama.cpp into ours.

usage: patchset.py COMMAND [...]

    fetch            get the pinned source archive (checked, cached) and print where it lies
    vendor           put that archive into native/vendor/, for builds without a network
    apply DIR        make DIR the pinned llama.cpp with the series applied
    checkout DIR     the same as a git tree, for editing: one commit 'pin', then one per patch
    export DIR       write the commits of such a tree to patches/*.patch and patches/series
    check            is everything here consistent? A sentence per problem, exit 1 if there is one
    index            rewrite the table of patches in patches/README.md
    source-id        print "<llama.cpp commit>+<hash of the series and native/>"

SFI_LLAMA_DIR names a llama.cpp tree, pristine or patched, to copy instead of the archive; it is never changed.
SFI_LOCAL_CACHE names the directory for downloads. The patched tree needs Python only; checkout, export and check
need git.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "patches"
NATIVE = ROOT / "native"
VENDOR = NATIVE / "vendor"

STAMP = ".sfi-patched"  # in a tree of ours: the fingerprint of what it was made from
UNUSED = ("docs/", "media/", "models/", "tools/ui/")  # of llama.cpp: nothing we build reads them
NOT_IN_THE_LIBRARIES = ("vendor", "tests", "examples", "cross", "package.py", "wheels.py")  # of native/
SOURCE_SUFFIXES = {".c", ".cpp", ".cu", ".cuh", ".h", ".m", ".metal", ".cmake", ".txt", ".py"}


class PatchsetError(Exception):
    """A sentence for the user, remedy included."""


# ---- the pin and the series ---------------------------------------------------------------------------------------


def read_pin() -> dict[str, str]:
    """The key=value lines of patches/upstream."""
    lines = (PATCHES / "upstream").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def read_series() -> list[str]:
    """The slugs of patches/series, in order; a missing file is an empty series."""
    path = PATCHES / "series"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line.strip().removesuffix(".patch") for line in lines if line.strip() and not line.startswith("#")]


def unix_bytes(path: Path) -> bytes:
    """The content with LF line ends, so that a Windows checkout has the same identity."""
    return path.read_bytes().replace(b"\r\n", b"\n")


def patch_bytes(slug: str) -> bytes:
    """The patch as it is: a carriage return in it is the upstream file's own."""
    path = PATCHES / f"{slug}.patch"
    if not path.exists():
        raise PatchsetError(f"patches/series lists {slug}, but patches/{slug}.patch does not exist.")
    return path.read_bytes()


def native_sources() -> list[Path]:
    """The files of native/ that decide what the libraries are, sorted by path."""
    files = [p.relative_to(NATIVE) for p in NATIVE.rglob("*") if p.suffix in SOURCE_SUFFIXES and p.is_file()]
    return [NATIVE / p for p in sorted(files, key=Path.as_posix) if p.parts[0] not in NOT_IN_THE_LIBRARIES]


def source_id() -> str:
    """"<llama.cpp commit>+<12 hex digits>" of the pin, the series and native/."""
    digest = hashlib.sha256(unix_bytes(PATCHES / "upstream"))
    for slug in read_series():
        digest.update(f"\0{slug}\0".encode() + patch_bytes(slug))
    for path in native_sources():
        digest.update(f"\0{path.relative_to(NATIVE).as_posix()}\0".encode() + unix_bytes(path))
    return f"{read_pin()['llama_commit']}+{digest.hexdigest()[:12]}"


def write_if_changed(path: Path, content: str | bytes) -> None:
    """Write a file only when that changes it: build tools go by its time."""
    data = content.encode() if isinstance(content, str) else content
    if not path.exists() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


# ---- fetch: the pinned archive ------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Where downloads are kept for this user."""
    if os.environ.get("SFI_LOCAL_CACHE"):
        return Path(os.environ["SFI_LOCAL_CACHE"])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "sfi-local"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/sfi-local"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfi-local"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def pip_download(pin: dict[str, str], directory: Path) -> Path:
    """Let pip bring the sdist, from the package index the user has configured, into `directory`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--no-binary", ":all:", "--dest", str(directory), f"{pin['package']}=={pin['version']}"]
    if importlib.util.find_spec("scikit_build_core"):  # all that pip needs to read the sdist's metadata
        command.insert(-1, "--no-build-isolation")
    done = subprocess.run(command, stdout=sys.stderr)
    if done.returncode or not (directory / pin["file"]).exists():
        raise PatchsetError(
            f"pip could not download {pin['file']} (its messages are above). Without a network, put that file into "
            f"{VENDOR} or {cache_dir()}, or set SFI_LLAMA_DIR to a llama.cpp source tree of commit {pin['llama_commit']}.")
    return directory / pin["file"]


def fetch() -> Path:
    """The pinned sdist: from native/vendor/, from the cache, or downloaded into it."""
    pin = read_pin()
    for directory in (VENDOR, cache_dir()):
        path = directory / pin["file"]
        if path.exists() and sha256(path) == pin["sha256"]:
            return path
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="download-") as tmp:
        path = pip_download(pin, Path(tmp))
        if sha256(path) != pin["sha256"]:
            raise PatchsetError(f"{pin['file']} as downloaded is not the pinned file (sha256 {sha256(path)}). "
                                "Check the package index that pip is configured for.")
        os.replace(path, cache_dir() / pin["file"])
    return cache_dir() / pin["file"]


def vendor() -> Path:
    """Put the archive where an sdist of this project carries it."""
    source = fetch()
    target = VENDOR / source.name
    if source != target:
        VENDOR.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return target


# ---- patches: reading and applying --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hunk:
    """A run of lines, each with its mark: b" " kept, b"-" removed, b"+" added."""

    start: int  # lines of the old file before the hunk
    lines: list[bytes]

    def side(self, marks: bytes) -> list[bytes]:
        return [line[1:] for line in self.lines if line[:1] in marks]


@dataclass(frozen=True)
class Change:
    """What a patch does to one file; old is None for a new file, new is None for a deleted one."""

    old: str | None
    new: str | None
    hunks: list[Hunk]

    @property
    def path(self) -> str:
        return self.new or self.old or ""

    def count(self, mark: bytes) -> int:
        return sum(line[:1] == mark for hunk in self.hunks for line in hunk.lines)


HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@")
UNSUPPORTED = (b"old mode ", b"rename ", b"copy ", b"GIT binary patch", b"Binary files ", b"new file mode 100755")


def parse_hunk(lines: list[bytes], at: int) -> tuple[Hunk, int]:
    """The hunk whose header is lines[at], and the line after it."""
    match = HUNK.match(lines[at])
    start, n_old, n_new = (int(group) if group is not None else 1 for group in match.groups())
    body: list[bytes] = []
    at += 1
    while n_old or n_new:
        mark = lines[at][:1]
        n_old -= mark in b" -"
        n_new -= mark in b" +"
        body.append(lines[at])
        at += 1
        if at < len(lines) and lines[at].startswith(b"\\"):  # "\ No newline at end of file"
            body[-1] = body[-1].removesuffix(b"\n")
            at += 1
    return Hunk(start if match[2] == b"0" else start - 1, body), at


def parse_changes(patch: bytes, slug: str) -> list[Change]:
    """The changes of a patch in git's format, text files only."""
    lines = io.BytesIO(patch).readlines()
    changes: list[Change] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.startswith(UNSUPPORTED):
            raise PatchsetError(f"{slug}: '{line.decode().strip()}' is more than a change of text; keep such a "
                                "change out of the series.")
        if line.startswith(b"--- ") and lines[at].startswith(b"+++ "):
            old, new = path_of(line), path_of(lines[at])
            at += 1
            hunks = []
            while at < len(lines) and lines[at].startswith(b"@@ "):
                hunk, at = parse_hunk(lines, at)
                hunks.append(hunk)
            changes.append(Change(old, new, hunks))
    return changes


def path_of(line: bytes) -> str | None:
    """The path of a '--- a/...' or '+++ b/...' line; None for /dev/null."""
    name = line[4:].decode().rstrip("\n").removesuffix("\t")
    if name == "/dev/null":
        return None
    path = PurePosixPath(name).relative_to(PurePosixPath(name).parts[0])
    if ".." in path.parts or path.is_absolute():
        raise PatchsetError(f"A patch names the path {name}, which lies outside the tree.")
    return path.as_posix()


def patched(data: bytes, change: Change) -> bytes:
    """The new content of a file; the old lines must stand exactly where the patch says."""
    lines = io.BytesIO(data).readlines()
    for hunk in reversed(change.hunks):
        old = hunk.side(b" -")
        if lines[hunk.start:hunk.start + len(old)] != old:
            raise PatchsetError(f"does not fit {change.path} at line {hunk.start + 1}")
        lines[hunk.start:hunk.start + len(old)] = hunk.side(b" +")
    return b"".join(lines)


def apply_change(tree: Path, change: Change) -> None:
    target = tree / change.path
    if change.old and not target.exists():
        raise PatchsetError(f"changes {change.path}, which does not exist")
    if not change.old and target.exists():
        raise PatchsetError(f"adds {change.path}, which exists already")
    data = patched(target.read_bytes() if change.old else b"", change)
    if change.new:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    else:
        target.unlink()


def apply_patch(tree: Path, slug: str) -> None:
    """Apply one patch of the series to a tree."""
    for change in parse_changes(patch_bytes(slug), slug):
        try:
            apply_change(tree, change)
        except PatchsetError as error:
            raise PatchsetError(f"patches/{slug}.patch {error}. Is the tree llama.cpp {read_pin()['llama_commit']} "
                                "with the patches before it? See 'A new pin' in CONTRIBUTING.md.") from None


# ---- apply: a patched tree ----------------------------------------------------------------------------------------


def unpack(tree: Path) -> None:
    """The pristine llama.cpp of the pinned archive, less what no build of ours reads."""
    pin = read_pin()
    with tarfile.open(fetch()) as archive:
        prefix = f"{archive.next().name.split('/')[0]}/{pin['path']}/"
        for member in archive:
            path = member.name.removeprefix(prefix)
            if not member.isfile() or path == member.name or path == ".git" or path.startswith(UNUSED):
                continue
            target = tree / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.extractfile(member) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out)


def copy_local(source: Path, tree: Path) -> None:
    """A copy of the user's tree, without its history, builds and models."""
    if not (source / "ggml" / "CMakeLists.txt").exists():
        raise PatchsetError(f"SFI_LLAMA_DIR={source} is not a llama.cpp source tree: it has no ggml/CMakeLists.txt.")
    def left_behind(directory: str, names: list[str]) -> set[str]:
        here = Path(directory)
        builds = {name for name in names if name.startswith("build") and (here / name).is_dir()} if here == source else set()
        return builds | everywhere(directory, names)  # deeper down upstream's own files begin so: cmake/build-info.cmake

    everywhere = shutil.ignore_patterns(".git", STAMP, "*.gguf", "__pycache__")
    shutil.copytree(source, tree, dirs_exist_ok=True, ignore=left_behind)


def is_patched(tree: Path) -> bool:
    """Does a tree hold the whole series? True if every line that the last patch adds is there."""
    series = read_series()
    if not series:
        return True
    for change in parse_changes(patch_bytes(series[-1]), series[-1]):
        path = tree / change.path
        lines = set(io.BytesIO(path.read_bytes()).readlines()) if path.exists() else set()
        if change.new and not all(line in lines for hunk in change.hunks for line in hunk.side(b"+")):
            return False
    return True


def fingerprint() -> str:
    """Changes with whatever a patched tree is made from."""
    digest = hashlib.sha256(unix_bytes(PATCHES / "upstream") + unix_bytes(Path(__file__)))
    for slug in read_series():
        digest.update(f"\0{slug}\0".encode() + patch_bytes(slug))
    return digest.hexdigest()


def sync(source: Path, target: Path) -> None:
    """Make target equal to source; files with the same content keep their time, so that builds stay short."""
    wanted = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    for path in list(target.rglob("*")):
        if path.is_file() and path.relative_to(target) not in wanted:
            path.unlink()
    for path in wanted:
        write_if_changed(target / path, (source / path).read_bytes())


def apply(tree: Path) -> None:
    """Make `tree` the pinned llama.cpp (or a copy of SFI_LLAMA_DIR) with the series applied."""
    local = os.environ.get("SFI_LLAMA_DIR")
    stamp = tree / STAMP
    if tree.exists() and any(tree.iterdir()) and not stamp.exists():
        raise PatchsetError(f"{tree} was not made by this command and is left alone; name an empty directory.")
    if not local and stamp.exists() and stamp.read_text() == fingerprint():
        return
    tree.mkdir(parents=True, exist_ok=True)
    stamp.write_text("incomplete")
    with tempfile.TemporaryDirectory(dir=tree.parent, prefix="llama-") as tmp:
        fresh = Path(tmp)
        if local:
            copy_local(Path(local).resolve(), fresh)
        else:
            unpack(fresh)
        if not (local and is_patched(fresh)):
            for slug in read_series():
                apply_patch(fresh, slug)
        (fresh / STAMP).write_text("incomplete")
        sync(fresh, tree)
    stamp.write_text("" if local else fingerprint())


# ---- the header of a patch: the message of its commit ---------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """What a patch says about itself: in a commit as its message, in a file as its header."""

    slug: str
    summary: str
    reason: str  # paragraphs
    proof: str   # the tests that show it works

    @classmethod
    def of_commit(cls, text: str) -> Message:
        subject, _, body = text.strip().partition("\n")
        slug, colon, summary = subject.partition(": ")
        if not colon or not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", slug):
            raise PatchsetError(f"The commit '{subject}' needs a subject of the form 'slug: summary'.")
        paragraphs = re.split(r"\n\s*\n", body.strip())
        proof = [p for p in paragraphs if p.startswith("Proof:")]
        reason = [p for p in paragraphs if p and not p.startswith("Proof:")]
        return cls(slug, summary.strip(), "\n\n".join(reason),
                   " ".join(" ".join(p.removeprefix("Proof:").split()) for p in proof))

    @classmethod
    def of_patch(cls, patch: bytes) -> Message:
        header = patch.partition(b"\n---\n")[0].decode()
        fields: dict[str, str] = {}
        name = ""
        for line in header.splitlines():
            if line.startswith(" "):
                fields[name] += "\n" + line[1:].removeprefix(".")
            else:
                name, _, value = line.partition(":")
                fields[name] = value.removeprefix(" ")
        slug, _, summary = fields.get("Subject", "").partition(": ")
        return cls(slug, summary, fields.get("Description", "").strip("\n"), fields.get("Proof", ""))

    def commit(self) -> str:
        return f"{self.slug}: {self.summary}\n\n{self.reason}\n\nProof: {self.proof}\n"

    def header(self) -> str:
        """DEP-3 fields; Proof is ours."""
        reason = "".join(f" {line.rstrip() or '.'}\n" for line in self.reason.splitlines())
        return (f"Subject: {self.slug}: {self.summary}\n"
                f"Description:\n{reason}"
                f"Proof: {self.proof}\n"
                "Origin: vendor, sfi-local\n"
                "Forwarded: not-needed\n"
                "---\n")

    def problems(self) -> list[str]:
        """What is missing, as sentences without a subject."""
        found = []
        if not self.reason:
            found.append("gives no reason: write in the commit's body why llama.cpp has to change")
        if not self.proof:
            found.append("has no 'Proof:' line naming the tests that show it works")
        if len(self.summary) > 72 or not self.summary:
            found.append("needs a summary of 1 to 72 characters")
        if re.search(r"[;&]|, and\b|\band also\b", self.summary):
            found.append(f"has more than one intent in its summary ('{self.summary}'): split it, or name what unites them")
        return found


# ---- checkout and export: the series as a git tree -------------------------------------------------------------------


def git(tree: Path, *args: str, stdin: str | None = None) -> bytes:
    """Run git in `tree`, deaf to the user's settings and to a repository around it; returns its stdout."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1", "LC_ALL": "C",
            "GIT_CEILING_DIRECTORIES": str(tree.resolve().parent)}
    command = ["git", "-c", "core.autocrlf=false", "-c", "core.safecrlf=false", "-c", "core.quotePath=false",
               "-c", "safe.directory=*", "-c", "user.name=sfi-local", "-c", "user.email=sfi-local@localhost", *args]
    try:
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True,
                              input=None if stdin is None else stdin.encode())
    except FileNotFoundError:
        raise PatchsetError("git was not found; install it to work on the patches (building does not need it).") from None
    if done.returncode:
        raise PatchsetError(f"git {args[0]} failed in {tree}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def commit_all(tree: Path, message: str) -> None:
    git(tree, "add", "--all", "--force", ".")
    git(tree, "commit", "--quiet", "--no-verify", "--no-gpg-sign", "--cleanup=verbatim", "--file=-", stdin=message)


def checkout(tree: Path) -> None:
    """Make `tree` a git tree: the commit 'pin', then one commit per patch."""
    if tree.exists() and any(tree.iterdir()):
        raise PatchsetError(f"{tree} is not empty; name a new directory.")
    tree.mkdir(parents=True, exist_ok=True)
    local = os.environ.get("SFI_LLAMA_DIR")
    if local:
        copy_local(Path(local).resolve(), tree)
    else:
        unpack(tree)
    git(tree, "init", "--quiet")
    commit_all(tree, "pin\n")
    for slug in read_series():
        apply_patch(tree, slug)
        commit_all(tree, Message.of_patch(patch_bytes(slug)).commit())


def diff_of(tree: Path, commit: str) -> bytes:
    """The change of one commit without hashes of blobs: the same bytes whatever made the commit."""
    diff = git(tree, "diff", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--unified=3",
               "--inter-hunk-context=0", "--diff-algorithm=myers", "--no-indent-heuristic", "--src-prefix=a/",
               "--dst-prefix=b/", f"{commit}^", commit)
    return re.sub(rb"^(diff --git .*\n(?:(?:new|deleted) file mode .*\n)?)index .*\n", rb"\1", diff, flags=re.MULTILINE)


def exported(tree: Path) -> dict[str, bytes]:
    """The patches of a git tree, in order, by slug."""
    commits = git(tree, "rev-list", "--reverse", "--first-parent", "HEAD").decode().split()
    patches: dict[str, bytes] = {}
    for commit in commits[1:]:
        message = Message.of_commit(git(tree, "show", "--no-patch", "--format=%B", commit).decode())
        if message.slug in patches:
            raise PatchsetError(f"Two commits are called '{message.slug}'; squash them or rename one.")
        patches[message.slug] = message.header().encode() + diff_of(tree, commit)
        parse_changes(patches[message.slug], message.slug)
    return patches


def series_text(slugs: list[str]) -> str:
    return "".join(f"{slug}.patch\n" for slug in slugs)


def export(tree: Path) -> None:
    """Write the commits of a git tree to patches/, and drop the patches that are gone."""
    if git(tree, "status", "--porcelain", "--untracked-files=no"):
        print(f"note: changes in {tree} that are not committed are not exported", file=sys.stderr)
    patches = exported(tree)
    for path in PATCHES.glob("*.patch"):
        if path.stem not in patches:
            path.unlink()
    for slug, patch in patches.items():
        write_if_changed(PATCHES / f"{slug}.patch", patch)
    write_if_changed(PATCHES / "series", series_text(list(patches)))
    index()
    for problem in check_files():
        print(f"note: {problem}", file=sys.stderr)


# ---- index and check ------------------------------------------------------------------------------------------------


BEGIN, END = "<!-- index: written by patchset.py index -->\n", "<!-- end of index -->\n"


def index_row(slug: str) -> str:
    patch = patch_bytes(slug)
    message, changes = Message.of_patch(patch), parse_changes(patch, slug)
    files = ", ".join(f"{PurePosixPath(c.path).name} (+{c.count(b'+')} −{c.count(b'-')})" for c in changes)
    cells = (f"[{slug}]({slug}.patch)", message.summary, files, message.proof)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def index_table() -> str:
    rows = "".join(index_row(slug) for slug in read_series())
    return "| patch | intent | files and lines | proof |\n|---|---|---|---|\n" + rows


def split_readme() -> tuple[str, str, str]:
    """patches/README.md before the index, the index, and after it."""
    text = (PATCHES / "README.md").read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    table, end, after = rest.partition(END)
    if not begin or not end:
        raise PatchsetError("patches/README.md has lost the two comment lines around its index; put them back.")
    return before, table, after


def index() -> None:
    """Rewrite the table of patches in patches/README.md."""
    before, _, after = split_readme()
    write_if_changed(PATCHES / "README.md", before + BEGIN + index_table() + END + after)


def missing_tests(proof: str) -> list[str]:
    """The tests/... paths a Proof line names that do not exist."""
    missing = []
    for path, name in re.findall(r"(tests/[\w./-]+\.\w+)(?:::(\w+))?", proof):
        file = ROOT / path
        if not file.exists() or (name and name not in file.read_text(encoding="utf-8")):
            missing.append(f"{path}::{name}" if name else path)
    return missing


def check_files() -> list[str]:
    """Problems that the files of patches/ show by themselves."""
    series = read_series()
    problems = [f"patches/{path.name} is not in patches/series."
                for path in sorted(PATCHES.glob("*.patch")) if path.stem not in series]
    for slug in series:
        message = Message.of_patch(patch_bytes(slug))
        problems += [f"patches/{slug}.patch {problem}." for problem in message.problems()]
        problems += [f"patches/{slug}.patch names the test {test}, which does not exist." for test in missing_tests(message.proof)]
        if message.slug != slug:
            problems.append(f"patches/{slug}.patch calls itself '{message.slug}'.")
    if split_readme()[1] != index_table():
        problems.append("The index in patches/README.md is not up to date: run 'patchset.py index'.")
    return problems


def check_round_trip() -> list[str]:
    """Does the series apply to the pin, and do the commits it makes export to the same bytes?"""
    with tempfile.TemporaryDirectory(prefix="sfi-check-", ignore_cleanup_errors=True) as tmp:
        tree = Path(tmp) / "llama.cpp"
        checkout(tree)
        patches = exported(tree)
    return [f"patches/{slug}.patch is not what 'export' writes: export it from a tree made by 'checkout'."
            for slug in read_series() if patches.get(slug) != patch_bytes(slug)]


def check() -> None:
    problems = check_files() + check_round_trip()
    if problems:
        raise PatchsetError("\n".join(problems))
    print(f"{len(read_series())} patches on llama.cpp {read_pin()['llama_commit']}: in order")


# ---- the command line -------------------------------------------------------------------------------------------------


def print_source_id(header: str | None) -> None:
    if header:
        write_if_changed(Path(header), f'/* written by the build */\n#define SFI_SOURCE_ID "{source_id()}"\n')
    else:
        print(source_id())


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="patchset.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in ("fetch", "vendor", "check", "index"):
        commands.add_parser(name)
    for name in ("apply", "checkout", "export"):
        commands.add_parser(name).add_argument("dir", type=Path, metavar="DIR")
    commands.add_parser("source-id").add_argument("--header", help="write it to this C header instead")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    tree_commands = {"apply": apply, "checkout": checkout, "export": export}
    try:
        if args.command in tree_commands:
            tree_commands[args.command](args.dir.resolve())
        elif args.command == "source-id":
            print_source_id(args.header)
        elif args.command in ("fetch", "vendor"):
            print(fetch() if args.command == "fetch" else vendor())
        else:
            {"check": check, "index": index}[args.command]()
    except (PatchsetError, OSError, tarfile.TarError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

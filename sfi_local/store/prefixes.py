"""What was read once: prefixes of texts with their K and V on disk, found by their tokens.

    FOLDER/FINGERPRINT/blocks/NAME      see prefix_files
    FOLDER/FINGERPRINT/entries/NAME
    FOLDER/FINGERPRINT/index            see index

Every process may read, write and delete at any time: files appear whole, a missing or damaged one ends what can be taken of a text, and
writers take turns. Nothing here raises but for a bug: what the disk refuses is a sentence.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator, Sequence

from sfi_local.machine import cache_dir, human_bytes, new_memory
from sfi_local.store.index import Index, hashes
from sfi_local.store.prefix_files import (
    BLOCK,
    BlockHead,
    Checksum,
    Damaged,
    EntryHead,
    Newer,
    is_name,
    packed,
    read_head,
    read_packed,
    read_part,
    read_tokens,
    unpacked,
    write,
)

SHARE = 0.2        # of what is free on the disk, which the store may use
LOCK_S = 20        # how long a writer waits for another
TEXT = 200         # characters of a text that an entry shows
INDEX = "index"    # its file


def folder() -> Path:
    """Where prefixes are kept."""
    return cache_dir() / "prefixes"


def budget(path: Path | None = None) -> int:
    """Bytes that prefixes may take: SFI_LOCAL_PREFIX_BUDGET, or a share of the free disk; 0: none are kept."""
    asked = _asked()
    if asked is not None:
        return asked
    path = path or folder()
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return int(SHARE * (shutil.disk_usage(path).free + size_of(folder())))
    except OSError:
        return 0


def is_off() -> bool:
    """Whether the user wants nothing kept and nothing taken."""
    return _asked() == 0


def _asked() -> int | None:
    try:
        return max(0, int(float(os.environ["SFI_LOCAL_PREFIX_BUDGET"])))
    except (KeyError, ValueError, OverflowError):
        return None


def size_of(path: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(size for _, size, _ in _files(path))


AddRows = Callable[[Sequence[int], Any, int], None]  # appends tokens whose rows are the first of so many to a sequence


@dataclass
class Found:
    """An entry, and how many of its tokens a text begins with."""

    path: Path
    head: EntryHead
    tokens: list[int] = field(repr=False)
    n: int = 0


class Prefixes:
    """Of one model.

    fingerprint: of the model and of all that K and V depend on, hexadecimal
    checksum:    of bytes, see binding.state
    note:        called with a sentence, once at most, where something is wrong with the store
    """

    def __init__(self, fingerprint: str, checksum: Checksum, note: Callable[[str], None] = lambda sentence: None, root: Path | None = None):
        self.fingerprint, self._checksum, self._note, self._noted = fingerprint, checksum, note, False
        self.root = root or folder()
        self._blocks, self._entries = self.root / fingerprint / "blocks", self.root / fingerprint / "entries"
        self._index = Index(self.root / fingerprint / INDEX)

    # ---- reading -----------------------------------------------------------------------------------------------------

    def find(self, tokens: Sequence[int], least: int = 1) -> Found | None:
        """The entry that shares most of its tokens with a text, but less than least are none; the latest of equal ones."""
        best, wanted = None, packed(tokens)
        for path in self._likely(wanted, least):
            found = self._look(path, wanted)
            if found and found.n >= least and (best is None or found.n > best.n):
                best = found
        return best

    def find_elsewhere(self, tokens: Sequence[int], least: int) -> EntryHead | None:
        """The head of an entry of another model, or of other settings, that shares so many tokens with a text: why it could not be used."""
        wanted = packed(tokens)
        for other in sorted(path for path in self.root.glob("*") if is_name(path.name) and path.name != self.fingerprint):
            store = Prefixes(other.name, self._checksum, root=self.root)
            for path in store._likely(wanted, least, known_alone=True):
                found = store._look(path, wanted)
                if found and found.n >= least:
                    return found.head
        return None

    def _likely(self, wanted: bytes, least: int, known_alone: bool = False) -> list[Path]:
        """Entries that may be the best for a text of packed tokens, the latest first. known_alone: none that the index does not name"""
        try:
            names = [name for name in os.listdir(self._entries) if not name.startswith(".")]
        except OSError:
            return []
        if known_alone:
            names = list(self._index.read().keys() & set(names))
        paths = [self._entries / name for name in self._index.likely(names, wanted, least)]
        return sorted(paths, key=lambda path: (-_used(path), path.name))

    def _look(self, path: Path, wanted: bytes) -> Found | None:
        """An entry, and how many of a text's packed tokens it has."""
        try:
            with open(path, "rb") as file:
                head = self._entry_head(file)
                found = read_packed(file, head, self._checksum)
                n = common(found, wanted) // 4
                return Found(path, head, unpacked(found[:4 * head.n]), n)
        except (Damaged, OSError) as error:
            self._drop(path, error)
            return None

    def _entry_head(self, file: BinaryIO) -> EntryHead:
        head = read_head(file, EntryHead, self._checksum)
        if head.fingerprint != self.fingerprint or len(head.blocks) != head.n // BLOCK or not all(map(is_name, head.blocks)):
            raise Damaged("it is of another model")
        return head

    def fetch(self, found: Found, add_rows: AddRows, row_size: int) -> tuple[int, bytearray]:
        """Hand on the rows of the first found.n tokens; returns (how many it got, the state of the entry).

        row_size: bytes of a token. Only what its checksum proves is handed on; the tokens of each block are compared.
        """
        names = found.head.blocks[:-(-found.n // BLOCK)]
        with _Readers(len(names), row_size * BLOCK, lambda i, into: self._read_block(found, i, into)) as blocks:
            for i, name in enumerate(names):
                try:
                    rows = blocks.next()
                except (Damaged, OSError) as error:
                    self._drop(self._blocks / name, error)
                    return i * BLOCK, bytearray()
                add_rows(found.tokens[i * BLOCK:(i + 1) * BLOCK][:found.n - i * BLOCK], rows, BLOCK)
                blocks.give_back(rows)
        return self._fetch_rest(found, add_rows, row_size)

    def _read_block(self, found: Found, i: int, into: Any) -> Any:
        """The rows of the i-th block of an entry, which are proved to be its own. Raises Damaged, OSError."""
        name, parent = found.head.blocks[i], found.head.blocks[i - 1] if i else ""
        with open(self._blocks / name, "rb", buffering=0) as file:
            head = read_head(file, BlockHead, self._checksum)
            self._check_block(head, file, name, parent, found.tokens[i * BLOCK:(i + 1) * BLOCK], len(into))
            return read_part(file, into, head.rows_sum, self._checksum)

    def _fetch_rest(self, found: Found, add_rows: AddRows, row_size: int) -> tuple[int, bytearray]:
        """What fills no block, and the state."""
        head, done = found.head, min(found.n, len(found.head.blocks) * BLOCK)
        n_rest = head.n - len(head.blocks) * BLOCK
        try:
            with open(found.path, "rb", buffering=0) as file:
                again = self._entry_head(file)
                if again != head or head.rows_size != n_rest * row_size:
                    raise Damaged("its rows are of another size")
                file.seek(4 * head.n, os.SEEK_CUR)
                if found.n > done:
                    rows = read_part(file, bytearray(head.rows_size), head.rows_sum, self._checksum)
                    add_rows(found.tokens[done:found.n], rows, n_rest)
                    done = found.n
                else:
                    file.seek(head.rows_size, os.SEEK_CUR)
                state = read_part(file, bytearray(head.state_size), head.state_sum, self._checksum)
        except (Damaged, OSError) as error:
            self._drop(found.path, error)
            return done, bytearray()
        try:
            os.utime(found.path)  # it was used now
        except OSError:
            pass  # a folder that may be read and not written to
        return done, state

    def _check_block(self, head: BlockHead, file: BinaryIO, name: str, parent: str, tokens: Sequence[int], size: int) -> None:
        if head.fingerprint != self.fingerprint or head.parent != parent or head.name != name or head.n != BLOCK or head.rows_size != size:
            raise Damaged("it is another block")
        if read_tokens(file, head, self._checksum) != list(tokens):
            raise Damaged("it has other tokens")

    # ---- writing -----------------------------------------------------------------------------------------------------

    def save(self, tokens: Sequence[int], blocks: Sequence[str], rows: Iterator[Any], state: Any, model: str, text: str,
             needed: int = 0, settings: str = "") -> list[str] | None:
        """Keep a text; returns the names of its blocks, None where it could not be kept.

        model, settings, text: see EntryHead
        blocks: names of those of its first tokens that are there, or were; rows: of each block after them, then of what fills none
        needed: bytes that will be written, about
        """
        try:
            for path in (self._blocks, self._entries):
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.chmod(self.root, 0o700)
            with _lock(self.root / self.fingerprint):
                return self._save(tokens, list(blocks), rows, state, (model, settings, text[:TEXT]), needed)
        except TimeoutError:  # filelock's Timeout is one
            self._tell("What was read is not kept: another process has been writing for too long.")
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            self._tell(f"What was read is not kept: {'the disk that holds ' if full else ''}{self.root} "
                       f"{'is full' if full else f'cannot be written ({error.strerror or error})'}.")
        return None

    def _save(self, tokens: Sequence[int], blocks: list[str], rows: Iterator[Any], state: Any, told: tuple[str, str, str],
              needed: int) -> list[str] | None:
        needed += 8 * len(tokens) + 1024 * (2 + len(tokens) // BLOCK)  # ids and heads
        if not self._make_room(needed):
            self._tell(f"What was read is not kept: it has {human_bytes(needed)}, and prefixes may take {human_bytes(budget(self.root))}.")
            return None
        if not all((self._blocks / name).exists() for name in blocks):
            return None
        for i in range(len(blocks), len(tokens) // BLOCK):
            data = next(rows)
            ids = packed(tokens[i * BLOCK:(i + 1) * BLOCK])
            size = len(memoryview(data).cast("B"))
            head = BlockHead(self.fingerprint, BLOCK, blocks[-1] if blocks else "", self._checksum(ids), size, self._checksum(data))
            path = self._blocks / head.name
            if not path.exists():
                write(path, head, (ids, data), self._checksum)
            blocks.append(head.name)
        ids, rest = packed(tokens), next(rows)
        entry = EntryHead(self.fingerprint, len(tokens), tuple(blocks), *told, self._checksum(ids), len(rest), self._checksum(rest),
                          len(state), self._checksum(state))
        name = BlockHead(self.fingerprint, len(tokens), blocks[-1] if blocks else "", entry.tokens_sum, len(rest), entry.rows_sum).name
        write(self._entries / name, entry, (ids, rest, state), self._checksum)
        self._index.add(name, ids)
        self._drop_covered(ids, self._entries / name)
        self._collect()
        return blocks

    def _drop_covered(self, ids: bytes, but: Path) -> None:
        """Entries of which another has all tokens are of no more use."""
        mine, known = hashes(ids), self._index.read()
        for path, _, _ in _files(self._entries):
            theirs = known.get(path.name)
            if path != but and (theirs is None or all(a in (0, b) for a, b in zip(theirs, mine))):
                found = self._look(path, ids)
                if found and found.n == len(found.tokens):
                    path.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> bool:
        """Evict what was not used for longest, of any model; False where it cannot be enough."""
        limit = budget(self.root)
        if needed > limit:
            return False
        used = size_of(self.root)
        for path, size, _ in sorted((item for item in _files(self.root) if item[0].parent.name == "entries"), key=lambda item: item[2]):
            if used + needed <= limit:
                break
            path.unlink(missing_ok=True)
            collect(path.parent.parent, self._checksum)
            used = size_of(self.root)
        return True

    def _collect(self) -> None:
        collect(self.root / self.fingerprint, self._checksum)

    # ---- what went wrong -----------------------------------------------------------------------------------------------

    def _drop(self, path: Path, error: Exception) -> None:
        """A damaged file is of no use to anybody; one that is gone, or of a newer version, is left alone."""
        if isinstance(error, FileNotFoundError):
            return
        if isinstance(error, Damaged) and not isinstance(error, Newer):
            try:
                path.unlink(missing_ok=True)
            except OSError:
                pass
        self._tell(f"A kept prefix could not be used ({path.name[:12]}: {error.strerror if isinstance(error, OSError) else error}): "
                   f"the text is read.")

    def _tell(self, sentence: str) -> None:
        if not self._noted:
            self._noted = True
            self._note(sentence)


class _Readers:
    """Two threads that read blocks while those before are handed on: one of them fills a buffer while the other compares a checksum.

    n: blocks, in order; size: bytes of one; read: (which, into) -> the bytes
    """

    N_THREADS, N_BUFFERS = 2, 4

    def __init__(self, n: int, size: int, read: Callable[[int, Any], Any]):
        self._n, self._read, self._free = n, read, [new_memory(size) for _ in range(min(n, self.N_BUFFERS))]
        self._done: dict[int, Any] = {}
        self._n_begun = self._n_taken = 0
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._work, name="reader") for _ in range(min(n, self.N_THREADS))]

    def __enter__(self) -> "_Readers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        with self._changed:
            self._n = 0  # no more
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def next(self) -> Any:
        """The next block; raises what reading it raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._n_taken in self._done)
            found = self._done.pop(self._n_taken)
            self._n_taken += 1
        if isinstance(found, Exception):
            raise found
        return found

    def give_back(self, buffer: Any) -> None:
        with self._changed:
            self._free.append(buffer)
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._free or self._n_begun >= self._n)
                if self._n_begun >= self._n:
                    return
                i, buffer = self._n_begun, self._free.pop()
                self._n_begun += 1
            try:
                found = self._read(i, buffer)
            except Exception as error:  # is raised by next()
                found = error
            with self._changed:
                self._done[i] = found
                self._changed.notify_all()


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens, or bytes, two texts begin with alike."""
    a, b = (a, b) if type(a) is type(b) else (list(a), list(b))
    n, step = 0, min(len(a), len(b))
    while step:
        if n + step <= min(len(a), len(b)) and a[n:n + step] == b[n:n + step]:
            n += step
        else:
            step //= 2
    return n


def collect(path: Path, checksum: Checksum) -> None:
    """Remove blocks that no entry of a model needs, and what killed writers left. The lock is held, or nobody writes."""
    needed = set()
    for entry, _, _ in _files(path / "entries"):
        try:
            with open(entry, "rb") as file:
                needed |= set(read_head(file, EntryHead, checksum).blocks)
        except Newer:
            return  # what it needs is not known
        except (Damaged, OSError):
            continue
    for block, _, _ in _files(path / "blocks"):
        if block.name not in needed:
            block.unlink(missing_ok=True)
    for kind in ("blocks", "entries"):
        for part in (path / kind).glob(".*.part"):
            part.unlink(missing_ok=True)
    try:
        Index(path / INDEX).keep(entry.name for entry, _, _ in _files(path / "entries"))
    except OSError:
        pass  # it names more than there is, no more


def _files(path: Path) -> list[tuple[Path, int, float]]:
    """(path, bytes, time of its last use) of all files below a folder but locks and those that are being written."""
    found = []
    for root, _, names in os.walk(path):
        for name in names:
            if not name.startswith(".") and name not in ("lock", INDEX):
                try:
                    stat = os.stat(os.path.join(root, name))
                except OSError:
                    continue
                found.append((Path(root, name), stat.st_size, stat.st_mtime))
    return found


# ---- for people ------------------------------------------------------------------------------------------------------------


def rows(checksum: Checksum, root: Path | None = None) -> list[dict[str, Any]]:
    """What is kept, the latest first: id, model, n_tokens, bytes, last_used (seconds since 1970), text, path. A block that several need is
    counted for each."""
    found = []
    for path, size, used in sorted(_entry_files(root or folder()), key=lambda item: -item[2]):
        try:
            with open(path, "rb") as file:
                head = read_head(file, EntryHead, checksum)
        except (Damaged, OSError):
            continue
        blocks = sum(_size(path.parent.parent / "blocks" / name) for name in head.blocks if is_name(name))
        found.append({"id": path.name[:12], "model": head.model, "n_tokens": head.n, "bytes": size + blocks, "last_used": used,
                      "text": head.text, "path": str(path)})
    return found


def remove(ids: Sequence[str], checksum: Checksum, root: Path | None = None) -> list[str]:
    """Remove entries by their ids, or how those begin, and what they alone need; returns the ids that were there."""
    gone = []
    for path, _, _ in _entry_files(root or folder()):
        if any(path.name.startswith(one) for one in ids if one):
            path.unlink(missing_ok=True)
            gone.append(path.name[:12])
            with _locked(path.parent.parent):
                collect(path.parent.parent, checksum)
    return gone


def clear(root: Path | None = None) -> int:
    """Remove everything; bytes."""
    root = root or folder()
    n_bytes = size_of(root)
    for model in root.glob("*/"):
        with _locked(model):
            shutil.rmtree(model, ignore_errors=True)
    shutil.rmtree(root, ignore_errors=True)
    return n_bytes


def verify(checksum: Checksum, root: Path | None = None) -> tuple[int, list[tuple[Path, str]]]:
    """(how many files are whole, those that are not and why); the latter are removed."""
    good, bad = 0, []
    for path, _, _ in _files(root or folder()):
        kind = {"blocks": BlockHead, "entries": EntryHead}.get(path.parent.name)
        if kind is None:
            continue
        try:
            with open(path, "rb") as file:
                head: Any = read_head(file, kind, checksum)
                read_tokens(file, head, checksum)
                sums = [(head.rows_size, head.rows_sum)] + ([(head.state_size, head.state_sum)] if kind is EntryHead else [])
                for size, total in sums:
                    read_part(file, bytearray(size), total, checksum)
            good += 1
        except Newer as error:
            bad.append((path, str(error)))
        except (Damaged, OSError) as error:
            bad.append((path, str(error)))
            path.unlink(missing_ok=True)
    return good, bad


def _lock(path: Path) -> Any:
    """A lock of a model's folder, of processes and of threads."""
    from filelock import FileLock  # not for reading

    return FileLock(path / "lock", timeout=LOCK_S, mode=0o600)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """While nobody writes; or after a while in any case, and where there can be no lock: what is missing then is a miss."""
    lock = _lock(path)
    try:
        lock.acquire()
    except OSError:
        pass
    try:
        yield
    finally:
        lock.release()


def _entry_files(root: Path) -> list[tuple[Path, int, float]]:
    return [item for item in _files(root) if item[0].parent.name == "entries"]


def _used(path: Path) -> float:
    """When a file was last used; 0 if it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0

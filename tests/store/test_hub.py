"""Models of the hub, from one on loopback: found in its shared cache, checked, gone on with, removed; what it refuses is a sentence."""

import os
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import constants
from support.command_line import cli_env
from support.fake_hub import COMMIT, FakeHub

from sfi_local.catalogue import HfName, parse_hf
from sfi_local.errors import PullError
from sfi_local.store import disk, hub, pull

WEIGHTS, OTHER = b"GGUF weights" * 100_000, b"GGUF other"
FILES = {"m-Q8_0.gguf": WEIGHTS, "m-Q8_0_L.gguf": OTHER, "m-Q4_0.gguf": OTHER * 2, "mmproj-Q8_0.gguf": b"x", "README.md": b"#",
         "big/m-F16-00001-of-00002.gguf": b"one", "big/m-F16-00002-of-00002.gguf": b"two"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache of the hub's tools."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("SFI_LOCAL_CACHE", str(tmp_path / "cache"))
    return folder


def point_to(monkeypatch, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def server(monkeypatch):
    with FakeHub(dict(FILES)).running() as running:
        point_to(monkeypatch, running.url)
        yield running


def gone_offline(monkeypatch):
    point_to(monkeypatch, "http://127.0.0.1:9")


def files(folder):
    return sorted(p.name for p in folder.rglob("*.gguf")) if folder.exists() else []


def test_a_model_is_fetched_checked_and_found_again_without_the_hub(server, cache, monkeypatch):
    notes, seen = [], []
    path = pull.resolve("hf:user/repo:Q8_0", lambda done, total: seen.append((done, total)), notes.append)
    assert path.read_bytes() == WEIGHTS and path.parent == cache / "models--user--repo" / "snapshots" / COMMIT["main"]
    assert "m-Q8_0.gguf (1.2 MB)" in notes[0] and all(done <= total == len(WEIGHTS) for done, total in seen)
    gone_offline(monkeypatch)
    assert pull.resolve("hf:user/repo:q8_0") == pull.resolve("hf:user/repo:m-q8_0.gguf") == path
    assert pull.resolve("hf:user/repo") == path  # the only one that is here


def test_what_another_tool_fetched_is_found(server, monkeypatch):
    from huggingface_hub import HfApi

    path = HfApi(endpoint=server.url).hf_hub_download("user/repo", "m-Q4_0.gguf")
    n_asked = len(server.asked)
    assert str(pull.resolve("hf:user/repo:Q4_0")) == path and len(server.asked) == n_asked
    assert hub.find_blob(hub.sha256_of(path)).read_bytes() == OTHER * 2


def test_without_a_quantisation_the_first_of_the_usual_ones_is_taken(server):
    assert pull.resolve("hf:user/repo").name == "m-Q4_0.gguf"


def test_all_parts_of_a_split_model_are_fetched(server, cache):
    first = pull.resolve("hf:user/repo:F16")
    assert first.name.endswith("00001-of-00002.gguf") and files(cache) == [f"m-F16-0000{i}-of-00002.gguf" for i in (1, 2)]
    first.with_name("m-F16-00002-of-00002.gguf").unlink()
    assert hub.find(parse_hf("hf:user/repo:F16")) is None
    assert pull.resolve("hf:user/repo:F16") == first and len(files(cache)) == 2
    del server.files["big/m-F16-00002-of-00002.gguf"]
    shutil.rmtree(cache)
    with pytest.raises(PullError, match="lacks big/m-F16-00002-of-00002.gguf"):
        pull.resolve("hf:user/repo:F16")


def test_a_revision_is_another_model(server, cache):
    path = pull.resolve("hf:user/repo@v1:Q8_0")
    assert path.parent.name == COMMIT["v1"] and hub.find(parse_hf("hf:user/repo:Q8_0")) is None
    assert [(str(name), p) for name, p in hub.cached()] == [("hf:user/repo@v1:Q8_0", path)]
    assert hub.find(parse_hf(f"hf:user/repo@{COMMIT['v1']}:Q8_0")) == path
    with pytest.raises(PullError, match="no branch, tag or commit 'v2'"):
        pull.resolve("hf:user/repo@v2:Q8_0")


def test_an_interrupted_download_goes_on_where_it_stopped(server, cache):
    """The pull is killed in the middle; the next one asks for the rest alone."""
    code = ("import os\nimport huggingface_hub.file_download as d\n"
            "def half(url, temp_file, **kwargs):\n    temp_file.write(b'GGUF weights' * 50_000)\n    temp_file.flush()\n    os._exit(3)\n"
            "d.http_get = half\nfrom sfi_local.store.pull import resolve\nresolve('hf:user/repo:Q8_0')")
    env = {**cli_env(), "HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode == 3
    assert hub.find(parse_hf("hf:user/repo:Q8_0")) is None and len(list(cache.rglob("*.part"))) == 1
    assert pull.resolve("hf:user/repo:Q8_0").read_bytes() == WEIGHTS
    assert [at for _, path, at in server.asked if path.endswith("m-Q8_0.gguf") and at] == ["bytes=600000-"]


def test_a_broken_connection_is_not_the_end(server):
    server.stop_after = 400_000
    assert pull.resolve("hf:user/repo:Q8_0").read_bytes() == WEIGHTS


def test_a_changed_file_is_not_kept(server, cache):
    server.serve_other["m-Q8_0.gguf"] = b"x" * len(WEIGHTS)
    with pytest.raises(PullError, match="instead of"):
        pull.resolve("hf:user/repo:Q8_0")
    assert files(cache) == [] and not [p for p in cache.rglob("blobs/*") if p.stat().st_size]


def test_removing_a_model_leaves_what_others_use(server, cache):
    for name in ("hf:user/repo:Q8_0", "hf:user/repo@v1:Q8_0", "hf:user/repo:Q4_0", "hf:user/repo:F16"):
        pull.resolve(name)
    blob = hub.find(HfName("user/repo", "Q8_0")).resolve()
    gone, n_bytes = pull.remove("hf:user/repo:Q8_0")
    assert [p.name for p in gone] == ["m-Q8_0.gguf"] and n_bytes == len(WEIGHTS) and blob.exists()
    assert pull.remove("hf:user/repo@v1:Q8_0")[1] == len(WEIGHTS) and not blob.exists()
    assert len(pull.remove("hf:user/repo:F16")[0]) == 2 and files(cache) == ["m-Q4_0.gguf"]
    assert pull.remove("hf:user/repo:F16") == ([], 0)


def test_the_names_of_what_is_cached_find_it(server):
    for name in ("Q8_0", "Q8_0_L", "Q4_0", "F16"):
        pull.resolve(f"hf:user/repo:{name}")
    named = hub.cached()
    assert sorted(str(name) for name, _ in named) == [f"hf:user/repo:{q}" for q in ("F16", "Q4_0", "Q8_0", "Q8_0_L")]
    assert all(hub.find(parse_hf(str(name))) == path for name, path in named)


@pytest.mark.parametrize("refuse, word", [
    ((401, "RepoNotFound"), "no repository user/repo"), ((404, "RepoNotFound"), "no repository user/repo"),
    ((403, "GatedRepo"), "asks for a consent"), ((500, ""), "cannot be reached"),
])
def test_what_the_hub_refuses_is_a_sentence(server, cache, refuse, word):
    server.refuse = refuse
    with pytest.raises(PullError, match=word):
        pull.resolve("hf:user/repo:Q8_0")
    assert files(cache) == []


@pytest.mark.parametrize("name, word", [
    ("hf:user/repo:Q2_K", "no single GGUF file for 'Q2_K'.*big/m-F16-00001-of-00002.gguf, m-Q4_0.gguf, m-Q8_0.gguf, m-Q8_0_L.gguf"),
    ("hf:user/other:Q8_0", "no repository user/other"), ("hf:user/-x-:Q8_0", "no name of a repository"),
])
def test_what_is_not_there_is_a_sentence(server, name, word):
    with pytest.raises(PullError, match=word):
        pull.resolve(name)


def test_without_a_network_it_is_a_sentence(monkeypatch):
    gone_offline(monkeypatch)
    with pytest.raises(PullError, match="hub cannot be reached"):
        pull.resolve("hf:user/repo:Q8_0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PullError, match="HF_HUB_OFFLINE"):
        pull.resolve("hf:user/repo:Q8_0")


def test_a_full_disk_is_said_before_the_download(server, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: os.statvfs_result([0] * 10) and type("U", (), {"free": 10})())
    with pytest.raises(PullError, match="10 B free and 1.2 MB are needed"):
        pull.resolve("hf:user/repo:Q8_0")

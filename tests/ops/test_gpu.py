"""What only a GPU can show; where there is none, or the build has no backend for it, these tests say so and are skipped."""

import json
from pathlib import Path

import pytest
from support.programs import check_ran, run_operations
from support.tiny_model import write_tiny

DEPTH, N = 1500, 48
ROWS = ("sketch:policy=sketch,n_selected=64", "frozen:policy=frozen,n_selected=64,n_recent=64")


@pytest.fixture(scope="module")
def gpu(native):
    """The name of the first GPU that computes our operations itself."""
    from sfi_local.binding.devices import devices
    from sfi_local.binding.gpu import gpus

    names = [g.name for g in gpus()]
    able = [d.name for d in devices() if d.name in names and "sketch_scan" in d.native]
    if not able:
        pytest.skip("no GPU with kernels of ours: " + (f"{', '.join(names)} has none" if names else "none is there"))
    return able[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """As `tiny`, with a head size that GPUs have kernels for."""
    return write_tiny(tmp_path_factory.mktemp("gpu") / "tiny64.gguf", n_embd=256, n_ctx=4096)


def test_operations_match_the_reference(gpu):
    check_ran(run_operations(gpu))


def divergences(cli, model: Path, *layers: str) -> dict[str, float]:
    """Mean KL from dense of each row, in nats."""
    rows = [arg for row in ROWS for arg in ("--row", row)]
    done = cli("eval", model, "--depth", DEPTH, "-n", N, "--modes", "dense,stock", *rows, "-o", "json", *layers)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return {row["name"]: row["kld_mean"] for row in json.loads(done.stdout)}


def test_fast_steps_are_as_close_to_dense_as_on_the_cpu(gpu, cli, model):
    on_gpu, on_cpu = divergences(cli, model), divergences(cli, model, "--gpu-layers", "0")
    for row in ("sketch", "frozen"):
        assert on_gpu[row] == pytest.approx(on_cpu[row], rel=0.25, abs=1e-4), (on_gpu, on_cpu)


def test_a_model_that_is_split_between_gpu_and_cpu_is_as_close(gpu, cli, model):
    split, on_cpu = divergences(cli, model, "--gpu-layers", "2"), divergences(cli, model, "--gpu-layers", "0")
    for row in ("sketch", "frozen"):
        assert split[row] == pytest.approx(on_cpu[row], rel=0.25, abs=1e-4), (split, on_cpu)


def test_mode_exact_gives_the_text_of_dense(gpu, cli, model, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    said = {mode: cli("run", model, "-f", "text.txt", "-p", "Go on.", "-n", 64, "--temp", 0, "--mode", mode, "--set", "n_selected=64").stdout
            for mode in ("dense", "exact")}
    assert said["dense"] and said["exact"] == said["dense"]

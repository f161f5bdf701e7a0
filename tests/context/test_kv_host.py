"""K and V in the host's memory beneath layers on a GPU: our CPU operations attend. Where there is no GPU these tests are skipped; a Vulkan
driver in software is one (native/tests/check-vulkan.sh), and so is a device of ggml's RPC backend."""

import json

import numpy as np
import pytest
from support.tiny_model import write_tiny

DEPTH = 700


@pytest.fixture(scope="module")
def gpu_name(native):
    from sfi_local.binding.gpu import gpus

    found = gpus()
    if not found:
        pytest.skip("there is no GPU")
    return found[0].description


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("kv-host") / "tiny64.gguf", n_embd=256, n_ctx=4096)


@pytest.mark.parametrize("policy", ["sketch", "frozen"])
def test_steps_are_those_of_the_cpu_to_rounding(gpu_name, native, model, policy):
    from sfi_local import SfiParams
    from sfi_local.binding.context import load_weights, logits, maker
    from sfi_local.runtime.slot import Slot

    params = SfiParams.of(policy, n_selected=64, n_recent=64)
    tokens = np.random.default_rng(3).integers(0, 256, DEPTH + 24).tolist()
    said = []
    for layers, kv_host in ((0, False), (99, True)):
        weights = load_weights(native.llama_cpp, model, layers, None)
        slot = Slot(maker(weights, 2, kv_host=kv_host), 1024, "sfi", params)
        assert {layer.path for layer in slot.engine.layers()} == {"native"}
        slot.prefill(tokens[:DEPTH])
        rows, kinds = [logits(slot.context, -1).copy()], []
        for token in tokens[DEPTH:]:
            kinds.append(slot.step(token).kind)
            rows.append(logits(slot.context, -1).copy())
        assert "fast" in kinds
        said.append((kinds, np.array(rows)))
        slot.close(), weights.close()
    (kinds, on_cpu), (kinds_too, beside_gpu) = said
    assert kinds == kinds_too
    assert np.median(np.abs(on_cpu - beside_gpu).max(axis=1)) < 0.05 * np.ptp(on_cpu)


def test_a_run_says_where_each_part_is(gpu_name, cli, model, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    ask = ("run", model, "-f", "text.txt", "-p", "Go on.", "-n", 8, "--temp", 0, "--mode", "sfi", "--set", "n_selected=64", "--json")
    said = json.loads(cli(*ask, "--kv-host").stdout)
    assert said["layers_on"] == [gpu_name] and said["kv_on"] == ["CPU"] and said["kernels"] == "native" and said["steps"]["fast"] > 0
    assert said["policy"] == "sketch"  # which this GPU may not have: the CPU attends

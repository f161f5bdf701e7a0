"""The two bindings that are shipped as examples say what C says."""

import sys

import pytest
from support.embedding import ROOT, run, tool, tree

EXAMPLES = ROOT / "native" / "embed" / "examples"


@pytest.mark.parametrize("name, place", [("with_ctypes.py", "lib/libsfi.so.0"), ("with_cffi.py", "")])
def test_a_binding(native, smollm2, name, place):
    tool("cc")
    if name == "with_cffi.py" and sys.version_info >= (3, 12):
        pytest.importorskip("setuptools")  # by which cffi compiles
    done = run(sys.executable, EXAMPLES / name, tree() / place, smollm2, "The capital of France is")
    assert done.returncode == 0 and done.stdout.startswith(" Paris."), done.stderr[-500:]


def test_the_sizes_that_ctypes_is_told_are_those_of_the_library():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import with_ctypes as binding
    finally:
        sys.path.pop(0)
    abi = (ROOT / "native" / "embed" / "abi.txt").read_text(encoding="utf-8")
    for struct, name in ((binding.ModelParams, "llama_model_params"), (binding.ContextParams, "llama_context_params"),
                         (binding.InitParams, "sfi_init_params")):
        assert f"struct {name}: {binding.ctypes.sizeof(struct)} bytes\n" in abi
    assert f"flash_attn_type at {binding.ContextParams.flash_attn_type.offset}\n" in abi

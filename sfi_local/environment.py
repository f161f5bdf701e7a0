"""The variables of the environment that are read, by Python and by the native library; `sfi-local help environment` shows them."""

from __future__ import annotations

# name: what it does
VARIABLES = {
    "SFI_LOCAL_CACHE": "The folder of fetched models and of what was measured once; else that of the system for caches.",
    "SFI_LOCAL_AUTO_DEPTH": "Cells from which mode auto is slow-fast, in the place of a measurement; 0: a rule decides.",
    "SFI_LOCAL_PREFIX_BUDGET": "Bytes that kept prefixes may take, e.g. 20e9; 0: none are kept; else a fifth of the free disk.",
    "SFI_LOCAL_PREFIX_MEMORY": "Bytes of memory for texts that a program may turn back to, e.g. 2e9; 0: none; else a tenth of what is free.",
    "SFI_LOCAL_NO_HISTORY": "1: a chat keeps nothing of what is typed for another day.",
    "SFI_LOCAL_API_KEY": "The key of `serve`, in the place of --api-key, which other users of the machine can see.",
    "SFI_PORTABLE_PATH": "1: supports from ggml's own operations on every device, as where a backend lacks ours; for tests.",
    "SFI_SIMD": "scalar or avx2: the instructions that our operations use, instead of the widest of this CPU; for tests.",
    "XDG_CACHE_HOME": "Where caches are kept on Linux, if SFI_LOCAL_CACHE is not set.",
    "LOCALAPPDATA": "The same on Windows.",
    "NO_COLOR": "Anything: no colours and no bold text.",
    "TERM": "dumb: the same, and no line editing in a chat.",
    "GOMP_SPINCOUNT": "How long idle threads wait for work before they sleep; ours, unless this or OMP_WAIT_POLICY is set.",
}

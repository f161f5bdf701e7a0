"""How fast this machine reads memory: the yardstick for kernels that can do no better than read everything once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

N_BYTES = 320 << 20  # larger than the caches of most machines


def read_bandwidth(n_threads: int, n_bytes: int = N_BYTES, rounds: int = 5) -> float:
    """Bytes per second that n_threads read together from a buffer of n_bytes; the best of several rounds.

    Each thread takes the maximum of its own part, which numpy does without the GIL and faster than memory delivers.
    """
    import numpy as np

    parts = np.array_split(np.ones(n_bytes // 4, dtype=np.int32), n_threads)
    best = 0.0
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, n_bytes / (time.perf_counter() - start))
    return best

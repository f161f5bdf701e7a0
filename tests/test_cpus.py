"""How many threads: affinity, quotas of both kinds of cgroups at every level, unlike cores. On trees that stand for /proc and /sys."""

import os
import subprocess
import sys
import types
import uuid
from pathlib import Path

import pytest
from support.programs import built

from sfi_local import cgroup, cpus, machine

V2 = "31 23 0:28 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n"
V1 = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


@pytest.fixture
def tree(tmp_path):
    """Write files of a system: {path: text} -> the folder that stands for /."""
    def write(files: dict[str, object]) -> str:
        for path, text in files.items():
            place = tmp_path / path.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(f"{text}\n")
        return str(tmp_path)
    return write


def cores(n: int, per_core: int = 1, **of_cpu) -> dict[str, object]:
    """Files of n CPUs; of_cpu: name of a file -> its value for each."""
    files = {}
    for cpu in range(n):
        at = f"/sys/devices/system/cpu/cpu{cpu}"
        first = cpu // per_core * per_core
        files[f"{at}/topology/thread_siblings_list"] = f"{first}-{first + per_core - 1}" if per_core > 1 else cpu
        for name, values in of_cpu.items():
            files[f"{at}/{name.replace('__', '/')}"] = values[cpu]
    return files


def groups(mounts: str, own: str, **values) -> dict[str, object]:
    return {"/proc/self/mountinfo": mounts, "/proc/self/cgroup": own, **{f"/sys/fs/cgroup/{k}": v for k, v in values.items()}}


def chosen(root: str, n: int) -> tuple[int, str]:
    """What Python chooses; of a build with SFI_TESTS=ON, C programs get the same."""
    choice = cpus.choose(root, range(n))
    if in_c := built("sfi-test-cores"):
        done = subprocess.run([in_c, root, *map(str, range(n))], capture_output=True, text=True, check=True)
        assert int(done.stdout) == choice.n
    return choice.n, choice.why


# ---- cores ----------------------------------------------------------------------------------------------------------

def test_threads_of_one_core_count_once(tree):
    n, why = chosen(tree(cores(8, per_core=2)), 8)
    assert n == 4 and "hardware threads of 4 cores" in why


def test_without_any_file_every_cpu_counts(tmp_path):
    assert chosen(str(tmp_path), 6)[0] == 6


INTEL = {**cores(20, per_core=1), **{f"/sys/devices/system/cpu/cpu{c}/topology/thread_siblings_list": f"{c // 2 * 2}-{c // 2 * 2 + 1}"
                                     for c in range(12)}, "/sys/devices/cpu_core/cpus": "0-11", "/sys/devices/cpu_atom/cpus": "12-19"}


def test_performance_cores_before_efficiency_cores(tree):
    n, why = chosen(tree(INTEL), 20)
    assert n == 6 and "12 of 20 CPUs are the fast ones (cpu_core)" in why


def test_a_process_bound_to_efficiency_cores_uses_them(tree):
    root = tree(INTEL)
    assert cpus.choose(root, range(14, 18)).n == 4
    assert cpus.choose(root, [0, 1, 12, 13]).n == 1  # the two threads of one performance core


@pytest.mark.parametrize("file, speeds, n", [
    ("cpu_capacity", [250] * 4 + [1024] * 4, 4),
    ("cpu_capacity", [325] * 3 + [830] * 4 + [1024], 5),   # little, big, prime
    ("cpu_capacity", [1024] * 8, 8),
    ("cpufreq__cpuinfo_max_freq", [1804800] * 4 + [2419200] * 3 + [2841600], 4),
    ("cpufreq__cpuinfo_max_freq", [5000000] * 6 + [5300000] * 2, 8),  # favoured cores are no other kind
])
def test_unlike_cores(tree, file, speeds, n):
    assert chosen(tree(cores(8, **{file: speeds})), 8)[0] == n


@pytest.mark.parametrize("text, numbers", [("0-3,8", {0, 1, 2, 3, 8}), ("5", {5}), ("", set()), ("0-x", set()), (" 1, 2 ", {1, 2})])
def test_lists_of_the_kernel(text, numbers):
    assert cpus.parse_list(text) == numbers


# ---- quotas ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("files, n", [
    (groups(V2, "0::/", **{"cpu.max": "200000 100000"}), 2),
    (groups(V2, "0::/user.slice/run.scope", **{"user.slice/run.scope/cpu.max": "350000 100000", "user.slice/cpu.max": "max 100000"}), 3),
    (groups(V2, "0::/a.slice/b.scope", **{"a.slice/b.scope/cpu.max": "max 100000", "a.slice/cpu.max": "100000 100000"}), 1),
    (groups(V2, "0::/a", **{"a/cpu.max": "50000 100000"}), 1),                    # half a CPU is one thread
    (groups(V2, "0::/../../other", **{"cpu.max": "300000 100000"}), 3),           # of another namespace: what the mount shows
    (groups(V2, "0::/a", **{"a/cpu.max": "max 100000"}), 8),
    (groups(V1, "4:cpu,cpuacct:/docker/x\n0::/", **{"cpu,cpuacct/docker/x/cpu.cfs_quota_us": 250000,
                                                    "cpu,cpuacct/docker/x/cpu.cfs_period_us": 100000}), 2),
    (groups(V1.replace("0:29 /", "0:29 /docker/x"), "4:cpu,cpuacct:/docker/x", **{"cpu,cpuacct/cpu.cfs_quota_us": 100000,
                                                                                  "cpu,cpuacct/cpu.cfs_period_us": 50000}), 2),
    (groups(V1, "4:cpu,cpuacct:/", **{"cpu,cpuacct/cpu.cfs_quota_us": -1, "cpu,cpuacct/cpu.cfs_period_us": 100000}), 8),
    ({"/sys/fs/cgroup/cpu.max": "400000 100000"}, 4),                              # no mountinfo, the usual places
    ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": 100000, "/sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000}, 1),
])
def test_quotas_are_found_at_every_level_and_rounded_down(tree, files, n):
    got, why = chosen(tree({**cores(8), **files}), 8)
    assert got == n and ("quota" in why) == (n < 8)


def test_a_quota_above_the_cores_changes_nothing(tree):
    assert chosen(tree({**cores(2), **groups(V2, "0::/", **{"cpu.max": "800000 100000"})}), 2) == (2, "one per core")


def test_memory_limits_of_both_kinds(tree):
    root = tree(groups(V2, "0::/a/b", **{"a/b/memory.max": "max", "a/b/memory.current": 10, "a/memory.max": 1000, "a/memory.current": 700,
                                         "a/memory.stat": "anon 400\nfile 300\nshmem 100"}))
    assert cgroup.available_memory(root) == 1000 - 700 + 200


def test_a_memory_limit_of_v1_below_the_root(tree):
    root = tree(groups(V1, "9:memory:/x", **{"memory/x/memory.limit_in_bytes": 5000, "memory/x/memory.usage_in_bytes": 3000,
                                             "memory/x/memory.stat": "cache 1\ntotal_cache 1000\ntotal_shmem 0",
                                             "memory/memory.limit_in_bytes": 9223372036854771712, "memory/memory.usage_in_bytes": 0}))
    assert cgroup.available_memory(root) == 3000


def test_the_cache_of_zfs_counts_as_free(monkeypatch):
    texts = {"/proc/meminfo": "MemAvailable: 1000 kB",
             "/proc/spl/kstat/zfs/arcstats": "13 1 0x01 147 39984 1 2\nname type data\nc_min 4 1000000\nsize 4 5000000"}
    monkeypatch.setattr(machine, "read", lambda path: texts.get(path, ""))
    assert machine._meminfo_available() == 1000 * 1024 + 4_000_000


# ---- other systems --------------------------------------------------------------------------------------------------

def test_macos_counts_performance_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(cpus, "usable_cpus", lambda: set(range(10)))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout="8\n"))
    assert cpus.choose(str(tmp_path)).n == 8


def test_windows_counts_cores_not_threads(tmp_path, monkeypatch):
    psutil = types.SimpleNamespace(cpu_count=lambda logical: 12 if logical else 6)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(cpus, "usable_cpus", lambda: set(range(12)))
    monkeypatch.setattr(cpus, "import_psutil", lambda: psutil)
    assert cpus.choose(str(tmp_path)).n == 6
    monkeypatch.setattr(cpus, "import_psutil", lambda: None)
    assert cpus.choose(str(tmp_path)).n == 12


# ---- this machine ---------------------------------------------------------------------------------------------------

ASK = "from sfi_local import cpus; c = cpus.choose(); print(c.n, c.why)"


def ask(start=None) -> str:
    return subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True, preexec_fn=start).stdout


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to a CPU")
def test_a_process_bound_to_one_cpu_has_one_thread():
    first = min(os.sched_getaffinity(0))
    assert ask(lambda: os.sched_setaffinity(0, {first})).startswith("1 ")


def test_a_quota_of_this_machine():
    """In a group made for it, where that is allowed."""
    group = writable_group()
    if group is None:
        pytest.skip("no cgroup with a CPU controller can be made here")
    try:
        if (group / "cpu.max").exists():
            (group / "cpu.max").write_text("100000 100000")
        else:
            (group / "cpu.cfs_quota_us").write_text("150000")
        out = ask(lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
        assert out.startswith("1 ") and (len(os.sched_getaffinity(0)) == 1 or "a cgroup quota allows 1" in out)
    finally:
        group.rmdir()


def writable_group() -> Path | None:
    for parent in cgroup.folders("cpu"):
        group = Path(parent) / f"sfi-test-{uuid.uuid4().hex[:8]}"
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / "cpu.max").exists() or (group / "cpu.cfs_quota_us").exists():
            return group
        group.rmdir()
    return None


def test_prefill_has_the_threads_of_decoding(tiny):
    from sfi_local import SlowFastLlama

    llm = SlowFastLlama(str(tiny), n_ctx=512, n_threads=1)
    assert llm.n_threads == llm.n_threads_batch == 1
    llm.close()
    given = SlowFastLlama(str(tiny), n_ctx=512, n_threads=1, n_threads_batch=2)
    assert given.n_threads_batch == 2
    given.close()


def test_c_programs_get_as_many_on_this_machine():
    if not (in_c := built("sfi-test-cores")):
        pytest.skip("sfi-test-cores is not built; configure with -DSFI_TESTS=ON")
    assert int(subprocess.run([in_c], capture_output=True, text=True, check=True).stdout) == cpus.choose().n

"""What slows a machine down: heat, voltage, clocks and swap, on trees that stand for /proc and /sys; and that doctor says it."""

import pytest

from sfi_local import strain
from sfi_local.cli.doctor import verdict

CPU0 = "sys/devices/system/cpu/cpu0"


@pytest.fixture
def tree(tmp_path):
    """Write files of a system: {path: text} -> the folder that stands for /."""
    def write(files):
        for path, text in files.items():
            place = tmp_path / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(f"{text}\n")
        return str(tmp_path)
    return write


def test_nothing_is_known_of_a_machine_without_files(tmp_path):
    root = str(tmp_path)
    assert (strain.temperature(root), strain.slowed_by(root)) == (None, []) and not strain.swap(root).hurts


def test_the_hottest_sensor_counts_and_broken_ones_do_not(tree):
    zones = {f"sys/class/thermal/thermal_zone{i}/temp": t for i, t in enumerate((61200, 48000, -273000, 999000, "n/a"))}
    assert strain.temperature(tree(zones)) == 61.2


def cooling(kind, now, most):
    return {"sys/class/thermal/cooling_device0/type": kind, "sys/class/thermal/cooling_device0/cur_state": now,
            "sys/class/thermal/cooling_device0/max_state": most}


@pytest.mark.parametrize("kind, now, clauses", [
    ("thermal-cpufreq-0", 3, ["heat: thermal-cpufreq-0 is at 3 of 12: cool it"]), ("Processor", 0, []), ("pwm-fan", 3, [])])
def test_cooling_that_slows_the_cpu(tree, kind, now, clauses):
    assert strain.slowed_by(tree(cooling(kind, now, 12))) == clauses


@pytest.mark.parametrize("bits, said", [("0", []), ("50005", ["too little voltage", "because of heat or voltage"]), ("20000", ["since it was started"]),
                                        ("rubbish", [])])
def test_the_firmware_of_a_raspberry_pi(tree, bits, said):
    clauses = strain.slowed_by(tree({"sys/devices/platform/soc/soc:firmware/get_throttled": bits}))
    assert len(clauses) == len(said) and all(part in clause for part, clause in zip(said, clauses))


def test_a_core_that_slowed_itself_down(tree):
    counts = {f"sys/devices/system/cpu/cpu{i}/thermal_throttle/core_throttle_count": n for i, n in enumerate((0, 17))}
    assert strain.slowed_by(tree(counts)) == ["heat: a core slowed itself down 17 times since the start"]


@pytest.mark.parametrize("files, said", [
    ({"scaling_max_freq": 1500000, "cpuinfo_max_freq": 2400000}, "its clock may reach 1.5 of 2.4 GHz"),
    ({"scaling_governor": "powersave", "scaling_driver": "cpufreq-dt"}, "choose schedutil or performance"),
    ({"scaling_governor": "powersave", "scaling_driver": "intel_pstate"}, ""), ({"scaling_max_freq": 5, "cpuinfo_max_freq": 5}, "")])
def test_clocks_that_are_held_down(tree, files, said):
    cpus = {f"sys/devices/system/cpu/cpu{i}/cpufreq/{name}": value for i in range(4) for name, value in files.items()}
    clauses = strain.slowed_by(tree(cpus))
    assert len(clauses) == bool(said) and all(said in clause for clause in clauses)


def memory(total_kb, free_kb, pressure=None):
    files = {"proc/meminfo": f"MemTotal: 4000000 kB\nSwapTotal: {total_kb} kB\nSwapFree: {free_kb} kB"}
    if pressure is not None:
        files["proc/pressure/memory"] = f"some avg10=0.00 avg60={pressure} avg300=0.00 total=1\nfull avg10=9.00 avg60=9.00 avg300=0.00 total=1"
    return files


@pytest.mark.parametrize("files, hurts", [
    (memory(0, 0), False), (memory(1000, 1000, 50), False), (memory(1000, 900, 0.1), False), (memory(1000, 900, 12.5), True),
    (memory(1000, 900), False), (memory(1000, 300), True)])
def test_swap_hurts_where_something_waits_for_it(tree, files, hurts):
    swap = strain.swap(tree(files))
    assert swap.hurts == hurts and swap.used <= swap.total


def test_doctor_says_what_can_be_done():
    facts = {"library": {"usable": True}, "devices": {"CPU": "sketch native"}, "models": {"fetched": ["m"]},
             "machine": {"slowed_by": ["heat: Processor is at 1 of 3: cool it"], "swapping": True}}
    ready, sentence = verdict(facts)
    assert ready and "the CPU is slowed down: heat: Processor is at 1 of 3: cool it; memory is short and lies on the disk" in sentence

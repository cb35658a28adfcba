"""The cores that a process may use, by its affinity and its cgroups."""

import os

import pytest

import s2a_fx.usable_cores
from s2a_fx.usable_cores import quotas, usable_cores

FILES = {
    1: ("cpu", {"cpu.cfs_quota_us": "{}", "cpu.cfs_period_us": "100000"}, "-1"),
    2: ("", {"cpu.max": "{} 100000"}, "max"),
}


@pytest.mark.parametrize("version", FILES)
def test_a_cgroup_grants_its_quota_of_a_period(version, tmp_path):
    root, files, without = FILES[version]
    line = "3:cpu,cpuacct:/job/step\n" if version == 1 else "0::/job/step\n"
    (tmp_path / "cgroup").write_text("4:memory:/other\n" + line)
    for folder, quota in (("", without), ("job", "150000"), ("job/step", "400000")):
        place = tmp_path / root / folder
        place.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (place / name).write_text(content.format(quota))
    assert list(quotas(tmp_path / "cgroup", tmp_path)) == [4.0, 1.5]
    assert list(quotas(tmp_path / "none", tmp_path)) == []


@pytest.mark.parametrize(("granted", "cores"), [([], 4), ([1.5], 2), ([0.2], 1), ([9.0, 3.0], 3), ([64.0], 4)])
def test_the_least_of_affinity_and_quotas_counts(granted, cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(s2a_fx.usable_cores, "quotas", lambda: granted)
    assert usable_cores() == cores

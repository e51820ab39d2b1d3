"""What is said of the machine that figures come from: its id, its environment, the pins of its libraries."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from stepmark.meter import machine


def test_fingerprint_fields():
    found = machine.fingerprint()
    assert found["cpu"]
    assert found["logical_cores"] >= found["usable_cores"] >= 1
    assert found["ram_gib"] >= 1
    assert found["libraries"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["lock"] == machine.lock_digest()
    text = json.dumps(found).lower()
    for private in (os.uname().nodename, os.path.expanduser("~")):
        assert len(private) < 4 or private.lower() not in text


def test_environment_is_flat_lines():
    lines = machine.environment()
    assert lines["torch"] == machine.fingerprint()["libraries"]["torch"]
    assert lines["cpu"]
    assert all(isinstance(line, str) and "\n" not in line for line in lines.values())
    assert all(key.replace("_", "").isalnum() and key == key.lower() for key in lines)


@pytest.mark.parametrize(
    ("cpu", "cores", "gpus", "slug"),
    [
        ("AMD EPYC 7B13", 2, [], "epyc-7b13-2c"),
        ("AMD EPYC 9654 96-Core Processor", 16, ["NVIDIA H200"], "epyc-9654-16c-h200"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", 4, [], "xeon-4c"),
        ("13th Gen Intel(R) Core(TM) i7-1360P", 16, [], "core-i7-1360p-16c"),
        ("Apple M2 Pro", 10, [], "apple-m2-pro-10c"),
        ("", 8, ["NVIDIA A100-SXM4-80GB"] * 8, "cpu-8c-8x-a100"),
        ("", 8, ["NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA L4"], "cpu-8c-a100-2x-l4"),
        ("", 8, ["NVIDIA H100 80GB HBM3 MIG 1g.10gb"], "cpu-8c-h100-mig-1g-10gb"),
    ],
)
def test_ids_read_well_and_tell_machines_apart(cpu, cores, gpus, slug):
    found = machine.describe(cpu, cores, 64, gpus)
    assert found.rpartition("-")[0] == slug
    assert len(found.rpartition("-")[2]) == 8
    others = [
        machine.describe(cpu + " 2", cores, 64, gpus),
        machine.describe(cpu, cores + 1, 64, gpus),
        machine.describe(cpu, cores, 65, gpus),
        machine.describe(cpu, cores, 64, [*gpus, "NVIDIA L4"]),
    ]
    assert len({found, *others}) == 5


def test_lock_digest_is_of_the_pins_of_this_system(tmp_path):
    lock = Path(machine.__file__).resolve().parents[3] / "requirements.lock"
    here = "".join(f"{pin}\n" for pin in machine.pins(lock))
    assert machine.lock_digest() == hashlib.sha256(here.encode()).hexdigest()
    other = tmp_path / "requirements.lock"
    other.write_text(f"# a remark\n{here}a==1 ; sys_platform == 'nowhere'\nb==2 ; sys_platform == '{sys.platform}'\n")
    assert machine.pins(other) == [*here.split(), "b==2"]

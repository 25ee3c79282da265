"""Machines that are not here: their names, their sizes, and meshes over their devices."""

import re
import subprocess
import sys

import machines
import pytest
from machines import compilable

from moe_jax import topology
from moe_jax.axes import MESH_AXES
from moe_jax.config import MeshConfig, Refused
from moe_jax.topology import GPUS, TPUS, devices, over_slices, parse, topology_mesh

# Sizes as their makers give them: a v4, v5e, v5p or v6e chip is one device, a tpu7x chip two.
SIZES = {
    "v5e:4x4": (16, 16),
    "v5e:1x1": (1, 1),
    "v4:2x2x4": (16, 16),
    "v5p:2x2x2": (8, 8),
    "v5p:8x8x4": (256, 256),
    "v6e:2x4": (8, 8),
    "tpu7x:2x2x1": (8, 8),
    "v5e:4x4*2": (32, 16),
    "v5p:2x2x1*3": (12, 4),
    "a100:4x8": (32, 8),
    "h100:32x8": (256, 8),
    "h200:1x1": (1, 1),
    "b200:8x8": (64, 8),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    topology = parse(name)
    assert (topology.size, topology.fast) == SIZES[name]
    assert str(topology) == name
    assert parse(name.upper()) == topology


@pytest.mark.parametrize("name", compilable(*SIZES))
def test_the_compiler_knows_as_many_devices(name):
    found = devices(parse(name))
    assert len(found) == SIZES[name][0]
    assert {d.platform for d in found} == {parse(name).platform}


WRONG = {
    "v5e": "is not CHIP:SHAPE",
    "v5e:4x": "is not CHIP:SHAPE",
    "v9:2x2": "no known chip: 'v9'\n    remedy: use one of v4, v5e",
    "v7x:2x2x1": "did you mean tpu7x?",
    "h10:1x8": "did you mean h100?",
    "v5e:0x4": "size of 0",
    "v5e:4x4*0": "size of 0",
    "v5e:4x4x4": "has 3 dimensions, and v5e slices have 2\n    remedy: write for example v5e:4x4",
    "v5p:4x4": "has 2 dimensions, and v5p slices have 3",
    "v5e:3x4": "does not divide into hosts of 2x2 chips: 3x4",
    "v5e:32x32": "1024 chips, and the largest v5e slice 256\n    remedy: use several slices, for example v5e:SHAPE*4",
    "h100:8": "has 1 of two numbers\n    remedy: give hosts x GPUs a host, for example h100:1x8",
    "h100:2x8*4": "GPUs have none\n    remedy: count the hosts: h100:8x8",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_names_are_refused(name):
    with pytest.raises(Refused) as e:
        parse(name)
    assert str(e.value).startswith(f"--topology {name}: ") and "\n    remedy: " in str(e.value)
    assert WRONG[name] in str(e.value)


def test_a_missing_compiler_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(topology, "devices", devices.__wrapped__)  # other tests have compiled for these machines
    for name, extra in ("v5e:2x4", "tpu-compiler"), ("h100:1x4", "gpu-compiler"):
        with pytest.raises(Refused, match=rf"not installed[^\n]*\n    remedy: pip install 'moe-jax\[{extra}\]'"):
            topology_mesh(MeshConfig(data=parse(name).size), parse(name))


@pytest.mark.parametrize("name, extra", [("v5e:2x4", "tpu-compiler"), ("h100:1x4", "gpu-compiler")])
def test_where_a_compiler_is_missing_the_skip_says_what_was_not_proved(monkeypatch, name, extra):
    """Elsewhere than where make test installs it; there such a test runs, and fails."""
    monkeypatch.setattr(machines, "INSTALLED", False)
    assert not machines.compilable(name)[0].marks
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    (mark,) = machines.compilable(name)[0].marks
    assert mark.name == "skip"
    assert re.fullmatch(
        rf"NOT PROVED for {name}: the \w+ compiler is not installed.*\. Remedy: .* '\.\[{extra}\]'.*", mark.args[0]
    )
    monkeypatch.setattr(machines, "INSTALLED", True)
    assert machines.compilable(name) == [name]


def test_a_mesh_of_another_size_is_refused():
    with pytest.raises(Refused, match=r"v5e:4x4: has 16 devices, and a mesh of data=2 x expert=4 needs 8"):
        topology_mesh(MeshConfig(data=2, expert=4), parse("v5e:4x4"))


def test_names_need_no_jax():
    code = "import sys; from moe_jax.topology import parse; parse('v5p:8x8x4').size; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    "shape, slices, want",
    [((4, 1, 4, 1), 2, (2, 1, 1, 1)), ((2, 8, 16, 1), 4, (2, 2, 1, 1)), ((1, 3, 4, 2), 6, (1, 3, 2, 1))],
)
def test_slices_lie_along_the_slowest_axes(shape, slices, want):
    assert over_slices(shape, slices) == want


def hosts(grid):
    return {d.process_index for d in grid.flat}


@pytest.mark.parametrize("name", compilable("h100:4x8", "a100:4x8"))
def test_the_fast_axes_of_gpus_lie_inside_a_host(name):
    mesh = topology_mesh(MeshConfig(data=2, fsdp=2, expert=4, tensor=2), parse(name))
    assert mesh.axis_names == MESH_AXES and mesh.devices.shape == (1, 2, 2, 4, 1, 2)
    inside = [hosts(mesh.devices[0, i, j]) for i in range(2) for j in range(2)]
    assert [len(h) for h in inside] == [1] * 4 and len(set.union(*inside)) == 4


@pytest.mark.parametrize("name", compilable("v5e:4x4*2", "v5p:2x4x2*2"))
def test_the_slowest_axis_crosses_slices(name):
    mesh = topology_mesh(MeshConfig(data=4, expert=8), parse(name))
    slices = [{d.slice_index for d in row.flat} for row in mesh.devices[0]]
    assert slices == [{0}, {0}, {1}, {1}]


@pytest.mark.parametrize("name", compilable("v5e:4x4"))
def test_neighbours_of_a_tpu_mesh_are_neighbours_of_the_torus(name):
    mesh = topology_mesh(MeshConfig(data=4, expert=4), parse(name))
    for row in mesh.devices.reshape(4, 4):
        assert len({d.coords[0] for d in row}) == 1 or len({d.coords[1] for d in row}) == 1


def test_memory_is_what_a_program_may_use():
    """Never more than the card's name or the maker's data sheet says."""
    sheet = {"v4": 32, "v5e": 16, "v5p": 96, "v6e": 32, "tpu7x": 96, "a100": 80, "h100": 80, "h200": 141, "b200": 192}
    for chip, kind in {**TPUS, **GPUS}.items():
        assert 0.9 * sheet[chip] * 2**30 <= kind.memory or 0.9 * sheet[chip] * 1e9 <= kind.memory
        assert kind.memory <= sheet[chip] * 2**30

"""Redundant experts: the published example of EPLB, a slow placement expert by expert, and what holds of every one."""

import numpy as np
import pytest

from moe_jax.placement import place


def slow_pack(items, packs):
    """Items `(load, name)` in `packs` lists of equal length: the heaviest first, to the lightest that has room."""
    room, out = len(items) // packs, [[] for _ in range(packs)]
    if room == 1:
        return [[item] for item in items]
    for item in sorted(items, key=lambda item: -item[0]):
        open_ones = [pack for pack in out if len(pack) < room]
        min(open_ones, key=lambda pack: sum(load for load, _ in pack)).append(item)
    return out


def slow_place(load, slots, devices, nodes, groups):
    """The expert in each slot, for the loads [E] of one layer."""
    E, out = len(load), []
    members = [list(range(g * E // groups, (g + 1) * E // groups)) for g in range(groups)]
    by_node = slow_pack([(sum(load[e] for e in m), m) for m in members], nodes)
    for node in by_node:
        experts = [e for _, m in node for e in m]
        replicas = list(experts)
        while len(replicas) < slots // nodes:
            replicas.append(max(experts, key=lambda e: load[e] / replicas.count(e)))
        items = [(load[e] / replicas.count(e), e) for e in replicas]
        out += [e for device in slow_pack(items, devices // nodes) for _, e in device]
    return out


def random_case(rng):
    """Loads and a shape that divides, with ties, zeros and steep loads among them."""
    nodes, per_node, size = rng.integers(1, 4), rng.integers(1, 4), rng.integers(1, 5)
    groups, devices = nodes * rng.integers(1, 4), nodes * per_node
    E = int(groups * size)
    per_device = -(-E // devices) + rng.integers(0, 4)
    load = rng.choice([rng.integers(0, 4, (2, E)), rng.integers(0, 1000, (2, E)), rng.zipf(1.3, (2, E)) % 10**6])
    return load, int(per_device * devices), int(devices), int(nodes), int(groups)


def test_the_published_example(golden):
    """The example of the README of EPLB: 12 experts in 4 groups, 16 slots, 8 GPUs on 2 nodes."""
    case = golden["eplb_readme"]
    shape = case["num_replicas"], case["num_gpus"]
    p = place(case["load"], *shape, nodes=case["num_nodes"], groups=case["num_groups"])
    assert p.physical_to_logical.tolist() == case["phy2log"]
    assert p.logical_to_physical.tolist() == case["log2phy"]
    assert p.count.tolist() == case["count"]
    np.testing.assert_allclose(p.balance(case["load"]).after, case["balancedness"], rtol=1e-12)


def test_500_random_placements():
    """Equal to the slow placement, and every expert, slot, device, group and load is accounted for."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        load, slots, devices, nodes, groups = random_case(rng)
        layers, E = load.shape
        p = place(load, slots, devices, nodes=nodes, groups=groups)
        assert p.count.min() >= 1 and (p.count.sum(1) == slots).all()
        assert p.physical_to_logical.shape == (layers, slots) and slots % devices == 0
        after = p.balance(load).after
        for layer in range(layers):
            expert = p.physical_to_logical[layer]
            np.testing.assert_array_equal(np.bincount(expert, minlength=E), p.count[layer])
            for e, places in enumerate(p.logical_to_physical[layer]):
                assert (places >= 0).sum() == p.count[layer, e]
                assert sorted(places[places >= 0]) == np.flatnonzero(expert == e).tolist()
            node, group = np.arange(slots) * nodes // slots, expert * groups // E
            assert all(len(set(node[group == g])) == 1 for g in range(groups))
            slow = slow_place(load[layer].tolist(), slots, devices, nodes, groups)
            assert expert.tolist() == slow
            work = [sum(load[layer, e] / slow.count(e) for e in part) for part in np.split(np.array(slow), devices)]
            assert after[layer] == pytest.approx(load[layer].sum() / devices / max(work) if max(work) else 1.0)


def test_zipf_loads_are_even_to_a_percent():
    """58 layers of 256 experts, as DeepSeek-V3 has them, 288 slots on 32 devices; the README has these figures."""
    rng = np.random.default_rng(0)
    load = np.stack([rng.permutation(1e6 / np.arange(1, 257)) for _ in range(58)])
    before, after = place(load, 288, 32).balance(load)
    assert before.mean() == pytest.approx(0.17, abs=0.02)
    assert after.mean() == pytest.approx(0.995, abs=0.004)
    busiest = max(load[0, 8 * d : 8 * d + 8].sum() for d in range(32))  # the experts in order, 8 a device
    assert before[0] == pytest.approx(load[0].sum() / 32 / busiest)


def test_balance_before_and_after_by_hand():
    """Loads 6, 2, 1, 1 on two devices: 8 beside 2; with two more slots 2+2+1 on both."""
    p = place(np.array([[6, 2, 1, 1], [0, 0, 0, 0]]), 6, 2)
    before, after = p.balance(np.array([[6, 2, 1, 1], [0, 0, 0, 0]]))
    assert before.tolist() == [5 / 8, 1.0] and after.tolist() == [1.0, 1.0]
    assert p.count[0].tolist() == [3, 1, 1, 1]  # twice the first expert: 6 is more than 2, and so is 3


@pytest.mark.parametrize(
    "load,slots,devices,more,words",
    [
        (np.ones((1, 8)), 7, 7, {}, "7 slots do not hold 8 experts: give 8 or more"),
        (np.ones((1, 8)), 10, 4, {}, "10 slots do not divide over 4 devices"),
        (np.ones((1, 8)), 12, 3, {"nodes": 2}, "3 devices do not divide over 2 nodes"),
        (np.ones((1, 8)), 8, 4, {"groups": 3}, "8 experts do not divide over 3 groups"),
        (np.ones((1, 8)), 8, 4, {"nodes": 4, "groups": 2}, "2 groups do not divide over 4 nodes.*global policy"),
        (np.ones((1, 8)), 8, 0, {}, "devices is 0"),
        (np.ones(8), 8, 4, {}, r"load is \[8\]: give the choices of each expert"),
        (np.array([[1.0, -1.0]]), 2, 1, {}, "negative or non-finite"),
        (np.array([[1.0, np.nan]]), 2, 1, {}, "negative or non-finite"),
    ],
)
def test_what_does_not_fit_is_refused(load, slots, devices, more, words):
    with pytest.raises(ValueError, match=words):
        place(load, slots, devices, **more)


def test_loads_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"load is \[1, 4\], and the placement has \[1, 8\] experts"):
        place(np.ones((1, 8)), 8, 4).balance(np.ones((1, 4)))

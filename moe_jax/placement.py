"""Which expert lives where: redundant experts, placed by their loads so that every device has about the same work.

The policies of EPLB, the load balancer published with DeepSeek-V3 (DeepSeek-AI 2024, section 3.4). Hierarchical: groups
of experts go to nodes, so that a router limited to groups stays within few nodes; in each node the busiest experts get
more replicas, and the replicas go to its devices. Global: the same with one node and one group. Pure NumPy.
"""

from typing import NamedTuple

import numpy as np


class Balance(NamedTuple):
    """Mean over maximum load of the devices by layer, [layers]: 1 is perfect, 1/devices is one device doing all."""

    before: np.ndarray  # without replicas, the experts in order
    after: np.ndarray


class Placement(NamedTuple):
    """Slots are counted device by device: device d holds those from d * slots/devices on."""

    physical_to_logical: np.ndarray  # [layers, slots], the expert in each slot
    logical_to_physical: np.ndarray  # [layers, E, most], the slots of each expert, padded with -1
    count: np.ndarray  # [layers, E], replicas of each expert
    devices: int

    def balance(self, load: np.ndarray) -> Balance:
        """How even these loads [layers, E] are over the devices, each expert's tokens shared by its replicas.

        A layer without any load counts as balanced. Experts that do not divide over the devices: the first ones have
        one more, before.
        """
        load = checked(load)
        if load.shape != self.count.shape:
            raise ValueError(f"load is {list(load.shape)}, and the placement has {list(self.count.shape)} experts")
        share = np.take_along_axis(load / self.count, self.physical_to_logical, 1)  # [layers, slots]
        alone = [part.sum(1) for part in np.array_split(load, self.devices, axis=1)]
        return Balance(evenness(np.stack(alone, 1)), evenness(share.reshape(len(load), self.devices, -1).sum(2)))


def evenness(load: np.ndarray) -> np.ndarray:
    """Mean over maximum, [layers, devices] -> [layers]; 1 where there is no load."""
    most = load.max(1)
    return np.divide(load.mean(1), most, out=np.ones(len(load)), where=most > 0)


def checked(load: np.ndarray) -> np.ndarray:
    """Loads as float64 [layers, E]."""
    load = np.asarray(load, np.float64)
    if load.ndim != 2 or not load.size:
        raise ValueError(f"load is {list(load.shape)}: give the choices of each expert, [layers, E]")
    if not (np.isfinite(load).all() and (load >= 0).all()):
        raise ValueError("load holds negative or non-finite numbers: give counts of choices")
    return load


def check_shape(experts: int, slots: int, devices: int, nodes: int, groups: int) -> None:
    """Refuse what does not divide, with the numbers and what would."""
    for name, n in (("slots", slots), ("devices", devices), ("nodes", nodes), ("groups", groups)):
        if n < 1:
            raise ValueError(f"{name} is {n}: give 1 or more")
    if slots < experts:
        raise ValueError(f"{slots} slots do not hold {experts} experts: give {experts} or more")
    even = "every device holds as many slots, every node as many devices and groups"
    pairs = (("slots", slots, "devices", devices), ("devices", devices, "nodes", nodes))
    for what, n, over, m in (*pairs, ("experts", experts, "groups", groups), ("groups", groups, "nodes", nodes)):
        if n % m:
            remedy = "; nodes=1 with groups=1 is the global policy" if m in (nodes, groups) else ""
            raise ValueError(f"{n} {what} do not divide over {m} {over}: {even}; give a multiple of {m} {what}{remedy}")


def packed(load: np.ndarray, packs: int) -> np.ndarray:
    """Place of each of n items in `packs` packs of n / packs, [..., n] -> [..., n]: pack * (n / packs) + rank in it.

    The heaviest item first, each into the lightest pack with room; of equal items and of equal packs the first.
    """
    rows, n = load.shape
    room = n // packs
    if room == 1:  # one item each: they keep their order
        return np.broadcast_to(np.arange(n), load.shape)
    here = np.arange(rows)
    weight, filled, place = np.zeros((rows, packs)), np.zeros((rows, packs), int), np.empty((rows, n), int)
    for item in np.argsort(-load, axis=1, kind="stable").T:  # [rows]
        pack = np.where(filled < room, weight, np.inf).argmin(1)
        place[here, item] = pack * room + filled[here, pack]
        weight[here, pack] += load[here, item]
        filled[here, pack] += 1
    return place


def replicated(load: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Replicas of the experts of each row: every further one to whom has the most load a replica, at ties the first.

    Returns:
        expert [rows, slots] and which replica of it [rows, slots], originals first, and replicas of each [rows, n].
    """
    rows, n = load.shape
    here = np.arange(rows)
    expert, rank = np.tile(np.arange(n), (rows, 1)), np.zeros((rows, n), int)
    count, more = np.ones((rows, n), int), []
    for _ in range(slots - n):
        busiest = (load / count).argmax(1)  # [rows]
        more.append((busiest, count[here, busiest]))
        count[here, busiest] += 1
    if more:
        extra, its_rank = (np.stack(part, 1) for part in zip(*more, strict=True))
        expert, rank = np.concatenate([expert, extra], 1), np.concatenate([rank, its_rank], 1)
    return expert, rank, count


def inverse(places: np.ndarray) -> np.ndarray:
    """Who stands at each place, of permutations [..., n]."""
    return np.argsort(places, axis=-1)


def place(load: np.ndarray, slots: int, devices: int, *, nodes: int = 1, groups: int = 1) -> Placement:
    """Experts with replicas in `slots` slots on `devices` devices, by their loads.

    Args:
        load: [layers, E], choices of each expert, such as sums of a run's `load`.
        slots: of all devices together, E or more; what is beyond E are replicas.
        nodes, groups: hierarchical policy: the E / groups experts of a group stay within one node. 1 and 1: global.
    Raises:
        ValueError: numbers that do not divide, fewer slots than experts, or loads that are none.
    """
    load = checked(load)
    layers, E = load.shape
    check_shape(E, slots, devices, nodes, groups)
    # Experts in the order of their nodes: a group keeps its members together
    where = packed(load.reshape(layers, groups, -1).sum(2), nodes)  # [layers, groups]
    ordered = inverse(where)[..., None] * (E // groups) + np.arange(E // groups)  # [layers, groups, members]
    ordered = ordered.reshape(layers * nodes, E // nodes)
    # Each node on its own: replicas, then devices
    own = np.take_along_axis(load, ordered.reshape(layers, E), 1).reshape(ordered.shape)
    expert, rank, count = replicated(own, slots // nodes)  # [layers*nodes, slots/nodes]
    share = np.take_along_axis(own / count, expert, 1)
    slot = inverse(packed(share, devices // nodes))
    expert, rank = np.take_along_axis(expert, slot, 1), np.take_along_axis(rank, slot, 1)
    # Back to the experts' own numbers
    physical = np.take_along_axis(ordered, expert, 1).reshape(layers, slots)
    counts, rank = np.empty((layers, E), int), rank.reshape(layers, slots)
    np.put_along_axis(counts, ordered.reshape(layers, E), count.reshape(layers, E), 1)
    logical = np.full((layers, E, counts.max()), -1)
    logical[np.arange(layers)[:, None], physical, rank] = np.arange(slots)
    return Placement(physical, logical, counts, devices)

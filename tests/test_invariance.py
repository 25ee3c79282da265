"""The invariance battery: one answer to a train step, whatever the mesh, schedule and dispatcher.

Loss, every gradient, counts and moves of the selection bias of each cell are held against a float64 oracle that shares
no code with the library, for each method of balancing: over meshes, microbatches, remat, scan, padding and dispatchers.
Faults planted in the library show that the battery sees them.
"""

import functools
import itertools

import invariance
import pytest
from faults import FAULTS

CELLS, EVALUATIONS, PROGRAMS = invariance.cells(), invariance.evaluations(), invariance.programs()
QUICK = {
    invariance.Program("data=2,expert=2,tensor=2", 2, "dots", True, "noisy_topk", "ragged"),
    invariance.Evaluation("expert=4,tensor=2", "noisy_topk", "ragged"),
}
build = functools.lru_cache(maxsize=4)(invariance.build)


def marked(cells: list[invariance.Cell]) -> list:
    """All cells but those of two programs are slow tests."""
    return [pytest.param(c, marks=() if c.program in QUICK else pytest.mark.slow, id=str(c)) for c in cells]


def test_the_battery_is_whole():
    """At least 200 cells, and every two settings of different kinds meet in some program."""
    assert len(set(CELLS)) == len(CELLS) >= 200 and {c.program for c in CELLS + EVALUATIONS} >= QUICK
    kinds = [set(column) for column in zip(*PROGRAMS, strict=True)]
    assert [len(k) for k in kinds] == [10, 3, 4, 2, 4, 4]
    for a, b in itertools.combinations(range(len(kinds)), 2):
        assert {(p[a], p[b]) for p in PROGRAMS} == set(itertools.product(kinds[a], kinds[b]))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name, monkeypatch):
    """A cell agrees with the oracle, and with the fault it differs in what the fault changes and in nothing else."""
    fault = FAULTS[name]
    assert fault.cell in CELLS + EVALUATIONS
    program, *setting = fault.cell
    want = invariance.answer(fault.cell)
    invariance.agree(build(program)(*setting), want)
    fault.plant(monkeypatch)
    got = invariance.build(program)(*setting)
    with pytest.raises(AssertionError, match=f"^differ in {fault.differ}:"):
        invariance.agree(got, want)


@pytest.mark.parametrize("cell", marked(EVALUATIONS))
def test_evaluation_is_deterministic_and_the_same_everywhere(cell):
    """Cross entropy and counts: those of the oracle without noise, dropless."""
    program, *setting = cell
    invariance.agree(build(program)(*setting), invariance.answer(cell))


@pytest.mark.parametrize("cell", marked(CELLS))
def test_a_step_is_the_same_however_it_is_run(cell):
    """Loss, gradients, counts and biases: the oracle's, so the same in all cells."""
    program, *setting = cell
    invariance.agree(build(program)(*setting), invariance.answer(cell))

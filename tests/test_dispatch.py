"""Dispatchers against loops over choices: buffers, results and every gradient, for any routing that can be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from moe_jax.capacity import Slots
from moe_jax.dispatch import DISPATCHERS
from moe_jax.routing import Routing

D = 5


def random_case(G, S, E, K, C, seed=0):
    """A routing with free choices: distinct experts of a token, slots with holes, choices without a slot."""
    rng = np.random.default_rng(seed)
    if K == E:  # experts choose: every expert is listed, few are valid
        expert = np.broadcast_to(np.arange(E), (G, S, E)).copy()
    else:
        expert = np.argsort(rng.random((G, S, E)), -1)[..., :K]
    valid = rng.random((G, S, K)) < (0.8 if K < E or E < 3 else 2 / E)
    valid[:, -1] = False  # a masked token
    position, kept = np.full((G, S, K), -7), np.zeros((G, S, K), bool)
    free = {(g, e): list(rng.permutation(C)) for g in range(G) for e in range(E)}
    for g, s, k in zip(*np.nonzero(valid), strict=True):
        slots = free[g, expert[g, s, k]]
        if slots:
            position[g, s, k], kept[g, s, k] = slots.pop(), True
    gate = np.where(kept, rng.uniform(0.1, 1, (G, S, K)), 0)
    prob = jnp.zeros((G, S, E))
    routing = Routing(jnp.asarray(expert, jnp.int32), jnp.zeros((G, S, K)), jnp.asarray(valid), prob, prob)
    return routing, Slots(jnp.asarray(position, jnp.int32), jnp.asarray(kept), jnp.asarray(gate, jnp.float32))


def by_loops(routing, slots, C, x, scale):
    """Buffers and results, slot by slot, in float64; an expert multiplies by `scale` [E, C]."""
    x, scale = np.asarray(x, np.float64), np.asarray(scale, np.float64)
    G, S, K = routing.expert.shape
    E = routing.prob.shape[-1]
    buffers, y = np.zeros((E, G, C, D)), np.zeros((G, S, D))
    dx, dgate = np.zeros_like(y), np.zeros((G, S, K))
    for g, s, k in zip(*np.nonzero(np.asarray(slots.kept)), strict=True):
        e, c, w = int(routing.expert[g, s, k]), int(slots.position[g, s, k]), float(slots.gate[g, s, k])
        buffers[e, g, c] = x[g, s]
        y[g, s] += w * scale[e, c] * x[g, s]
        # of the sum of squares of y, below
        dgate[g, s, k] = scale[e, c] * x[g, s].sum()
        dx[g, s] += w * scale[e, c]
    return buffers, y, dx, dgate


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(name, C, routing, slots, x, scale):
    plan, dispatch, combine, _ = DISPATCHERS[name]

    def result(x, gate):
        tables = plan(routing, slots._replace(gate=gate), C, x.dtype)
        buffers = dispatch(x, tables)
        y = combine(buffers * scale[:, None, :, None].astype(x.dtype), tables)
        return y.astype(jnp.float32).sum(), (buffers, y)

    (_, (buffers, y)), (dx, dgate) = jax.value_and_grad(result, argnums=(0, 1), has_aux=True)(x, slots.gate)
    return buffers, y, dx, dgate


SHAPES = {  # G, S, E, K, C
    "top-2": (2, 12, 4, 2, 5),
    "primes": (3, 7, 5, 3, 2),
    "one expert": (1, 6, 1, 1, 6),
    "two experts": (2, 5, 2, 2, 3),
    "all experts": (2, 9, 8, 8, 2),
    "dropless": (1, 11, 8, 2, 11),
    "one token": (2, 1, 8, 1, 4),
    "128 experts": (2, 17, 128, 4, 1),
    "128 choose": (2, 13, 128, 128, 1),
    "2048 experts": (1, 19, 2048, 2, 1),
}


CASES = [(shape, "float32") for shape in SHAPES] + [("top-2", "bfloat16"), ("all experts", "bfloat16")]


@pytest.mark.parametrize("name", DISPATCHERS)
@pytest.mark.parametrize("shape,dtype", CASES)
def test_equals_loops(shape, name, dtype):
    """Buffers exactly; results, token gradients and gate gradients to rounding. Empty slots hold zeros."""
    G, S, E, K, C = SHAPES[shape]
    routing, slots = random_case(G, S, E, K, C)
    assert E < 3 or not bool(slots.kept.all()), "the test needs choices without a slot"
    x = jax.random.normal(jax.random.key(0), (G, S, D)).astype(dtype)
    scale = jax.random.uniform(jax.random.key(1), (E, C), minval=0.5)
    got = run(name, C, routing, slots, x, scale)
    want = by_loops(routing, slots, C, x, scale)
    assert got[0].dtype == got[1].dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(got[0], np.float64), want[0])
    for g, w, what in zip(got[1:], want[1:], ("result", "token gradient", "gate gradient"), strict=True):
        scale_of = max(np.abs(w).max(), 1e-9)
        limit = (1e-6 if dtype == "float32" else 0.02) * scale_of
        kept_only = np.asarray(slots.kept) if what == "gate gradient" else np.ones(w.shape, bool)
        assert np.abs((np.asarray(g, np.float64) - w)[kept_only]).max(initial=0) <= limit, what


def equations(jaxpr):
    """Every equation of a traced program, those of its inner programs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def test_gather_needs_no_one_hot():
    """No array of the program, forward or backward, has S*E*C or S*K*E numbers; rows are gathered, never scattered."""
    G, S, E, K, C = 1, 64, 32, 2, 5
    routing, slots = random_case(G, S, E, K, C)
    x, scale = jnp.ones((G, S, D)), jnp.ones((E, C))
    program = jax.make_jaxpr(functools.partial(run.__wrapped__, "gather", C))(routing, slots, x, scale)
    found = list(equations(program.jaxpr))
    assert max(v.aval.size for eqn in found for v in eqn.outvars) <= max(E * C, S * K) * D < S * K * E
    assert [e.outvars[0].aval.dtype for e in found if e.primitive.name.startswith("scatter")] == [jnp.int32]

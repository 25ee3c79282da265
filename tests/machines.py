"""Machines that are not here, as parameters of tests that compile for them."""

import pytest

from moe_jax.topology import missing_compiler, parse


def compilable(*names):
    """A case for each topology, skipped with the reason where its compiler is not installed."""
    out = []
    for name in names:
        why = missing_compiler(parse(name).platform)
        out.append(pytest.param(name, marks=pytest.mark.skipif(why is not None, reason=why or "")))
    return out

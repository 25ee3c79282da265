"""Machines that are not here, as parameters of tests that compile for them."""

import platform
import sys

import pytest

from moe_jax.topology import missing_compiler, parse

# Where both compilers have packages the development extra installs them. A case never skips there: without its
# compiler it fails, with what to install, so that no skip can hide that a proof was not made.
PACKAGED = sys.platform == "linux" and platform.machine() == "x86_64"


def compilable(*names):
    """A case for each topology, skipped with the reason only on systems that its compiler is not made for."""
    reasons = {name: None if PACKAGED else missing_compiler(parse(name).platform) for name in names}
    return [
        name
        if why is None
        else pytest.param(name, marks=pytest.mark.skip(f"{why}, and has no package for this system"))
        for name, why in reasons.items()
    ]

"""Machines that are not here, as parameters of tests that compile for them."""

import platform
import sys

import pytest

from moe_jax.topology import missing_compiler, parse

# Where the development extra installs both compilers. A case never skips there: without its compiler it fails, with
# what to install, so that no skip can hide that a proof was not made.
INSTALLED = sys.platform == "linux" and platform.machine() == "x86_64"


def compilable(*names):
    """A case for each topology; elsewhere one whose compiler is missing is skipped, with why and what to install."""
    reasons = {name: None if INSTALLED else missing_compiler(parse(name).platform) for name in names}
    return [name if why is None else pytest.param(name, marks=skipped(name, why)) for name, why in reasons.items()]


def skipped(name, why):
    """Not proved here: the summary of a run says which program, why, and how to have it proved."""
    here = f"{sys.platform} {platform.machine()}"
    remedy = "install that extra if it has a package for it, or run the tests on Linux x86_64, where none is skipped"
    return pytest.mark.skip(f"{name} is not compiled: {why}, which make test does not install on {here}: {remedy}")

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
    """The summary of a run says for which program nothing was proved, why, and the remedy."""
    here = f"{sys.platform} {platform.machine()}"
    found = f"nothing was proved for {name}: {why}; make test installs it on Linux x86_64 alone, and this is {here}"
    remedy = f"install that extra if it has a package for {here}, or test on Linux x86_64"
    return pytest.mark.skip(f"{found}. Remedy: {remedy}")

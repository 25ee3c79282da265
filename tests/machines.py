"""Machines that are not here, as parameters of tests that compile for them."""

import platform
import sys

import pytest

from moe_jax.topology import COMPILERS, missing_compiler, parse

# Where the development extra installs both compilers. A case never skips there: without its compiler it fails, with
# what to install, so that no skip can hide that a proof was not made.
INSTALLED = sys.platform == "linux" and platform.machine() == "x86_64"


def compilable(*names):
    """A case for each topology; elsewhere one whose compiler is missing is skipped, with why and what to install."""
    return [name if INSTALLED else pytest.param(name, marks=absent(name)) for name in names]


def absent(name):
    """No mark where the compiler is here; else a skip, by which a run ends with what was not proved, and the remedy."""
    platform_of = parse(name).platform
    if (why := missing_compiler(platform_of)) is None:
        return ()
    install = f"python -m pip install -e '.[{COMPILERS[platform_of][1]}]'"
    here = f"there may be none for {sys.platform} {platform.machine()}, where make test does not install it"
    remedy = f"{install} ({here}), or make test on Linux x86_64, which installs it and skips no machine"
    return pytest.mark.skip(f"NOT PROVED for {name}: {why}. Remedy: {remedy}")

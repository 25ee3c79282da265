"""Libraries that tests hold ours against. Where the development extra installs them no test skips for want of one."""

import platform
import sys
from importlib.util import find_spec

import pytest

# There is no torch for Macs with Intel processors, and the extra leaves it out there.
INSTALLED = sys.platform != "darwin" or platform.machine() == "arm64"


def require(*packages):
    """Fail without one of these packages, or, where there may be none, skip; both say what is not proved."""
    if not (missing := [name for name in packages if find_spec(name) is None]):
        return
    why = f"NOT PROVED against {' and '.join(packages)}: {' and '.join(missing)} missing. "
    why += "Remedy: python -m pip install -e '.[dev]'"
    if INSTALLED:
        pytest.fail(why, pytrace=False)
    here = f"which has no torch for {sys.platform} {platform.machine()}"
    pytest.skip(f"{why}, {here}, or make test on Linux, which skips none of these")

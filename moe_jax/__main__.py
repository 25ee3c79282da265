"""`python -m moe_jax` is `moe-jax`."""

import sys

from moe_jax.cli import main

sys.exit(main())

"""`python -m moe_jax` is `moe-jax`."""

from moe_jax.cli import entry

entry()

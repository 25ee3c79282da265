"""`moe-jax plan`: what a config costs, from formulas on the config alone. No arrays, no devices, no JAX."""

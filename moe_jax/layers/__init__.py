"""Flax NNX layers: each holds parameters with logical axes and calls the pure functions of the library."""

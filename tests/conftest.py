"""Eight fake CPU devices for every test, set before JAX starts; strict promotion; one compile cache."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Compiling is most of the test time: leave out costly passes of the code generator, none of the partitioner.
os.environ["XLA_FLAGS"] = "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def golden():
    """Small routing cases with their answers, computed in float64 by brute force."""
    import json

    return json.loads((Path(__file__).parent / "golden" / "routing.json").read_text())

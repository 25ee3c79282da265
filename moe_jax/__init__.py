"""Sharded mixture-of-experts transformers in JAX/Flax. The public names; each is imported when it is first used."""

from importlib import import_module
from typing import Any

_HOME = {
    "Config": "schema",
    "ConfigError": "schema",
    "EncoderConfig": "schema",
    "LatentConfig": "schema",
    "MeshConfig": "schema",
    "ModelConfig": "schema",
    "MoEConfig": "schema",
    "Refused": "schema",
    "RopeConfig": "schema",
    "RouterConfig": "schema",
    "load": "config",
    "Rules": "axes",
    "constrain": "rules",
    "place": "rules",
    "build_mesh": "mesh",
    "balance_loss": "balance",
    "router_loss": "balance",
    "updated_bias": "balance",
    "z_loss": "balance",
    "MoELayer": "layers.moe",
    "Transformer": "model",
    "Trained": "trained",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moe_jax' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"moe_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__

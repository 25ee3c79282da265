"""Rates of rotary positions against NumPy in float64, published bounds, and transformers where it is installed."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ConfigError, LatentConfig, ModelConfig, RopeConfig, from_dict
from moe_jax.layers.positions import RATES, rotary

proved_by_transformers = pytest.mark.usefixtures("transformers")

GPT_OSS = RopeConfig("yarn", factor=32.0, original_length=4096, truncate=False)
DEEPSEEK = RopeConfig("yarn", factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0)
LONG = {"kind": "longrope", "factor": 4.0, "original_length": 8}
LONG |= {"short_factors": (1.25,) * 16, "long_factors": tuple(2.0 + i for i in range(16))}
LITE = RopeConfig("yarn", factor=40.0, original_length=4096, mscale=0.9, mscale_all_dim=0.707)
ROPES = {
    "linear": (RopeConfig("linear", factor=4.0), 16, 1e4),
    "GPT-OSS": (GPT_OSS, 64, 150000.0),
    "DeepSeek-V3": (DEEPSEEK, 64, 10000.0),
    "two scales": (LITE, 64, 10000.0),
    "a narrow ramp": (RopeConfig("yarn", factor=8.0, original_length=64, beta_fast=4.0, beta_slow=3.5), 32, 500.0),
    "a factor given": (RopeConfig("yarn", factor=8.0, original_length=64, attention_factor=1.25), 32, 500.0),
    "bounds outside": (RopeConfig("yarn", factor=2.0, original_length=8, beta_fast=64.0, beta_slow=0.001), 8, 50.0),
}


def rates(rope, width, theta, length=1):
    """Rate by rate in float64: divided by one number, or one of each pair's, which another `length` of a row changes,
    or by a pair's place on the ramp between those that turn beta_fast and beta_slow times."""
    plain = [theta ** (-2 * i / width) for i in range(width // 2)]
    if rope.kind == "linear":
        return [r / rope.factor for r in plain]
    if rope.kind == "longrope":
        by = rope.long_factors if length > rope.original_length else rope.short_factors
        return [r / f for r, f in zip(plain, by, strict=True)]
    # theta^(-2d/N) L = 2 pi beta, solved for d
    fast, slow = (
        -math.log(2 * math.pi * beta / rope.original_length) / math.log(theta) * width / 2
        for beta in (rope.beta_fast, rope.beta_slow)
    )
    fast, slow = (math.floor(fast), math.ceil(slow)) if rope.truncate else (fast, slow)
    fast, slow = max(fast, 0), min(slow, width - 1)
    out = []
    for i, r in enumerate(plain):
        slowed = 0.0 if i <= fast else 1.0 if i >= slow else (i - fast) / (slow - fast)
        out.append(r / rope.factor * slowed + r * (1 - slowed))
    return out


@pytest.mark.parametrize("name", ROPES)
def test_rates(name):
    rope, width, theta = ROPES[name]
    np.testing.assert_allclose(RATES[rope.kind](width, theta, rope), rates(rope, width, theta), rtol=1e-12)


def test_the_bounds_of_deepseek_v3():
    """Of its 32 pairs those up to 10 keep their rate and those from 23 on turn 40 times slower."""
    slowed = 10000.0 ** (-np.arange(32) / 32) / RATES["yarn"](64, 10000.0, DEEPSEEK)
    np.testing.assert_allclose(slowed[:11], 1.0)
    np.testing.assert_allclose(slowed[23:], 40.0)
    assert (np.diff(slowed[10:24]) > 0).all()


def test_the_two_ways_of_yarns_temperature():
    """On sine and cosine of all pairs, or, where a part of each latent key turns, on the score."""
    assert GPT_OSS.turned == pytest.approx(0.1 * math.log(32) + 1)
    assert DEEPSEEK.turned == 1.0
    assert LITE.turned == pytest.approx((0.09 * math.log(40) + 1) / (0.0707 * math.log(40) + 1))
    latent = ModelConfig(head_dim=128, heads=128, d_model=7168, latent=LatentConfig(1536, 512, 64), rope=DEEPSEEK)
    assert latent.score_scale == pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(192))
    assert ModelConfig(head_dim=64, rope=DEEPSEEK).score_scale == 1 / 8  # keys that turn as a whole, as transformers do
    assert RopeConfig("linear", factor=8.0).turned == 1.0


@pytest.mark.parametrize("name, fraction", [("GPT-OSS", 1.0), ("linear", 0.5), ("DeepSeek-V3", 0.25)])
def test_what_turns(name, fraction):
    """The first numbers of a head, in pairs half of them apart; the others stay."""
    rope, width, theta = ROPES[name]
    rope = RopeConfig(**vars(rope) | {"fraction": fraction})
    x, positions = (
        np.random.default_rng(0).normal(size=(2, 3, 5, width)).astype(np.float32),
        np.arange(10).reshape(2, 5),
    )
    got = np.asarray(rotary(jnp.asarray(x), jnp.asarray(positions), theta, rope))
    turned = int(width * fraction)
    turn = rope.turned * np.exp(1j * positions[:, None, :, None] * np.array(rates(rope, turned, theta)))
    z = (x[..., : turned // 2] + 1j * x[..., turned // 2 : turned]) * turn
    np.testing.assert_allclose(got[..., :turned], np.concatenate([z.real, z.imag], -1), atol=1e-5)
    np.testing.assert_array_equal(got[..., turned:], x[..., turned:])


REFUSED = [
    ({"rope": {"kind": "longrope", "factor": 2.0}}, ["original_length", "short_factors", "long_factors"], "needs it"),
    ({"rope": LONG | {"short_factors": (1.0,)}}, "rope.short_factors", "has 1 numbers, and 16 pairs of a head turn"),
    ({"rope": LONG | {"fraction": 0.5}}, ["short_factors", "long_factors"], "has 16 numbers, and 8 pairs"),
    ({"rope": LONG | {"factor": None}}, "rope.attention_factor", "is unset, and so is factor"),
    ({"rope": LONG | {"attention_factor": 1.2}}, "rope.factor", "is 4, and longrope reads it only where"),
    ({"rope": LONG | {"original_length": 1}}, "rope.original_length", "is 1, from whose logarithm"),
    ({"rope": LONG | {"truncate": False}}, "rope.truncate", "kind=longrope has none"),
    ({"rope": {"kind": "linear", "factor": 2.0, "long_factors": (1.0,)}}, "rope.long_factors", "kind=linear has none"),
    ({"rope": {"kind": "yarn", "factor": 4.0}}, "rope.original_length", "kind=yarn needs it"),
    ({"rope": {"kind": "linear"}}, "rope.factor", "kind=linear needs it"),
    ({"rope": {"factor": 4.0}}, "rope.factor", "kind=plain has none"),
    ({"rope": {"kind": "linear", "factor": 2.0, "truncate": False}}, "rope.truncate", "kind=linear has none"),
    ({"rope": {"fraction": 0.3}}, "rope.fraction", "0.3 of a head of 32 are no pairs"),
    ({"rope": {"fraction": 0.5}, "latent": {}}, "rope.fraction", "of latent keys latent.rotary turns"),
    ({"rope": {"fraction": 0.5}, "positions": "learned"}, "rope.fraction", "learned positions do not turn"),
    ({"rope": vars(GPT_OSS) | {"beta_slow": 40.0}}, "rope.beta_fast", "is 32, not above beta_slow=40"),
    ({"rope": vars(GPT_OSS) | {"mscale": 1.0}}, "rope.mscale_all_dim", "set both, or none"),
    ({"rope": vars(DEEPSEEK) | {"attention_factor": 1.5}}, "rope.attention_factor", "would give the same factor"),
    ({"rope": vars(GPT_OSS), "rope_theta": 1.0}, "rope_theta", "set it above 1"),
]


@pytest.mark.parametrize("keys, key, words", REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_refused(keys, key, words):
    keys["rope"] = {k: v for k, v in keys["rope"].items() if v is not None}
    with pytest.raises(ConfigError) as e:
        from_dict({"model": keys})
    keys = [f"model.{key}"] if isinstance(key, str) else [f"model.rope.{k}" for k in key]
    assert [p.key for p in e.value.problems] == keys and words in str(e.value)


# transformers


def parameters(rope, theta):
    """The same as `rope_parameters` of a config of transformers."""
    names = {
        "kind": "rope_type",
        "original_length": "original_max_position_embeddings",
        "fraction": "partial_rotary_factor",
    }
    given = {names.get(k, k): v for k, v in vars(rope).items() if v is not None}
    return given | {"rope_theta": theta}


@proved_by_transformers
@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rates_are_those_of_transformers(name, fraction):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope, width, theta = ROPES[name]
    rope = RopeConfig(**vars(rope) | {"fraction": fraction})
    cfg = LlamaConfig(
        hidden_size=4 * width,
        num_attention_heads=4,
        head_dim=width,
        max_position_embeddings=int(rope.factor) * (rope.original_length or 64),
        rope_parameters=parameters(rope, theta),
    )
    want, factor = ROPE_INIT_FUNCTIONS[rope.kind](cfg, "cpu")
    np.testing.assert_allclose(RATES[rope.kind](int(width * fraction), theta, rope), want.numpy(), rtol=2e-6)
    assert rope.turned == pytest.approx(factor)


@proved_by_transformers
@pytest.mark.parametrize("scales", [{}, {"attention_factor": 1.5, "factor": None}, {"factor": 0.5}], ids=str)
@pytest.mark.parametrize("length", [8, 9])
def test_longrope_is_that_of_transformers(length, scales):
    """On both sides of the length of the first training, which the row alone decides; the other row is a short one."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = RopeConfig(**LONG | scales)
    names = {"kind": "rope_type", "original_length": "original_max_position_embeddings"}
    names |= {"short_factors": "short_factor", "long_factors": "long_factor"}
    given = {names.get(k, k): list(v) if isinstance(v, tuple) else v for k, v in (LONG | scales).items()}
    given = {k: v for k, v in given.items() if v is not None} | {"rope_theta": 1e4}
    cfg = LlamaConfig(hidden_size=32, num_attention_heads=1, max_position_embeddings=32, rope_parameters=given)
    x = np.random.default_rng(0).normal(size=(2, 1, length, 32)).astype(np.float32)
    positions = jnp.asarray([range(length), [0] * length])
    got = rotary(jnp.asarray(x), positions, 1e4, rope, positions.max(1) >= rope.original_length)
    for row, n in enumerate((length, 1)):
        rate, factor = ROPE_INIT_FUNCTIONS["longrope"](cfg, seq_len=n)
        angle = np.asarray(positions[row])[:, None] * rate.numpy()
        z = (x[row, 0, :, :16] + 1j * x[row, 0, :, 16:]) * np.exp(1j * angle) * factor
        np.testing.assert_allclose(got[row, 0], np.concatenate([z.real, z.imag], -1), atol=2e-6)


@proved_by_transformers
@pytest.mark.parametrize("version", [2, 3])
def test_scores_of_deepseek_are_scaled_as_in_transformers(version):
    from transformers.models import deepseek_v2, deepseek_v3

    module, Config = (
        (deepseek_v2.modeling_deepseek_v2.DeepseekV2Attention, deepseek_v2.DeepseekV2Config),
        (deepseek_v3.modeling_deepseek_v3.DeepseekV3Attention, deepseek_v3.DeepseekV3Config),
    )[version - 2]
    sizes = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "kv_lora_rank": 6, "q_lora_rank": None}
    cfg = Config(hidden_size=16, num_attention_heads=2, **sizes, rope_parameters=parameters(LITE, 1e4))
    m = ModelConfig(d_model=16, heads=2, head_dim=8, latent=LatentConfig(None, 6, 4), rope=LITE)
    assert m.score_scale == pytest.approx(module(cfg, 0).scaling)


@proved_by_transformers
def test_pairs_of_neighbours_are_ours_with_other_columns():
    """DeepSeek turns (x[2i], x[2i+1]): the same scores, once the columns that make x lie as ours."""
    import torch
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

    q, k = np.random.default_rng(0).normal(size=(2, 1, 2, 5, 8)).astype(np.float32)
    angle = np.arange(5)[:, None] * np.array(rates(DEEPSEEK, 8, 1e4))
    angle = torch.tensor(np.concatenate([angle, angle], -1)[None], dtype=torch.float32)
    theirs = apply_rotary_pos_emb_interleave(torch.tensor(q), torch.tensor(k), angle.cos(), angle.sin())
    order = np.concatenate([np.arange(0, 8, 2), np.arange(1, 8, 2)])
    ours = [rotary(jnp.asarray(x[..., order]), jnp.arange(5)[None], 1e4, DEEPSEEK) for x in (q, k)]
    scores = [np.einsum("bhln,bhmn->bhlm", *(np.asarray(x) for x in pair)) for pair in (ours, theirs)]
    np.testing.assert_allclose(*scores, atol=1e-5)

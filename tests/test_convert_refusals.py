"""What `moe-jax convert` refuses, each with the name of the file and the tensor, and nothing written; and failures."""

import contextlib
import json
import os
import shutil

import damage
import numpy as np
import published
import pytest
from commands import check_refusal, listing
from damage import INDEX, change, cut_in_two, header, rewrite, truncated
from published import GOLDEN

from moe_jax.convert import families, load, save
from moe_jax.convert.names import NameMap, Part, Rule
from moe_jax.refused import Problem, Refused

pytestmark = pytest.mark.usefixtures("inside")

GATE = "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.3.w2.weight"


@pytest.fixture
def folder(tmp_path):
    """A copy of the Mixtral of the reference files."""
    shutil.copytree(GOLDEN / "mixtral", tmp_path / "source")
    return tmp_path / "source"


DAMAGE = {
    **damage.usual(GATE, EXPERT),
    "a cut header": (lambda f: truncated(f, 300), ["model.safetensors", "300 bytes"]),
    "an empty file": (lambda f: truncated(f, 0), ["model.safetensors", "0 bytes"]),
    "an expert that no file has": (lambda f: rewrite(f, lambda t: t.pop(EXPERT)), [EXPERT, "[16, 12]"]),
    "fewer experts in the config": (
        lambda f: change(f / "config.json", num_local_experts=3, num_experts_per_tok=2),
        [".experts.3.", "not of this model", "[4, 16]", "[3, 16]"],
    ),
    "more experts in the config": (
        lambda f: change(f / "config.json", num_local_experts=5),
        [".experts.4.", "missing", "[5, 16]"],
    ),
    "more layers in the config": (
        lambda f: change(f / "config.json", num_hidden_layers=3),
        ["model.layers.2.", "missing"],
    ),
    "another width in the config": (
        lambda f: change(f / "config.json", intermediate_size=24),
        ["[12, 16]", "[24, 16]"],
    ),
    "an index that leads out": (
        lambda f: cut_in_two(f, lambda chart: chart.update({GATE: "../part-0.safetensors"})),
        [GATE, "'../part-0.safetensors'"],
    ),
    "an index with an absolute path": (
        lambda f: cut_in_two(f, lambda chart: chart.update({GATE: str(f / "part-0.safetensors")})),
        [GATE, "no .safetensors file of this folder"],
    ),
    "an index with a tensor of no file": (
        lambda f: cut_in_two(f, lambda chart: chart.update({"model.more": "part-1.safetensors"})),
        ["part-1.safetensors", "model.more"],
    ),
    "a file that is missing": (lambda f: (cut_in_two(f), (f / "part-1.safetensors").unlink()), ["part-1.safetensors"]),
    "two answers": (lambda f: (f / INDEX).write_text("{}"), ["both model.safetensors and"]),
    "no weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ["pickle"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "list"]),
    "a header that is no JSON": (lambda f: header(f, lambda h: "{"), ["model.safetensors", "header"]),
    "a header of no numbers": (lambda f: header(f, lambda h: h[GATE].update(shape=[1e999, 4])), ["header"]),
    "a name twice": (lambda f: header(f, lambda h: json.dumps(h)[:-1] + ',"lm_head.weight":{}}'), ["twice"]),
    "tensors that overlap": (
        lambda f: header(f, lambda h: h[GATE].update(data_offsets=h[EXPERT]["data_offsets"])),
        [GATE, "lies at bytes"],
    ),
    "a type of number that is not known": (lambda f: header(f, lambda h: h[GATE].update(dtype="I64")), [GATE, "I64"]),
    "an unknown family": (
        lambda f: change(f / "config.json", model_type="mixtrl"),
        ["'mixtrl'", "mixtral", "qwen3_moe"],
    ),
    "another scaling": (
        lambda f: change(f / "config.json", rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0}),
        ["rope_parameters", "'llama3'", "yarn"],
    ),
    "another scaling in the older form": (
        lambda f: change(f / "config.json", rope_parameters=None, rope_scaling={"type": "dynamic"}, rope_theta=1e4),
        ["rope_scaling", "'dynamic'"],
    ),
    "YaRN without its factor": (
        lambda f: change(f / "config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        ["rope_parameters.factor: is missing"],
    ),
    "a number of another scaling": (
        lambda f: change(
            f / "config.json", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "mscale": 1.0}
        ),
        ["rope_parameters.mscale", "linear positions have no such number"],
    ),
    "half of YaRN's scales": (
        lambda f: change(
            f / "config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "mscale": 1.0}
        ),
        ["model.rope.mscale_all_dim", "is unset"],
    ),
    "no base of the positions": (lambda f: change(f / "config.json", rope_parameters=None), ["rope_theta", "missing"]),
    "no window": (lambda f: change(f / "config.json", sliding_window=0), ["sliding_window", "is 0"]),
    "another activation": (lambda f: change(f / "config.json", hidden_act="gelu"), ["hidden_act", "'gelu'"]),
    "two things at once": (
        lambda f: change(f / "config.json", vocab_size=None, num_attention_heads="4"),
        ["vocab_size: is missing", "num_attention_heads: is '4'"],
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name, folder, tmp_path, call):
    damage.refused(*DAMAGE[name], folder, tmp_path, call)


def test_the_folder_cut_in_two_is_the_same(folder):
    """So that the damage above is the damage."""
    cut_in_two(folder)
    found = load.opened(folder, folder / "run")
    assert len(found.source.tensors) == len(found.names.tensors) and not found.unused


PHI_LONG = published.LONG | published.SCALES
DENSE = {"mlp_only_layers": [1], "num_hidden_layers": 4}
EXPERTS = dict.fromkeys(published.CASES, "num_local_experts")
EXPERTS |= dict.fromkeys(("qwen2_moe", "olmoe", "switch_transformers"), "num_experts")
EXPERTS |= dict.fromkeys(("deepseek_v2", "deepseek_v3"), "n_routed_experts")
FAMILY_DAMAGE = [
    ("qwen3_moe", DENSE, ["mlp_only_layers", "the layers 1 of 4 dense"]),
    ("qwen3_moe", {"attention_bias": True}, ["missing", "self_attn.q_proj.bias [24]"]),
    ("qwen3_moe", {"num_hidden_layers": 2**70}, ["num_hidden_layers", "1 to 4096"]),
    *((kind, {name: 2**16 + 1}, [name, "65537", "1 to 65536"]) for kind, name in EXPERTS.items()),
    ("qwen3_moe", {"mlp_only_layers": 1}, ["mlp_only_layers", "list"]),
    ("qwen3_moe", {"model_type": ["qwen3_moe"]}, ["model_type"]),
    ("gpt_oss", {"layer_types": "full_attention"}, ["layer_types", "list"]),
    ("gpt_oss", {"layer_types": ["full_attention"]}, ["layer_types", "1 entries for 2 layers"]),
    ("gpt_oss", {"rope_parameters": {"rope_type": ["yarn"]}}, ["rope_parameters", "'yarn'"]),
    ("mixtral", {"attention_bias": True}, ["attention_bias"]),
    ("phimoe", {"num_experts_per_tok": 3}, ["num_experts_per_tok", "is 3", "SparseMixer takes two"]),
    ("phimoe", {"router_jitter_noise": 0}, ["router_jitter_noise", "is 0"]),
    ("phimoe", {"lm_head_bias": False}, ["not of this model", "lm_head.bias [40] F32"]),
    ("phimoe", {"rope_parameters": published.YARN | published.SCALES}, ["rope_parameters", "'yarn'", "longrope"]),
    ("phimoe", {"rope_parameters": published.LONG}, ["short_mscale: is missing", "long_mscale: is missing"]),
    ("phimoe", {"rope_parameters": PHI_LONG | {"factor": 2.0}}, ["rope_parameters.factor", "no such number"]),
    ("phimoe", {"rope_parameters": PHI_LONG | {"short_factor": [1, 1, 2]}}, ["short_factors", "has 3 numbers"]),
    ("phimoe", {"rope_parameters": PHI_LONG | {"long_factor": [1.0, 0]}}, ["rope_parameters.long_factor[1]: is 0"]),
    ("phimoe", {"rope_parameters": PHI_LONG | {"long_factor": None}}, ["rope_parameters.long_factor: is missing"]),
    ("mixtral", {"rope_parameters": PHI_LONG}, ["rope_parameters.long_mscale", "no such number"]),
    ("deepseek_v3", {"rms_norm_eps": 1e-5}, ["rms_norm_eps", "1e-05", "1e-06"]),
    ("deepseek_v3", {"scoring_func": "softmax"}, ["scoring_func", "'softmax'"]),
    ("deepseek_v3", {"moe_layer_freq": 2}, ["moe_layer_freq"]),
    ("deepseek_v3", {"topk_group": 9}, ["topk_groups", "9 groups of 4"]),
    ("deepseek_v3", {"num_local_experts": 9}, ["n_routed_experts=8", "num_local_experts=9"]),
    ("deepseek_v2", {"norm_topk_prob": True}, ["norm_topk_prob"]),
    ("qwen2_moe", {"shared_expert_intermediate_size": 0}, ["shared_expert_intermediate_size", "is 0"]),
    ("qwen2_moe", {"layer_types": ["sliding_attention"] * 2}, ["sliding_window", "layer_types"]),
    ("qwen2_moe", {"qkv_bias": False}, ["not of this model", "self_attn.q_proj.bias [16] F32"]),
    ("olmoe", {"clip_qkv": 0}, ["clip_qkv", "is 0", "above 0"]),
    ("gpt_oss", {"quantization_config": {"quant_method": "gptq"}}, ["config.json", "'gptq'", "bfloat16"]),
    ("gpt_oss", {"attention_bias": False}, ["attention_bias"]),
    ("gpt_oss", {"swiglu_limit": 8.0}, ["swiglu_limit", "8.0"]),
    ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "0 of 2"]),
    ("gpt_oss", {"layer_types": ["chunked_attention"] * 2}, ["layer_types", "'chunked_attention'"]),
    ("granitemoe", {"residual_multiplier": 0}, ["residual_multiplier", "is 0"]),
    ("granitemoeshared", {"shared_intermediate_size": 0}, ["not of this model", "shared_mlp.input_linear"]),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, ["topk_method"]),
]


@pytest.mark.parametrize(("family", "fields", "needles"), FAMILY_DAMAGE)
def test_what_a_family_cannot_keep(family, fields, needles, tmp_path):
    shutil.copytree(GOLDEN / family, tmp_path / "source")
    change(tmp_path / "source" / "config.json", **fields)
    with pytest.raises(Refused) as e:
        load.opened(tmp_path / "source", tmp_path / "run")
    assert all(needle in str(e.value) for needle in needles), e.value


def test_known_tensors_of_no_use_are_told(folder):
    """Tables of rotary frequencies in older files; they are ignored by name, and no others."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda t: t.update({name: np.ones(2, np.float32)}))
    assert load.opened(folder, folder / "run").unused == [name]


def test_folders_that_hold_something(folder, tmp_path, call):
    """Neither an import nor an export writes into what is there."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    argv = ["convert", "import", folder]
    assert call(*argv, tmp_path / "run", "data.length=8")[0] == 0
    before = listing(tmp_path)
    check_refusal(*call(*argv, tmp_path / "full"), "convert", "WORKDIR: ", "letter.txt")
    check_refusal(*call(*argv, tmp_path / "run"), "convert", "holds a run already")
    check_refusal(*call("convert", "export", tmp_path / "run", tmp_path / "full"), "convert", "DST", "holds something")
    check_refusal(*call("convert", "export", tmp_path / "full", tmp_path / "new"), "convert", "moe_jax.json")
    check_refusal(
        *call("convert", "export", tmp_path / "run", tmp_path / "new", "--shard-gb", 0), "convert", "--shard-gb"
    )
    check_refusal(*call("convert", "export", tmp_path / "run", tmp_path / "new", "a=1"), "convert", "changes no key")
    assert listing(tmp_path) == before


def test_a_target_that_is_a_link_or_a_disk(folder, tmp_path, call, monkeypatch):
    """A link to an empty folder is followed and stays one; a mount point is refused before anything is read."""
    run, place, link = (tmp_path / name for name in ("run", "place", "link"))
    assert call("convert", "import", folder, run, "data.length=8")[0] == 0
    place.mkdir()
    link.symlink_to(place)
    with monkeypatch.context() as m:
        m.setattr(os.path, "ismount", lambda path: str(path) == str(place))
        answer = call("convert", "export", run, link)
        check_refusal(*answer, "convert", "DST", str(place), "mounted", str(place / "model"))
    code, report, err = call("convert", "export", run, link, "--json")
    assert code == 0 and report["target"] == str(link), err
    assert link.is_symlink() and (place / "model.safetensors").is_file()


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_half_way_leaves_nothing(there, folder, tmp_path, call, monkeypatch):
    """The disk fails while weights are read, and while they are written."""
    run, out = tmp_path / "a" / "run", tmp_path / "b" / "out"
    assert call("convert", "import", folder, tmp_path / "good", "data.length=8")[0] == 0
    if there:
        run.mkdir(parents=True)
        out.mkdir(parents=True)
    before = set(listing(tmp_path))

    def fail(*_):
        raise OSError(5, "Input/output error", "a file")

    with monkeypatch.context() as m:
        m.setattr(load, "widened", fail)
        code, _, err = call("convert", "import", folder, run, "data.length=8")
    assert code == 1 and "Input/output error" in err
    assert set(listing(tmp_path)) == before
    with monkeypatch.context() as m:
        m.setattr(save, "narrowed", fail)
        code, _, err = call("convert", "export", tmp_path / "good", out)
    assert code == 1 and set(listing(tmp_path)) == before


def test_a_lost_race_leaves_the_winner_alone(folder, tmp_path, monkeypatch):
    """Another import claims the folder between the look at it and the lock; and one that is through by then."""
    run, claim = tmp_path / "a" / "run", load.claim_workdir

    def beaten(path):
        claim(path)
        holding.enter_context(load.locked(path))
        (path / "config.toml").write_text("theirs")

    with contextlib.ExitStack() as holding, monkeypatch.context() as m:
        m.setattr(load, "claim_workdir", beaten)
        with pytest.raises(Refused, match="another run is using"):
            load.run(folder, run, ["data.length=8"])
        assert set(listing(run)) == {"config.toml", "moe_jax.json"}

    def late(path):
        beaten(path)
        (path / "metrics.jsonl").write_text("")
        holding.close()

    holding = contextlib.ExitStack()
    monkeypatch.setattr(load, "claim_workdir", late)
    with pytest.raises(Refused, match=r"WORKDIR: .* holds a run already"):
        load.run(folder, run, ["data.length=8"])
    assert set(listing(run)) == {"config.toml", "metrics.jsonl", "moe_jax.json"}


def test_a_folder_that_cannot_be_claimed(folder, tmp_path, monkeypatch):
    """The refusal itself is told, and the folders on the way are gone."""
    before = listing(tmp_path)

    def full(path):
        path.parent.mkdir(parents=True)
        raise Refused(Problem("--workdir", "no space left", "use another"))

    monkeypatch.setattr(load, "claim_workdir", full)
    with pytest.raises(Refused, match="no space left"):
        load.run(folder, tmp_path / "a" / "b" / "run", ["data.length=8"])
    assert listing(tmp_path) == before


def test_what_a_killed_import_left_is_no_obstacle(folder, tmp_path, call):
    """Its folder holds no complete checkpoint: no command opens it, and the same import fills it."""
    run = tmp_path / "run"
    assert call("convert", "import", folder, run, "data.length=8")[0] == 0
    whole = set(listing(run))
    (run / "checkpoints" / "0" / "complete.json").unlink()
    check_refusal(*call("convert", "export", run, tmp_path / "out"), "convert", "no complete checkpoint")
    assert call("convert", "import", folder, run, "data.length=8")[0] == 0
    assert {name for name in listing(run) if "/d/" not in name} == {name for name in whole if "/d/" not in name}
    assert call("convert", "export", run, tmp_path / "out")[0] == 0


def test_maps_that_leave_parameters_out(folder):
    """A family whose rules do not fill a model is stopped, not its parameters left at what memory held."""
    found = load.opened(folder, folder / "run")
    rules = families.FAMILIES["mixtral"].names(found.cfg.model)
    with pytest.raises(Refused, match=r"1 of 13 parameters .* first stacks.0.blocks.0.ffn.router \[2, 16, 4\]"):
        NameMap(found.model, [r for r in rules if "gate.weight" not in r.source])
    with pytest.raises(Refused, match=r"1 of 13 .*ffn\.router"):
        NameMap(found.model, [*rules, Rule("model.layers.{layer}.again", Part("ffn.router", "f d -> d f"))])


def test_float16_that_would_overflow(folder, tmp_path, call):
    rewrite(folder, lambda t: t[GATE].fill(1e5))
    assert call("convert", "import", folder, tmp_path / "run", "data.length=8")[0] == 0
    answer = call("convert", "export", tmp_path / "run", tmp_path / "out", "--dtype", "float16", "--quiet")
    check_refusal(*answer, "convert", GATE, "100000")
    assert not (tmp_path / "out").exists()

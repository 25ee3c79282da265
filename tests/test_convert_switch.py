"""Switch Transformers: which layers have experts, the tokens that are dropped, embeddings under several names, damages,
and the text that a decoder begins by itself."""

import shutil
from dataclasses import replace

import damage
import numpy as np
import published
import pytest
from commands import write_text
from damage import change, rewrite
from published import GOLDEN, needs_torch
from test_convert import tensors

from moe_jax import config
from moe_jax.convert import load, save
from moe_jax.convert.families import family_of, model_keys
from moe_jax.convert.names import NameMap
from moe_jax.convert.switch import SHARED, TABLES, sparse_layers
from moe_jax.data import load_tokenizer
from moe_jax.train.state import Model

pytestmark = pytest.mark.usefixtures("inside")

FAMILY = "switch_transformers"
ROUTER = "encoder.block.1.layer.1.mlp.router.classifier.weight"
EXPERT = "decoder.block.1.layer.2.mlp.experts.expert_3.wo.weight"


@pytest.fixture
def folder(tmp_path):
    """A copy of the model of the reference files."""
    shutil.copytree(GOLDEN / FAMILY, tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("layers", range(1, 8))
def test_which_layers_have_experts(layers, transformers):
    """Those of transformers' own stacks, for each number that is asked for."""
    import torch

    kinds = transformers.models.switch_transformers.modeling_switch_transformers
    for asked in range(layers + 2):
        fields = published.SWITCH | {"num_layers": layers, "num_sparse_encoder_layers": asked}
        with torch.device("meta"):
            stack = kinds.SwitchTransformersStack(transformers.SwitchTransformersConfig(**fields))
        want = [i for i, block in enumerate(stack.block) if block.is_sparse]
        assert list(sparse_layers(layers, asked)) == want


def test_the_published_model():
    """The parameters that the hub lists of google/switch-base-8, and a tensor each of its own name."""
    about = published.SWITCH | {"model_type": FAMILY, "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072}
    about |= {"num_layers": 12, "num_decoder_layers": 12, "num_heads": 12, "num_experts": 8}
    about |= {"num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6}
    model = Model.of(config.from_dict({"model": model_keys(about), "data": {"length": 8}}))
    assert model.count()[0] == 619_339_008
    assert {name: shape for name, shape, _ in model.leaves()} == {
        name: shape for name, shape, _ in Model.of(config.load("switch_base_8")).leaves()
    }
    count = 1 + 2 * 2 + 12 * (2 + 4) + 12 * (3 + 8) + 2 * (6 * 2 + 6 * (1 + 8 * 2))
    assert len(NameMap(model, family_of(about)[1].names(model.cfg.model)).tensors) == count


DAMAGE = {
    **damage.usual(ROUTER, EXPERT),
    "another number of experts": (lambda f: change(f / "config.json", num_experts=5), [".expert_4.", "missing"]),
    "other sparse layers": (
        lambda f: change(f / "config.json", num_sparse_encoder_layers=4),
        ["encoder.block.0.layer.1.mlp.router.classifier.weight [4, 16]", "not of this model"],
    ),
    "embeddings that are not tied": (
        lambda f: change(f / "config.json", tie_word_embeddings=False),
        ["missing", TABLES["encoder"], TABLES["decoder"], "lm_head.weight [40, 16]"],
    ),
    "a copy that is none": (
        lambda f: rewrite(f, lambda t: t.update({TABLES["encoder"]: t[SHARED] + np.float32(1e-7)})),
        [TABLES["encoder"], SHARED, "tie_word_embeddings"],
    ),
    "a gate": (lambda f: change(f / "config.json", dense_act_fn="gated-gelu"), ["dense_act_fn", "'gated-gelu'"]),
    "activations": (lambda f: change(f / "config.json", dense_act_fn=["relu"]), ["dense_act_fn", "['relu']"]),
    "a router in bfloat16": (lambda f: change(f / "config.json", router_dtype="bfloat16"), ["router_dtype"]),
    "a negative loss": (lambda f: change(f / "config.json", router_z_loss_coef=-1), ["router_z_loss_coef", "is -1"]),
    "layers without end": (
        lambda f: change(f / "config.json", num_decoder_layers=2**40),
        ["num_decoder_layers", "1 to 4096"],
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name, folder, tmp_path, call):
    damage.refused(*DAMAGE[name], folder, tmp_path, call)


def test_further_names_of_a_tied_table(folder):
    """Older files hold it up to four times; equal ones are told, and are of no use."""
    names = [*TABLES.values(), "lm_head.weight"]
    rewrite(folder, lambda t: t.update({name: t[SHARED].copy() for name in names}))
    assert sorted(load.opened(folder, folder / "run").unused) == sorted(names)


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_that_are_not_tied(dtype, tmp_path, call):
    """Three tables, and a fourth that is read by nobody: it comes back as it was, or is a copy where none came."""
    published.build(FAMILY, 1, tmp_path / "source", dtype)
    assert call("convert", "import", tmp_path / "source", tmp_path / "run", "data.length=8")[0] == 0
    code, report, err = call("convert", "export", tmp_path / "run", tmp_path / "out", "--json")
    assert code == 0 and report["dtype"] == dtype, err
    want, got = tensors(tmp_path / "source"), tensors(tmp_path / "out")
    assert {n: (x.dtype, x.shape) for n, x in got.items()} == {n: (x.dtype, x.shape) for n, x in want.items()}
    assert all(got[n].tobytes() == want[n].tobytes() for n in want)
    assert not np.array_equal(got[SHARED], got[TABLES["decoder"]]), "a table of its own"
    shutil.rmtree(tmp_path / "run" / "published")
    code, _, err = call("convert", "export", tmp_path / "run", tmp_path / "own", "--quiet")
    assert code == 0, err
    own = tensors(tmp_path / "own")
    assert own.keys() == want.keys() and np.array_equal(own[SHARED], own[TABLES["decoder"]])


def test_capacity(folder):
    """A number of tokens comes as the least capacity and drops nothing; a model of ours goes out with what it has."""
    m = load.opened(folder, folder / "run", ["data.length=8"]).cfg.model
    assert (m.moe.min_capacity, m.moe.eval_capacity_factor, m.max_length) == (64, None, 64)
    assert save.described(m, FAMILY)["expert_capacity"] == 64  # as many as a row has
    bounded = replace(m, moe=replace(m.moe, min_capacity=4, eval_capacity_factor=1.25))
    assert save.described(bounded, FAMILY)["expert_capacity"] == 20  # 1.25 * 64 tokens / 4 experts


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGH .,"  # with three special tokens, 40 ids
PROMPTS = ["abc", "a longer prompt, to be read as one.", "x", "Go on.<one>and on"]


def with_tokenizer(folder):
    """tokenizer.json as T5 has it: padding is 0, `</s>` is 1 and comes after a text, and there are further tokens."""
    from tokenizers import AddedToken, Tokenizer, models, processors

    made = Tokenizer(models.BPE({"<pad>": 0, "</s>": 1, "<one>": 2} | {c: i + 3 for i, c in enumerate(LETTERS)}, []))
    made.add_special_tokens([AddedToken(t, normalized=False) for t in ("<pad>", "</s>", "<one>")])
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


@needs_torch
@pytest.mark.parametrize("number", [0, 1])
def test_generate_is_that_of_transformers(number, tmp_path, call):
    """Greedy, from an imported folder by command: the encoder reads all of a prompt and its end, the decoder begins
    with the padding and ends with `</s>`. Prompts of unequal length share a batch here. There is no cache there, which
    in that release takes no decoder of more layers than the encoder has."""
    import torch
    import transformers

    source, run, text = tmp_path / "source", tmp_path / "run", write_text(tmp_path)
    model = published.build(FAMILY, number, source)
    if number == 1:  # a token that three of the prompts lead to, some sooner, is the end
        with torch.no_grad():
            model.lm_head.weight[[1, 6]] = model.lm_head.weight[[6, 1]]
        model.save_pretrained(source)
    made = transformers.PreTrainedTokenizerFast(tokenizer_file=with_tokenizer(source))
    code, report, err = call("convert", "import", source, run, f"data.path={text}", "data.length=8", "--json")
    assert code == 0 and report["text"], err
    assert config.load(str(run / "config.toml")).model.encoder.start == 0
    prompts = [word for text in PROMPTS for word in ("--prompt", text)]
    code, out, err = call("generate", run, *prompts, "--temperature", 0, "--tokens", 24, "--json")
    assert code == 0, err
    want, ends = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([made(prompt).input_ids])
        assert ids[0, -1] == 1
        new = model.generate(ids, max_new_tokens=24, do_sample=False, use_cache=False)[0]
        assert new[0] == 0
        ends.append(len(new) if new[-1] == 1 else None)
        want.append(made.decode(new, skip_special_tokens=True))
    assert out["texts"] == want
    assert number == 0 or (len(set(ends)) == 4 and None in ends), "texts end after another number of tokens each"


def test_a_sentencepiece_model_as_t5_has_it(folder, tmp_path, call):
    """spiece.model comes along; a prompt is its pieces and the end of a text."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    text = write_text(tmp_path)
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    lines = iter([text.read_text()[i : i + 200] for i in range(0, 20000, 200)])
    stem = str(folder / "spiece")
    SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=stem, vocab_size=40, minloglevel=2, **ids)
    code, report, err = call(
        "convert", "import", folder, tmp_path / "run", f"data.path={text}", "data.length=8", "--json"
    )
    assert code == 0 and report["tokenizer"].endswith("spiece.model") and report["text"], err
    ours, theirs = load_tokenizer(report["tokenizer"]), SentencePieceProcessor(model_file=stem + ".model")
    assert (ours.eos, ours.back, ours.front) == (1, (1,), ())
    code, out, err = call("generate", tmp_path / "run", "--prompt", "abc", "--temperature", 0, "--tokens", 5, "--json")
    assert code == 0 and out["text"] == theirs.decode(theirs.encode(out["text"])), err

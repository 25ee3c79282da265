"""Text to batches: documents, tokens in memory-mapped files, windows of them, and batches by step number.

corpus = prepare(cfg.data, folder)                                   # tokenizes once, then maps the files
windows = Windows(corpus.train, cfg.data.length, cfg.data.packing)   # windows[i]: one sequence
for batch in batches(windows, batch=32, seed=0, start_step=0): ...   # endless; the step is the whole position
"""

from moe_jax.data.baseline import bigram_loss, unigram_loss
from moe_jax.data.corpus import Corpus, TokenFile, open_prepared, prepare, renew, wait_prepared, whole
from moe_jax.data.pipeline import batches, heldout_batches
from moe_jax.data.sources import Document, documents
from moe_jax.data.tokenizer import (
    ByteTokenizer,
    HFTokenizer,
    PieceTokenizer,
    Tokenizer,
    continued,
    load_tokenizer,
    opening,
)
from moe_jax.data.windows import Windows

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "Document",
    "HFTokenizer",
    "PieceTokenizer",
    "TokenFile",
    "Tokenizer",
    "Windows",
    "batches",
    "bigram_loss",
    "continued",
    "documents",
    "heldout_batches",
    "load_tokenizer",
    "open_prepared",
    "opening",
    "prepare",
    "renew",
    "unigram_loss",
    "wait_prepared",
    "whole",
]

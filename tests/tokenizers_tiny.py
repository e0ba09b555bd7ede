"""Tiny fast tokenizers of the kinds that classifiers use, trained on a few sentences; nothing is downloaded."""

from __future__ import annotations

import functools

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = ["Ada Bly wrote the long book in 1987.", "the theatre, then there", "naïve café, 日本 sleeping sleeper slept"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def _finished(inner: Tokenizer, frame: bool) -> PreTrainedTokenizerFast:
    if not frame:
        return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]")
    places = [("[CLS]", SPECIAL.index("[CLS]")), ("[SEP]", SPECIAL.index("[SEP]"))]
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=places)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


@functools.cache
def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's: words in pieces, [CLS] and [SEP] around a text, zero-width characters dropped."""
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=False)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.train_from_iterator(TEXTS * 9, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL))
    return _finished(inner, frame=True)


@functools.cache
def byte_level(prefix: bool, frame: bool = True) -> PreTrainedTokenizerFast:
    """As RoBERTa's with or without ``add_prefix_space``; without ``frame`` as GPT-2's, which begins with nothing."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return _trained(inner, frame)


@functools.cache
def split_first() -> PreTrainedTokenizerFast:
    """As Llama 3's and Qwen's: a regular expression splits, then bytes; no blank is added."""
    inner = Tokenizer(models.BPE())
    pattern = Regex(r"'(?:s|t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")
    inner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    return _trained(inner, frame=False)


def _trained(inner: Tokenizer, frame: bool) -> PreTrainedTokenizerFast:
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    inner.train_from_iterator(TEXTS * 9, trainer)
    return _finished(inner, frame)

"""Small tokenizers of the kinds that models have, to be saved as tokenizer.json."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors


def with_bos(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    tokenizer.add_special_tokens(["<s>", "</s>"])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def sentencepiece() -> tokenizers.Tokenizer:
    """As of Llama 2: ▁ for spaces, one of them before the text, bytes for characters that have no token."""
    vocab = {token: index for index, token in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])}
    merges = []
    for word in ("▁the", "▁of", "▁France", "▁is", "▁Paris", "."):
        vocab.setdefault(word[0], len(vocab))
        for end in range(1, len(word)):
            vocab.setdefault(word[end], len(vocab))
            vocab.setdefault(word[: end + 1], len(vocab))
            merges.append((word[:end], word[end]))
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, list(dict.fromkeys(merges)), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return with_bos(tokenizer)


def byte_level() -> tokenizers.Tokenizer:
    """As of GPT-2 and Llama 3: every token is a run of bytes, which may end inside of a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "ĠP", "Ġð", "ĠðŁ", "Ã©"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [("Ġ", "P"), ("Ġ", "ð"), ("Ġð", "Ł"), ("Ã", "©")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return with_bos(tokenizer)


def rewriting() -> tokenizers.Tokenizer:
    """Its decoder replaces what it gave before, once the next token is there."""
    vocab = {token: index for index, token in enumerate(["[UNK]", "a", "b", "x"])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")])
    return tokenizer

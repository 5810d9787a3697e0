"""Small tokenizers of each family, written as files: no downloads, no transformers."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_byte_level(directory: Path) -> Path:
    """Byte-level BPE of 512 tokens: </s> is 1, bytes from 2, then pairs of letters; with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {symbol: index + 2 for index, symbol in enumerate(alphabet)}
    merges = []
    for first in alphabet:
        for second in "etaoinsrh":
            if len(vocab) < 512 and first.isascii() and first.isalpha() and first + second not in vocab:
                vocab[first + second] = len(vocab)
                merges.append((first, second))
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    return _write(directory, tokenizer, settings)


def write_byte_fallback(directory: Path) -> Path:
    """SentencePiece-like BPE: spaces as U+2581, unknown characters as byte tokens, a space stripped at the start."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    for symbol in ["\u2581", *letters, "th", "\u2581a"]:
        vocab[symbol] = len(vocab)
    merges = [("t", "h"), ("\u2581", "a")]
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _write(directory, tokenizer, {"eos_token": {"content": "</s>"}})


def write_word_piece(directory: Path) -> Path:
    """WordPiece with continuation pieces."""
    words = ["[UNK]", "a", "b", "the", "cat", "##s", "##ing", ".", "!", "sing", "'", "t"]
    vocab = {word: index for index, word in enumerate(words)} | {"</s>": len(words)}
    tokenizer: Any = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return _write(directory, tokenizer, {})


def _write(directory: Path, tokenizer: Any, settings: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    return directory

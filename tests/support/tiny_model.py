"""A tiny random Llama with a byte-level tokenizer, built locally: real enough for vLLM, quick enough for tests.

Weights are scaled up so that greedy output varies from token to token, which makes token-exactness a hard test.
"""

import json
import os
import tempfile
from pathlib import Path

VOCAB_SIZE = 512
EOS_TOKEN_ID = 1
MAX_POSITIONS = 2048

_VERSION = 2
_CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tiny_model(directory: Path, *, seed: int = 0) -> Path:
    """Write the model and its tokenizer to a directory, unless they are there already; return the directory."""
    if (directory / "ready.json").exists():
        return directory
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=0,
        eos_token_id=EOS_TOKEN_ID,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0 if "embed" not in name else 10.0)
    model.save_pretrained(directory, safe_serialization=True)
    _write_tokenizer(directory)
    (directory / "ready.json").write_text(json.dumps({"version": _VERSION, "seed": seed}))
    return directory


def shared_tiny_model() -> Path:
    """Return the tiny model of this machine, built at its first use."""
    root = Path(tempfile.gettempdir()) / f"ascendra-tests-{os.getuid()}"
    directory = root / f"tiny-llama-v{_VERSION}"
    if not (directory / "ready.json").exists():
        root.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            built = build_tiny_model(Path(scratch) / "model")
            # Built aside and renamed, so that two test runs at once never see half a model.
            try:
                built.rename(directory)
            except OSError:
                if not (directory / "ready.json").exists():
                    raise
    return directory


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": EOS_TOKEN_ID} | {symbol: index + 2 for index, symbol in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for first in alphabet:
        for second in "etaoinsrh":
            if len(vocab) == VOCAB_SIZE:
                break
            if first.isascii() and first.isalpha() and first + second not in vocab:
                vocab[first + second] = len(vocab)
                merges.append((first, second))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=_CHAT_TEMPLATE
    )
    fast.save_pretrained(str(directory))

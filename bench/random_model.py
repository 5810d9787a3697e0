"""Random Llama-shaped models of a given size, with the demo model's tokenizer: real compute, nothing to download."""

import json
import shutil
from pathlib import Path

SHAPES = {
    # name: (hidden size, layers, heads, intermediate size)
    "m30": (512, 8, 8, 1408),
    "m50": (640, 9, 10, 1720),
    "m110": (768, 15, 12, 2048),
}
"""25, 44 and 109 million parameters beside the embedding of 4,096 tokens, that of the tokenizer."""
CONTEXT_TOKENS = 4096
VOCAB_SIZE = 4096


def random_model(name: str, demo_model: Path, directory: Path) -> Path:
    """Write a random model of a named shape, unless it is there, and return its directory.

    Args:
        demo_model: a directory that `python -m demo.build_model` wrote; its tokenizer is used.
    """
    if (directory / "model.safetensors").exists():
        return directory
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden_size, layers, heads, intermediate_size = SHAPES[name]
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
    )
    directory.mkdir(parents=True, exist_ok=True)
    for file in demo_model.iterdir():
        if "tokenizer" in file.name or file.name == "chat_template.jinja":
            shutil.copy(file, directory)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(str(directory))
    written = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(written | {"torch_dtype": "float32"}, indent=1))
    return directory

"""The demo model: a small Llama trained on this machine, in under a minute, on text that ships with Python."""

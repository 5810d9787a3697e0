"""Without asyncio: `python examples/blocking.py`."""

import os

from ascendra import Client, Message, SamplingParams

ADDRESS = os.environ.get("ASCENDRA_ADDRESS", "127.0.0.1:7100")

with Client(ADDRESS) as client:
    [model, *_] = client.models()
    print(f"{model.name}: context of {model.max_model_len} tokens, {model.workers} workers")

    completion = client.generate("A list is", sampling=SamplingParams(max_tokens=24, temperature=0))
    print(completion.text)

    conversation = [Message("user", "What is a dictionary?")]
    for chunk in client.stream(messages=conversation, sampling=SamplingParams(max_tokens=48)):
        print(chunk.text, end="", flush=True)
    print()

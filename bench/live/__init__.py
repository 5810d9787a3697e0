"""Open-loop load against running systems: Ascendra over gRPC, or anything that speaks OpenAI's protocol."""

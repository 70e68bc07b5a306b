"""Where prefill chunks end. Pure.

Chunks end at fixed multiples of `chunk_tokens` counted from token 0, wherever a cached prefix ends, so that
the same prompt is always cut at the same places.
"""


def next_chunk_stop(num_computed: int, num_tokens: int, chunk_tokens: int) -> int:
    """Where the chunk that starts at `num_computed` ends: the next multiple, or the end of the prompt."""
    return min(num_tokens, (num_computed // chunk_tokens + 1) * chunk_tokens)

"""Random streams: every draw has a stream of its own, made from a seed and the draw's purpose.

If two draws took the same seed as it is, they would be the same permutation: the users whom evaluation asks would be
those whom stage 3 was prompted with. So nothing else in this package makes a generator from a recipe's seed.
"""

from __future__ import annotations

import hashlib

import numpy as np


def random_stream(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return the generator of one draw, the same on every machine.

    Args:
        purpose: what is drawn, in words, and numbers or ids if there are several such draws.
    """
    name = "\0".join(map(str, (seed, *purpose)))
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def stream_seed(seed: int, *purpose: str | int) -> int:
    """Return 31 bits, for generators of other libraries that take a seed: torch, vLLM. See `random_stream`."""
    return int(random_stream(seed, *purpose).integers(2**31))

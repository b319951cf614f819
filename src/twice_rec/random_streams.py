"""Random streams: every draw has a stream of its own, made from a seed and the draw's purpose.

If two draws took the same seed as it is, they would be the same permutation: the users whom evaluation asks would be
those whom stage 3 was prompted with. So nothing else in this package makes a generator from a recipe's seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_STEP = np.uint64(0x9E3779B97F4A7C15)  # of SplitMix64, as are the shifts and factors below


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


@dataclass(frozen=True)
class RandomStreams:
    """Streams of many ids, drawn from together; number j of a stream is a function of its key and j (SplitMix64).

    So a number depends neither on other streams nor on what was drawn before.
    """

    keys: NDArray[np.uint64]  # [B]

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: NDArray[np.int64]) -> RandomStreams:
        """Return some of the streams."""
        return RandomStreams(self.keys[rows])

    def apart(self, number: int) -> RandomStreams:
        """Return further streams of the same ids, for another part of the same draw."""
        return RandomStreams(_mixed(_mixed(self.keys) + np.array([number], dtype=np.uint64) * _STEP))

    def random(self, first: int, count: int) -> NDArray[np.float64]:
        """Return the numbers first, ..., first + count - 1 of each stream, uniform in [0, 1): [B, count]."""
        return self.random_at(np.arange(first, first + count))

    def random_at(self, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the numbers at some places of each stream, from 0: [B, M] for int [M] or [B, M]."""
        steps = (places.astype(np.uint64) + np.uint64(1)) * _STEP  # wraps around
        return (_mixed(self.keys[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def id_hashes(ids: Iterable[str]) -> NDArray[np.uint64]:
    """Return 64 bits of each id, the same on every machine: [B]; for `random_streams`."""
    whole = b"".join(hashlib.blake2b(one.encode(), digest_size=8).digest() for one in ids)
    return np.frombuffer(whole, dtype="<u8").astype(np.uint64)


def random_streams(seed: int, ids: NDArray[np.uint64], *purpose: str | int) -> RandomStreams:
    """Return one stream per id; see `random_stream`.

    Args:
        ids: [B], of `id_hashes`.
        purpose: what is drawn, the same for all ids.
    """
    name = "\0".join(map(str, (seed, *purpose)))
    whole = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=8).digest(), dtype="<u8").astype(np.uint64)
    return RandomStreams(_mixed(_mixed(ids + _STEP) ^ whole))


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a permutation of the 64-bit numbers in which every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

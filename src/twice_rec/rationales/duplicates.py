"""Near-duplicate texts, by MinHash over runs of three words (Broder 1997).

A text keeps 64 minima of hashed word runs. The share of equal minima of two texts estimates the Jaccard similarity of
their sets of runs, with a standard error of at most 1/16. Two texts are compared if they agree in a whole band of four
minima; for pairs of similarity .8 one of the sixteen bands agrees with probability .9998.
"""

from __future__ import annotations

import zlib

import numpy as np

from twice_rec.rationales.leaks import words_of

_HASHES, _BANDS, _RUN = 64, 16, 3


class NearDuplicates:
    """Texts by number, in the order in which they are added; 256 bytes each."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._factors = rng.integers(1, 2**63, _HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)  # [64]
        self._offsets = rng.integers(0, 2**63, _HASHES, dtype=np.uint64)  # [64]
        self._minima = np.empty((1024, _HASHES), dtype=np.uint32)  # [capacity, 64]
        self._count = 0

    def add(self, text: str) -> None:
        """Take one more text."""
        if self._count == len(self._minima):
            self._minima = np.concatenate([self._minima, np.empty_like(self._minima)])
        self._minima[self._count] = self._signature(text)
        self._count += 1

    def _signature(self, text: str) -> np.ndarray:
        """Return uint32 [64]: the minimum of each hash function (multiply-shift) over the word runs."""
        words = words_of(text)
        runs = {" ".join(words[i : i + _RUN]) for i in range(max(1, len(words) - _RUN + 1))}
        codes = np.array([zlib.crc32(run.encode()) for run in runs], dtype=np.uint64)  # [R]
        hashed = (codes[:, None] * self._factors + self._offsets) >> np.uint64(32)  # [R, 64]
        return hashed.min(axis=0).astype(np.uint32)  # [64]

    def find(self, limit: float) -> dict[int, int]:
        """Return the texts at least `limit` similar to an earlier one that is kept: their number -> its number."""
        minima = self._minima[: self._count]  # [N, 64]
        width = _HASHES // _BANDS
        buckets = [  # per band [N]: equal numbers mean equal minima in the band
            np.unique(minima[:, start : start + width], axis=0, return_inverse=True)[1].ravel()
            for start in range(0, _HASHES, width)
        ]
        kept: list[dict[int, list[int]]] = [{} for _ in buckets]  # per band: bucket -> texts that are kept
        shared = [np.bincount(bucket) > 1 for bucket in buckets]
        found: dict[int, int] = {}
        for number in range(self._count):
            own = [(band, int(bucket[number])) for band, bucket in enumerate(buckets) if shared[band][bucket[number]]]
            others = sorted({other for band, code in own for other in kept[band].get(code, ())})
            similar = (minima[others] == minima[number]).mean(axis=1) if others else np.empty(0)  # [others]
            if (similar >= limit).any():
                found[number] = others[int(np.argmax(similar >= limit))]
                continue
            for band, code in own:
                kept[band].setdefault(code, []).append(number)
        return found

"""Metrics against an independent library, and the bootstrap's intervals against samples whose truth is known.

    python benchmarks/metrics.py            1,000 samples per cell
    python benchmarks/metrics.py --quick    100

Agreement: HR, NDCG and MRR of random rankings with many ties, ours and those of ir-measures (trec_eval's C code), which
is given the target as the last of its equals. Coverage: in how many of 1,000 simulated samples the 95 % interval of
`metrics.bootstrap_intervals` or `paired_bootstrap` holds the true mean: hits of a rare, a usual and a good model, NDCG
of ranks with the same hit rates, and the difference of two models that hit the same users often. Samples are of 200 to
2,000 users, as many as evaluations ask. The standard error of a share near .95 of 1,000 samples is .007. No resampling
helps where hardly anybody differs: of 200 users and a hit rate of .05, two or three tell the two models apart.

Needs ir-measures (requirements-test.txt). `ratio` of the last line is 1 if both libraries agree to 1e-12.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from reporting import report
from twice_rec import metrics
from twice_rec.markdown import markdown_table

USERS = (200, 500, 2000)
HIT_RATES = (0.05, 0.25, 0.5)
BOUNDS = (0.93, 0.97)
_COLUMNS = 50  # samples that are resampled together


def agreement(users: int, candidates: int, seed: int) -> dict[str, float]:
    """Return the largest difference per metric between ours and the peer's, over users."""
    import ir_measures
    from ir_measures import RR, Success, nDCG

    peers = {f"hr@{k}": Success @ k for k in (1, 5, 10)} | {f"ndcg@{k}": nDCG @ k for k in (5, 10)} | {"mrr": RR}
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, candidates // 3, size=(users, candidates)).astype(float)  # [U, C], three of a kind
    target = rng.integers(candidates, size=users)  # [U]
    ranks = metrics.ranks_from_scores(scores, target)
    # trec_eval puts the name that sorts last first among equals; "a" is the target's.
    names = [["a" if column == of else f"b{column}" for column in range(candidates)] for of in target]
    run = {str(user): dict(zip(names[user], scores[user], strict=True)) for user in range(users)}
    truth = {str(user): {"a": 1} for user in range(users)}
    ours_of = {str(peer): name for name, peer in peers.items()}
    theirs = {name: np.zeros(users) for name in peers}
    for row in ir_measures.iter_calc(list(peers.values()), truth, run):
        theirs[ours_of[str(row.measure)]][int(row.query_id)] = row.value
    return {name: float(np.abs(theirs[name] - metrics.per_user(name, ranks)).max()) for name in peers}


def ranks_of(rng: np.random.Generator, hit_rate: float, shape: tuple[int, ...]) -> np.ndarray:
    """Return ranks of which a share of `hit_rate` is 1, the same share of the others 2, and so on."""
    return rng.geometric(hit_rate, size=shape)


def coverage(kind: str, hit_rate: float, users: int, samples: int, seed: int) -> float:
    """Return the share of samples whose interval holds the truth."""
    rng, covered = np.random.default_rng([seed, users, round(1000 * hit_rate), len(kind)]), 0
    for start in range(0, samples, _COLUMNS):
        count = min(_COLUMNS, samples - start)
        if kind == "difference":
            # Of the hits of one model nine in ten are hits of the other too, which also hits elsewhere.
            one = rng.random((users, count)) < hit_rate  # [n, M]
            elsewhere = 0.15 * hit_rate / (1 - hit_rate)
            other = np.where(one, rng.random(one.shape) < 0.9, rng.random(one.shape) < elsewhere)
            truth = (0.9 + 0.15) * hit_rate - hit_rate
            pairs = [metrics.paired_bootstrap(other[:, j], one[:, j], seed=start + j).ci95 for j in range(count)]
            intervals = np.array(pairs)  # [M, 2]
        else:
            ranks = ranks_of(rng, hit_rate, (users, count))
            name, cutoff = ("hr@1", 1) if kind == "hits" else ("ndcg@10", 10)
            values = metrics.per_user(name, ranks.ravel()).reshape(ranks.shape)
            chances = hit_rate * (1 - hit_rate) ** np.arange(cutoff)
            truth = float((chances / np.log2(np.arange(cutoff) + 2)).sum())
            intervals = metrics.bootstrap_intervals(values, seed=start)  # [M, 2]
        low, high = intervals[:, 0] - 1e-12, intervals[:, 1] + 1e-12  # ends may be the truth itself, rounded
        covered += int(((low <= truth) & (truth <= high)).sum())
    return covered / samples


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000, help="simulated samples per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="100 samples")
    options = parser.parse_args()
    samples, started = 100 if options.quick else options.samples, time.perf_counter()
    differences = agreement(2000, 30, options.seed)
    rows, cells = [], []
    for kind in ("hits", "ndcg", "difference"):
        for hit_rate in HIT_RATES:
            shares = [coverage(kind, hit_rate, users, samples, options.seed) for users in USERS]
            cells += [
                {"kind": kind, "hit_rate": hit_rate, "users": users, "coverage": share}
                for users, share in zip(USERS, shares, strict=True)
            ]
            rows.append([kind, f"{hit_rate:g}", *(f"{share:.3f}" for share in shares)])
            print(json.dumps(cells[-len(USERS) :]), flush=True)
    print(markdown_table(["interval of", "hit rate", *(f"{users:,} users" for users in USERS)], rows), flush=True)
    outside = [cell for cell in cells if not BOUNDS[0] <= cell["coverage"] <= BOUNDS[1]]
    print(f"{len(outside)} of {len(cells)} outside {BOUNDS[0]:.0%} to {BOUNDS[1]:.0%}: {json.dumps(outside)}")
    more = {"largest_difference": max(differences.values()), "samples": samples, "outside": len(outside)}
    more |= {"lowest": min(c["coverage"] for c in cells), "highest": max(c["coverage"] for c in cells)}
    more["seconds"] = round(time.perf_counter() - started, 1)
    agreed = float(max(differences.values()) <= 1e-12)
    report("metrics", "ir-measures 0.4.3", agreed, 1.0, "agreement to 1e-12", True, **more)


if __name__ == "__main__":
    main()

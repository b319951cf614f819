"""Seconds and memory of stage 0 on generated raw files of Amazon Reviews 2023, candidates included.

    python benchmarks/prepare.py --reviews 1000000 4000000 16000000

Every measurement is a process of its own, from the raw files to `data/`: 5-core, leave-one-out, uniform, popularity and
hard candidates of 30. Peers, at `--peer_reviews`: this project's code before it worked in columns (a git worktree of
commit e12383a, or `--peer_checkout`), and a plain pandas pipeline of the same steps, below. Rows go to
`results/prepare.jsonl`, with the load of the machine; 66 million reviews, Clothing_Shoes_and_Jewelry, are extrapolated
from the two largest sizes.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import raw_reviews
from reporting import ROOT, add_measure, in_a_process, report

OLD_COMMIT = "e12383a"
LARGEST = 66_000_000
RESULTS = ROOT / "benchmarks" / "results" / "prepare.jsonl"
FLAGS = "--k_core 5 --min_history 5 --max_history null --candidate_lists uniform popularity hard --num_candidates 30"


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Prepare the generated files in this process."""
    with tempfile.TemporaryDirectory(dir=options.raw) as out:
        start = time.perf_counter()
        if options.code == "pandas":
            figures = pandas_pipeline(Path(options.raw), Path(out))
        else:
            figures = stage_0(Path(options.code), options.raw, out)
        seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    names = ("users", "items", "interactions")
    used = {"seconds": round(seconds, 1), "cpu_seconds": round(time.process_time(), 1), "memory_gib": round(memory, 2)}
    return used | {name: figures[name] for name in names}


def stage_0(checkout: Path, raw: str, out: str) -> dict[str, int]:
    """The stage of a checkout of this project."""
    sys.path.insert(0, str(checkout / "src"))
    from twice_rec.stages import stage0_prepare

    assert str(checkout) in stage0_prepare.__file__
    recipe = ["--config", str(checkout / "recipes" / "amazon" / "prepare.yaml"), "--domain", raw_reviews.DOMAIN]
    if stage0_prepare.main([*recipe, "--source_dir", raw, "--run_dir", out, *FLAGS.split()]):
        sys.exit("stage 0 failed")
    return json.loads((Path(out) / "data" / "statistics.json").read_text())


def pandas_pipeline(raw: Path, out: Path) -> dict[str, int]:
    """The same steps as most people write them."""
    import pandas as pd

    def read(path: Path, columns: list[str]) -> pd.DataFrame:
        with pd.read_json(path, lines=True, chunksize=100_000, dtype=False, convert_dates=False) as chunks:
            return pd.concat([chunk[columns] for chunk in chunks], ignore_index=True)

    items = read(raw / f"meta_{raw_reviews.DOMAIN}.jsonl", ["parent_asin", "title", "description", "store", "price"])
    columns = ["user_id", "parent_asin", "timestamp", "rating", "title", "text"]
    rows = read(raw / f"{raw_reviews.DOMAIN}.jsonl", columns)
    rows = rows[rows["parent_asin"].isin(items.loc[items["title"].str.len() > 0, "parent_asin"])]
    rows = rows.sort_values(["user_id", "timestamp", "parent_asin"]).drop_duplicates(["user_id", "parent_asin"])
    while True:
        users, counts = rows["user_id"].value_counts(), rows["parent_asin"].value_counts()
        keep = (rows["user_id"].map(users) >= 5) & (rows["parent_asin"].map(counts) >= 5)
        if keep.all():
            break
        rows = rows[keep]
    for column in ("title", "text"):
        clean = rows[column].map(html.unescape).str.replace(r"<[^<>]*>", " ", regex=True)
        rows[column] = clean.str.split().str.join(" ")
    items = items[items["parent_asin"].isin(rows["parent_asin"])].sort_values("parent_asin")
    items.to_json(out / "catalog.jsonl", orient="records", lines=True)
    ids = items["parent_asin"].to_numpy()
    index = pd.Series(range(len(ids)), index=ids)
    rows["item"] = rows["parent_asin"].map(index)
    histories = []
    with open(out / "sequences.jsonl", "w", encoding="utf-8") as file:
        for user, group in rows.groupby("user_id", sort=False):
            interactions = group[["parent_asin", "timestamp", "rating", "title", "text"]].to_dict("records")
            file.write(json.dumps({"user_id": user, "interactions": interactions}) + "\n")
            histories.append((user, group["item"].to_numpy()))
    pandas_candidates(histories, ids, out)
    return {"users": len(histories), "items": len(ids), "interactions": len(rows)}


def pandas_candidates(histories: list, ids, out: Path) -> None:
    """Lists of 30 per user and split, drawn with numpy, item-kNN scores of 512 users at a time."""
    import numpy as np
    from scipy import sparse

    rng, size = np.random.default_rng(0), len(ids)
    lengths = [len(history) - 2 for _, history in histories]
    user = np.repeat(np.arange(len(histories)), lengths)
    item = np.concatenate([history[:-2] for _, history in histories])
    trained = sparse.csr_matrix((np.ones(len(item)), (user, item)), shape=(len(histories), size))
    together = (trained.T @ trained).tocoo()
    counts = together.diagonal()
    cosine = together.data / (np.sqrt(counts[together.row] * counts[together.col]) + 20)
    cosine[together.row == together.col] = 0
    similarity = sparse.csr_matrix((cosine, (together.row, together.col)), shape=together.shape)
    shares = np.bincount(item, minlength=size) / len(item)
    for split, back in (("train", 3), ("valid", 2), ("test", 1)):
        with open(out / f"candidates.{split}.jsonl", "w", encoding="utf-8") as file:
            for start in range(0, len(histories), 512):
                part = histories[start : start + 512]
                weights = [0.9 ** np.arange(len(h) - back)[::-1] for _, h in part]
                bounds = np.r_[0, np.cumsum([len(weight) for weight in weights])]
                past = np.concatenate([h[:-back] for _, h in part])
                matrix = sparse.csr_matrix((np.concatenate(weights), past, bounds), shape=(len(part), size))
                scores = (matrix @ similarity).toarray() if split != "train" else None
                for row, (name, history) in enumerate(part):
                    drawn = {"uniform": rng.choice(size, 80, replace=False)}
                    if scores is not None:
                        drawn["popularity"] = rng.choice(size, 80, replace=False, p=shares)
                        scores[row, history] = -1
                        drawn["hard"] = rng.permutation(np.argpartition(scores[row], size - 100)[size - 100 :])
                    lists = {}
                    for kind, items in drawn.items():
                        shown = np.r_[history[-back], items[~np.isin(items, history)][:29]]
                        lists[kind] = ids[rng.permutation(shown)].tolist()
                    row_of = {"user_id": name, "target": ids[history[-back]], "lists": lists}
                    file.write(json.dumps(row_of) + "\n")


@contextmanager
def checkout_of(given: Path | None) -> Iterator[Path]:
    """The peer's checkout: the given one, or a worktree for as long as it is needed."""
    if given:
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / OLD_COMMIT
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(path), OLD_COMMIT], cwd=ROOT, check=True)
        try:
            yield path
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(path)], cwd=ROOT, check=True)


def measured(name: str, code: str, raw: Path, reviews: int, kept: bool) -> dict[str, float]:
    """One measurement, printed and, if it is to be kept, added to the results."""
    found = in_a_process(__file__, argparse.Namespace(code=code, raw=str(raw)))
    row = {"name": name, "reviews": reviews, **found, "load": round(os.getloadavg()[0], 1), "cores": os.cpu_count()}
    print(json.dumps(row), flush=True)
    if kept:
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return row


def extrapolated(rows: list[dict[str, float]]) -> dict[str, float]:
    """Seconds and memory for the largest domain, on the power law through the two largest sizes."""
    small, large = sorted(rows, key=lambda row: row["reviews"])[-2:]
    found = {}
    for key in ("seconds", "memory_gib"):
        slope = math.log(large[key] / small[key]) / math.log(large["reviews"] / small["reviews"])
        found[key] = round(large[key] * (LARGEST / large["reviews"]) ** slope, 1)
    return {f"{key}_at_{LARGEST}": value for key, value in found.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=int, nargs="+", default=[1_000_000, 4_000_000], help="sizes of our curve")
    parser.add_argument("--peer_reviews", type=int, default=1_000_000, help="size at which the peers are measured")
    parser.add_argument("--peer_checkout", type=Path, help="checkout of the old code; default: a worktree is made")
    parser.add_argument("--folder", type=Path, help="where generated files are kept; default: a temporary folder")
    parser.add_argument("--quick", action="store_true", help="50,000 reviews")
    options = add_measure(parser, measure)
    kept = not options.quick
    if options.quick:
        options.reviews, options.peer_reviews = [50_000], 50_000
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary, checkout_of(options.peer_checkout) as checkout:

        def raw_of(reviews: int) -> Path:
            folder = (options.folder or Path(temporary)) / f"reviews-{reviews}"
            if not folder.exists():
                raw_reviews.write(folder, reviews)
            return folder

        rows = [measured("prepare", str(ROOT), raw_of(reviews), reviews, kept) for reviews in options.reviews]
        raw, size = raw_of(options.peer_reviews), options.peer_reviews
        ours = next((row for row in rows if row["reviews"] == size), None)
        ours = ours or measured("prepare", str(ROOT), raw, size, kept)
        peers = {"pandas": "pandas", f"this project at {OLD_COMMIT}": str(checkout.resolve())}
        theirs = {peer: measured(peer, code, raw, size, kept) for peer, code in peers.items()}
    more = {"reviews": size, **(extrapolated(rows) if len(rows) > 1 else {})}
    for peer, row in theirs.items():
        memory = {"memory_gib": ours["memory_gib"], "peer_memory_gib": row["memory_gib"]}
        report("prepare", peer, ours["seconds"], row["seconds"], "s", False, **memory, **more)


if __name__ == "__main__":
    main()

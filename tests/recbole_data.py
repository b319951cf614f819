"""A small domain for the CF models of RecBole: item i is followed by i + 1, in a circle."""

import numpy as np

from twice_rec.catalog import ItemCatalog
from twice_rec.data import dataset
from twice_rec.files import write_records
from twice_rec.records import SPLITS, CandidateLists, Interaction, Item, UserSequence

ITEMS = 20
CATALOG = ItemCatalog(
    [Item(f"I{i:02}", f"item {i}", brand=f"brand {i % 4}", categories=(f"kind {i % 3}",)) for i in range(1, ITEMS + 1)]
)


def write_circle(folder, users=200):
    """Write `data/`: six items per user, the first user has one training item, the others four; return the sequences.

    Items are numbered 1..20: the sequence of a user is what a model that knows the circle predicts.
    """
    rng, sequences, lists = np.random.default_rng(0), [], {split: [] for split in SPLITS}
    for user, start in enumerate(rng.integers(0, ITEMS, users)):
        num_train = 1 if user == 0 else 4
        items = [f"I{(start + k) % ITEMS + 1:02}" for k in range(num_train + 2)]
        sequence = UserSequence(f"u{user}", tuple(map(Interaction, items)), num_train, num_train, num_train + 1)
        sequences.append(sequence)
        for split in SPLITS:
            if sequence.target_position(split) is None:
                continue
            target = sequence.target(split).item_id
            others = rng.permutation([item for item in CATALOG.ids if item != target])[:4].tolist()
            shown = rng.permutation([target, *others]).tolist()
            lists[split].append(CandidateLists(f"u{user}", target, {"uniform": tuple(shown)}))
    CATALOG.save(folder / dataset.CATALOG)
    write_records(folder / dataset.SEQUENCES, sequences)
    for split in SPLITS:
        write_records(folder / dataset.candidates_file(split), lists[split])
    return [CATALOG.indices(entry.item_id for entry in sequence.interactions) for sequence in sequences]

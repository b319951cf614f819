"""What stage 0 makes of a source, as the records that later stages read."""

import tempfile
from pathlib import Path

import numpy as np
import polars as pl

from twice_rec.data import sequences
from twice_rec.data.sequences import SequenceTable, write_sequences
from twice_rec.files import read_records
from twice_rec.records import UserSequence


def assemble(source, config):
    """The catalogue, and all sequences as they are in the file."""
    catalog, table, _ = sequences.assemble(source, config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sequences.jsonl"
        write_sequences(path, table, catalog, source)
        return catalog, list(read_records(path, UserSequence))


def table_of(catalog, records):
    """The table of some sequences."""
    entries = [entry for record in records for entry in record.interactions]
    points = [[-1 if x is None else x for x in (r.num_train, r.valid, r.test)] for r in records]
    return SequenceTable(
        pl.Series([record.user_id for record in records]),
        np.cumsum([0, *(len(record.interactions) for record in records)]),
        np.array(catalog.indices(entry.item_id for entry in entries), dtype=np.int32),
        np.array([entry.timestamp for entry in entries]),
        np.array([np.nan if entry.rating is None else entry.rating for entry in entries], dtype=np.float32),
        np.arange(len(entries)),
        *np.array(points).T,
    )

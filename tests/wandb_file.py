"""Reads an offline run of Weights & Biases back: its file is a LevelDB log of protocol buffers, behind seven bytes."""

import json
import struct
import time

BLOCK, HEADER = 32768, 7  # bytes of a block of the log, and of a chunk's header: checksum, length, kind
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path):
    """Yield the records of a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), HEADER, []
    assert data[:4] == b":W&B"
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:  # no room for a header: the block's end is empty
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        if not kind or place + HEADER + length > len(data):  # the rest is not written yet
            return
        parts.append(data[place + HEADER : place + HEADER + length])
        place += HEADER + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def whole_file(run_folder, seconds=60):
    """Return the records of a run that has ended: a process of wandb's own writes the last ones behind `finish`."""
    (path,) = run_folder.glob("*.wandb")
    deadline = time.monotonic() + seconds
    while not (found := list(records(path))) or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.1)
    return found


def history(run_folder):
    """Return the logged rows of a run: key -> value."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in whole_file(run_folder)
        if record.WhichOneof("record_type") == "history"
    ]


def tables(run_folder, name):
    """Return the tables that a run logged under a name, in the order of steps, each as rows: column -> value."""
    found = []
    for row in history(run_folder):
        if f"{name}/path" in row or name in row:
            path = row[name]["path"] if name in row else row[f"{name}/path"]
            table = json.loads((run_folder / "files" / path).read_text())
            found.append([dict(zip(table["columns"], values, strict=True)) for values in table["data"]])
    return found

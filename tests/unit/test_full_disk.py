"""A disk that is full inside a library's own write is one line and exit status 1, and the log adds nothing to it."""

from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors import SafetensorError

from twice_rec.errors import InputError
from twice_rec.recipe import Recipe
from twice_rec.stages.command_line import command

FULL = Path("/dev/full")  # Linux: every write to it fails as on a full disk


def run(tmp_path, body):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run_dir: {tmp_path / 'run'}\ndomain: D\nseed: 1\n")
    return command("stage", Recipe, body)([str(recipe)])


def torch_writes(recipe):
    torch.save({"weight": torch.zeros(1_000_000)}, FULL)


def python_writes(recipe):
    FULL.write_text("x" * 100_000)


def polars_writes_lines(recipe):
    with open(FULL, "wb") as out:
        pl.DataFrame({"a": ["x" * 1000] * 1000}).write_ndjson(out)


def polars_writes_parquet(recipe):
    pl.DataFrame({"a": ["x" * 1000] * 1000}).write_parquet(FULL)


def raises(error, cause=None):
    def body(recipe):
        raise error from cause

    return body


LIBRARIES = {
    "torch": torch_writes,
    "python": python_writes,
    "polars, lines": polars_writes_lines,
    "polars, parquet": polars_writes_parquet,
    "torch, in words": raises(RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/3\nmore")),
    "safetensors": raises(SafetensorError("Error while serializing: I/O error: No space left (os error 28)")),
    "tokenizers": raises(Exception("No space left on device (os error 28)")),
    "wrapped": raises(ValueError("saving failed"), OSError(28, "No space left on device")),
}


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_full_disk_is_one_line(tmp_path, capfd, library):
    assert run(tmp_path, LIBRARIES[library]) == 1
    (line,) = capfd.readouterr().err.splitlines()[1:]  # the first one says what was started
    assert line.startswith("error: cannot write ")
    assert "make room or choose another --run_dir, then run the same command again" in line
    assert "Traceback" in (tmp_path / "run" / "logs" / "stage.log").read_text()


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (raises(RuntimeError("shapes differ")), 1, "stage failed"),
        (raises(ValueError("wrong"), PermissionError(13, "Permission denied")), 1, "stage failed"),
        (raises(InputError("the disk of the shop is full"), OSError(28, "No space left on device")), 2, "of the shop"),
    ],
)
def test_other_errors_are_not_taken_for_it(tmp_path, capfd, body, status, words):
    assert run(tmp_path, body) == status
    error = capfd.readouterr().err
    assert words in error
    assert "cannot write" not in error


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_log_on_a_full_disk_is_silent(tmp_path, capfd):
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "logs" / "stage.log").symlink_to(FULL)
    assert run(tmp_path, lambda recipe: None) == 0
    assert run(tmp_path, python_writes) == 1
    error = capfd.readouterr().err
    assert "Logging error" not in error
    assert "Traceback" not in error
    assert error.count("cannot write") == 1

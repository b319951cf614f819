"""Damaged checkpoints and files of weights are told from whole ones without loading them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from twice_rec.run import last_checkpoint
from twice_rec.weight_files import fault_of_shards, fault_of_weights

FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    save_file({"a": torch.ones(50), "b": torch.ones(3)}, path / "adapter_model.safetensors", {"format": "pt"})
    (path / "adapter_config.json").write_text("{}")
    for name in FILES[1:4]:
        torch.save({"state": torch.ones(50)}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    return path


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


DAMAGES = [cut, empty, lambda path: path.unlink()]


def test_the_newest_checkpoint_is_the_one_with_most_steps(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()  # a user's own
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert (tmp_path / "checkpoint-best").exists()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_set_aside(tmp_path, caplog, name, damage):
    older, newest = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    damage(newest / name)
    assert last_checkpoint(tmp_path) == older
    assert not newest.exists()
    assert (tmp_path / "damaged-checkpoint-4").is_dir()
    assert str(newest) in caplog.text
    assert name in caplog.text
    checkpoint(tmp_path, 4)  # trained again: a second damage keeps the first one's files
    damage(newest / name)
    assert last_checkpoint(tmp_path) == older
    assert (tmp_path / "damaged-2-checkpoint-4").is_dir()


def test_without_a_whole_checkpoint_training_starts_anew_and_says_so(tmp_path, caplog):
    cut(checkpoint(tmp_path, 2) / "optimizer.pt")
    assert last_checkpoint(tmp_path) is None
    assert "training starts anew" in caplog.text


def test_checkpoints_of_other_shapes_are_whole_too(tmp_path):
    """Weights only; several processes; weights over several files; DeepSpeed."""
    path = checkpoint(tmp_path, 2)
    for name in FILES[1:4]:
        (path / name).unlink()
    assert last_checkpoint(tmp_path) == path
    path = checkpoint(tmp_path, 4)
    (path / "rng_state.pth").rename(path / "rng_state_0.pth")
    torch.save({}, path / "rng_state_1.pth")
    assert last_checkpoint(tmp_path) == path
    path = checkpoint(tmp_path, 6)
    (path / "adapter_config.json").unlink()
    (path / "adapter_model.safetensors").rename(path / "model-1.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert last_checkpoint(tmp_path) == path
    path = checkpoint(tmp_path, 8)
    (path / "optimizer.pt").unlink()
    (path / "latest").write_text("global_step8")
    (path / "global_step8").mkdir()
    torch.save({}, path / "global_step8" / "states.pt")
    assert last_checkpoint(tmp_path) == path
    empty(path / "global_step8" / "states.pt")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    (tmp_path / "checkpoint-6" / "model-1.safetensors").unlink()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-4" / "rng_state_0.pth").unlink()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_cut_weights(tmp_path, kept):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(50)}, path, {"format": "pt"})
    assert fault_of_weights(path) is None
    path.write_bytes(path.read_bytes()[:kept])
    assert fault_of_weights(path)


def test_what_stands_in_place_of_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 8\n")
    assert "pointer of Git LFS" in fault_of_weights(path)
    path.write_text("<html>Not found, sorry, but please come back later</html>")
    assert fault_of_weights(path) == "is not a file of safetensors"
    path.write_text("{}")
    assert "damaged" in fault_of_shards(path)

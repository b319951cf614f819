"""Uploads of a shared model, to a hub on this machine."""

import time

import pytest
from huggingface_hub import constants

from servers.processes import ROOT, free_port
from servers.upload_server import UploadServer
from shared_run import evaluated, make_run, write
from twice_rec.stages import stage7_share

TOKEN = "hf_" + "thetokenofthisuploadtest42"
NAME = "me/twice-rec-tiny"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol has no server here
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the library waits between its tries
    server = UploadServer(TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    yield server
    server.close()


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path)


def push(run_dir, *flags, name=NAME):
    words = [str(ROOT / "recipes/tiny/share.yaml"), "--run_dir", str(run_dir), "--hub_model_id", name]
    return stage7_share.main([*words, *flags])


def files_of(run_dir):
    folder = run_dir / "share" / "stage3"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def nothing_tells_the_token(run_dir, caplog, capfd):
    texts = [path.read_bytes() for path in run_dir.rglob("*") if path.is_file()]
    shown = "".join(capfd.readouterr()) + caplog.text
    return TOKEN not in shown and not any(TOKEN.encode() in text for text in texts)


def test_files_arrive_with_their_bytes_and_no_file_twice(hub, run_dir, caplog, capfd):
    assert push(run_dir) == 0
    repository = hub.repositories[NAME]
    assert repository["private"] is True
    assert repository["files"] == files_of(run_dir)
    assert {"README.md", "results.json", "model.safetensors", "config.json"} == repository["files"].keys()
    assert repository["commits"] == ["stage3, merged"]
    assert hub.cards[0].encode() == repository["files"]["README.md"]  # its front matter went through the hub's check
    assert f"uploaded: {hub.url}/{NAME}/commit/" in caplog.text
    stored = len(hub.stored)
    assert stored == 1
    assert push(run_dir) == 0
    assert len(hub.stored) == stored
    assert len(repository["commits"]) == 1
    evaluated(run_dir)
    assert push(run_dir, "--overwrite", "true") == 0  # a new card; the weights are there
    assert len(hub.stored) == stored
    assert len(repository["commits"]) == 2
    assert repository["files"] == files_of(run_dir)
    assert hub.storage_tokens == {None}  # the storage gets no token
    assert nothing_tells_the_token(run_dir, caplog, capfd)


def test_a_wrong_token_is_one_line(hub, run_dir, caplog, capfd, monkeypatch):
    hub.token = "another"
    assert push(run_dir) == 2
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert line == (
        f"{hub.url} does not take the token (401); log in by `hf auth login`, or set HF_TOKEN to a valid one"
    )
    assert nothing_tells_the_token(run_dir, caplog, capfd)


def test_a_repository_of_others_is_one_line(hub, run_dir, caplog, capfd):
    assert push(run_dir, name="others/model") == 2
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert line == (
        "hub_model_id is others/model, but the token may not write there (403); check the owner's name, or use a token "
        "that may write"
    )
    assert nothing_tells_the_token(run_dir, caplog, capfd)


@pytest.mark.parametrize("part", ["repos/create", "preupload", "objects/batch", "storage", "commit"])
def test_a_push_that_is_cut_off_goes_on(hub, run_dir, caplog, capfd, part):
    hub.cut[part] = 99
    assert push(run_dir) == 1
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert line.startswith(f"{hub.url} cannot be reached, or ended the connection (")
    assert line.endswith(f"{NAME} is not complete. The same command goes on and sends no file twice")
    assert not hub.repositories.get(NAME, {"files": {}})["files"]
    stored = len(hub.stored)
    assert stored == (part == "commit")
    hub.cut.clear()
    assert push(run_dir) == 0
    assert hub.repositories[NAME]["files"] == files_of(run_dir)
    assert len(hub.stored) == 1
    assert nothing_tells_the_token(run_dir, caplog, capfd)


def test_a_short_cut_is_not_even_told(hub, run_dir):
    hub.cut["storage"] = 1
    assert push(run_dir) == 0
    assert hub.repositories[NAME]["files"] == files_of(run_dir)


def test_a_hub_that_is_not_there_is_one_line(hub, run_dir, caplog, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert push(run_dir) == 1
    assert "cannot be reached, or ended the connection (" in caplog.text


def test_what_is_private_is_not_put_where_all_can_see_it(hub, run_dir, caplog):
    hub.repositories[NAME] = {"private": False, "files": {}, "commits": []}
    assert push(run_dir) == 2
    assert f"hub_model_id is {NAME}, which is there already and is public, but hub_private is true" in caplog.text
    assert not hub.repositories[NAME]["files"]
    assert push(run_dir, "--hub_private", "false") == 0
    assert hub.repositories[NAME]["files"] == files_of(run_dir)


def test_a_card_that_was_changed_by_hand_is_not_uploaded_unasked(hub, run_dir, caplog):
    assert push(run_dir) == 0
    card = run_dir / "share" / "stage3" / "README.md"
    write(card, card.read_text() + "More.\n")
    assert push(run_dir) == 2
    assert f"{card} was changed since the share stage finished" in caplog.text

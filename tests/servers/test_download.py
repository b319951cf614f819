"""Stage 0's download of Amazon Reviews 2023, against a hub on this machine."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest
from huggingface_hub import constants, file_download

from servers.hub_server import COMMIT, HubServer
from servers.processes import ROOT, free_port
from twice_rec.data import download
from twice_rec.errors import InputError, Unfinished
from twice_rec.locks import writing
from twice_rec.stages import stage0_prepare

DOMAIN = "Musical_Instruments"
REVIEWS, METADATA = (
    f"raw/{kind}_categories/{name}{DOMAIN}.jsonl" for kind, name in (("review", ""), ("meta", "meta_"))
)
CSV = [f"benchmark/5core/last_out/{DOMAIN}.{split}.csv" for split in ("train", "valid", "test")]
PIECE = download._PIECE
TOKEN = "hf_" + "thetokenofthetest4711"


def lines(name, count):
    return b"".join(json.dumps({name: number, "text": "x" * 40}).encode() + b"\n" for number in range(count))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(download, "_PIECE", 1024)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the library waits between its tries
    server = HubServer({REVIEWS: lines("review", 900), METADATA: lines("item", 300), **{p: lines(p, 50) for p in CSV}})
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield server
    server.close()


def fetch(folder, source="amazon2023", domain=DOMAIN, revision=COMMIT):
    download.fetch(download.missing_files(source, domain, folder), domain, folder, revision)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def prepare(folder, *flags):
    words = [str(ROOT / "recipes/amazon/prepare.yaml"), "--domain", DOMAIN, "--source_dir", str(folder / "raw")]
    return stage0_prepare.main([*words, "--run_dir", str(folder / "run"), "--download", "true", *flags])


def test_reviews_and_metadata_are_fetched_under_their_names(hub, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fetch(tmp_path / "new" / "folder")
    assert files_of(tmp_path / "new" / "folder") == {
        f"{DOMAIN}.jsonl": hub.files[REVIEWS], f"meta_{DOMAIN}.jsonl": hub.files[METADATA],
    }  # fmt: skip
    assert f"{REVIEWS}: {len(hub.files[REVIEWS]):,} bytes, commit {COMMIT}" in caplog.text
    assert hub.tokens == {"hub": {f"Bearer {TOKEN}"}, "storage": {None}}  # the token stays at the hub
    assert TOKEN not in caplog.text


def test_the_5core_is_three_files_and_the_metadata_and_git_files_are_checked_too(hub, tmp_path):
    fetch(tmp_path, "amazon2023_5core")
    names = {f"{DOMAIN}.{split}.csv" for split in ("train", "valid", "test")} | {f"meta_{DOMAIN}.jsonl"}
    assert files_of(tmp_path).keys() == names
    (tmp_path / f"{DOMAIN}.valid.csv").unlink()
    hub.sent[CSV[1]] = hub.files[CSV[1]].replace(b"x", b"y")  # a small file that git itself holds
    with pytest.raises(InputError, match="has the hash"):
        fetch(tmp_path, "amazon2023_5core")


def test_what_is_there_is_not_fetched_again(hub, tmp_path):
    (tmp_path / f"{DOMAIN}.jsonl.gz").write_bytes(b"my own")
    fetch(tmp_path)
    assert [path for path, _ in hub.heads] == [METADATA]
    assert (tmp_path / f"{DOMAIN}.jsonl.gz").read_bytes() == b"my own"
    assert download.missing_files("amazon2023", DOMAIN, tmp_path) == []
    assert download.missing_files("amazon2023", DOMAIN, tmp_path / "no", ("mine.jsonl", None)) == [METADATA]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_is_taken_up_again(hub, tmp_path, ranges):
    hub.ranges, hub.broken[REVIEWS] = ranges, 2
    fetch(tmp_path)
    assert (tmp_path / f"{DOMAIN}.jsonl").read_bytes() == hub.files[REVIEWS]
    first, *others = hub.begins(REVIEWS)
    assert first == 0
    assert len(others) == 2
    assert all(start > 0 for start in others) == ranges
    if ranges:
        assert others[0] > len(hub.files[REVIEWS]) // 2 - 2048  # only the rest, but for a piece that was under way
        assert others[1] > others[0]


def test_a_storage_that_fails_ends_the_run_and_the_next_one_goes_on(hub, tmp_path):
    hub.broken[REVIEWS], hub.contents_left = 1, 1
    with pytest.raises(Unfinished, match=r"HTTP 503; [\d,]+ of .* the same command goes on") as told:
        fetch(tmp_path)
    assert "Signature" not in str(told.value)
    assert not (tmp_path / f"{DOMAIN}.jsonl").exists()
    (partial,) = tmp_path.glob(".*.part")
    had = partial.stat().st_size
    assert had > 0
    hub.asked, hub.contents_left = [], None
    fetch(tmp_path)
    assert hub.begins(REVIEWS) == [had]
    assert (tmp_path / f"{DOMAIN}.jsonl").read_bytes() == hub.files[REVIEWS]
    assert not list(tmp_path.glob(".*.part"))


def test_what_a_cut_connection_brought_is_kept_as_shipped(hub, tmp_path, monkeypatch):
    """The library's own pieces are of 10 MiB, of which nothing would be kept of a file that is smaller."""
    monkeypatch.setattr(download, "_PIECE", PIECE)
    hub.files[REVIEWS] = lines("review", 60_000)  # 4 MB
    hub.broken[REVIEWS] = 2
    fetch(tmp_path)
    assert (tmp_path / f"{DOMAIN}.jsonl").read_bytes() == hub.files[REVIEWS]
    begins = hub.begins(REVIEWS)
    assert begins[0] == 0
    assert begins[1] >= len(hub.files[REVIEWS]) // 2 - PIECE
    assert begins == sorted(begins)


def test_a_connection_that_never_brings_anything_is_told(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_PIECE", 1 << 20)  # more than the file, so no piece arrives whole
    hub.broken[REVIEWS] = 10**6
    with pytest.raises(Unfinished, match=r"the connection ends again \(RemoteProtocolError\); 0 of [\d,]+ bytes"):
        fetch(tmp_path)
    assert not (tmp_path / f"{DOMAIN}.jsonl").exists()


def test_a_full_disk_is_told_as_such(hub, tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(OSError, match="No space left on device"):
        fetch(tmp_path)


def test_a_killed_download_leaves_no_file_and_is_continued(hub, tmp_path, monkeypatch):
    hub.files[REVIEWS] = b"x" * (48 << 20)
    hub.waits.clear()
    call = f"download.fetch(['{REVIEWS}'], '{DOMAIN}', pathlib.Path({str(tmp_path)!r}), '{COMMIT}')"
    script = f"import pathlib; from twice_rec.data import download; {call}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_ENDPOINT": hub.url}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.DEVNULL)
    monkeypatch.undo()
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size >= 24 << 20 for path in tmp_path.glob(".*.part")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    lock = writing(tmp_path / f"{DOMAIN}.jsonl")
    with pytest.raises(InputError, match=f"{DOMAIN}.jsonl is in use by process {process.pid}"), lock:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / f"{DOMAIN}.jsonl").exists()
    hub.waits.set()
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert done.returncode == 0
    assert hub.begins(REVIEWS) == [0, 24 << 20]  # the half that came
    assert (tmp_path / f"{DOMAIN}.jsonl").read_bytes() == hub.files[REVIEWS]


def test_two_processes_do_each_others_work_no_harm(hub, tmp_path):
    with writing(tmp_path / f"{DOMAIN}.jsonl"), pytest.raises(InputError, match="is in use by process"):
        fetch(tmp_path)
    missing = download.missing_files("amazon2023", DOMAIN, tmp_path)
    (tmp_path / f"{DOMAIN}.jsonl").write_bytes(b"of the other process")  # which has ended meanwhile
    download.fetch(missing, DOMAIN, tmp_path, COMMIT)
    assert (tmp_path / f"{DOMAIN}.jsonl").read_bytes() == b"of the other process"
    assert hub.begins(REVIEWS) == []


def test_other_content_is_refused_and_removed(hub, tmp_path):
    hub.sent[REVIEWS] = hub.files[REVIEWS].replace(b"x", b"y")
    with pytest.raises(InputError, match=rf"{REVIEWS}: what came has the hash [0-9a-f]+, the hub announced") as told:
        fetch(tmp_path)
    assert "it was removed" in str(told.value)
    assert files_of(tmp_path) == {}
    hub.sent.clear()
    fetch(tmp_path)
    assert (tmp_path / f"{DOMAIN}.jsonl").read_bytes() == hub.files[REVIEWS]


@pytest.mark.parametrize(("change", "words"), [(slice(-100), "ends after"), (slice(None), "bytes or more")])
def test_another_size_is_refused_and_removed(hub, tmp_path, change, words):
    hub.sent[REVIEWS] = hub.files[REVIEWS][change] if change.stop else hub.files[REVIEWS] + b"more"
    with pytest.raises(InputError, match=words):
        fetch(tmp_path)
    assert files_of(tmp_path) == {}


def test_the_partial_file_of_another_revision_is_not_gone_on_with(hub, tmp_path):
    tmp_path.joinpath(f".{DOMAIN}.jsonl.0123456789ab.part").write_bytes(b"old")
    fetch(tmp_path)
    assert files_of(tmp_path)[f"{DOMAIN}.jsonl"] == hub.files[REVIEWS]
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, r"refuses it; log in by `hf auth login`, or set a valid HF_TOKEN, or put these files .* .HTTP 401."),
        (403, "refuses it; log in"),
        (429, "asks to wait; run this again later"),
        (500, "has trouble of its own with it; run this again later, or put"),
        (503, "has trouble of its own with it"),
    ],
)
def test_a_hub_that_refuses_is_told_in_one_line(hub, tmp_path, capfd, status, words):
    hub.statuses[REVIEWS] = status
    with pytest.raises(InputError, match=words) as told:
        fetch(tmp_path / "folder")
    assert f"into {tmp_path / 'folder'} yourself: {REVIEWS}, {METADATA}" in str(told.value)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "folder").exists()
    assert TOKEN not in capfd.readouterr().err


def test_a_hub_that_tells_no_hash_is_not_trusted(hub, tmp_path):
    hub.names_hashes = False
    with pytest.raises(InputError, match="tells no size and hash"):
        fetch(tmp_path)


def test_a_domain_without_the_file_is_told_with_the_domains(hub, tmp_path):
    with pytest.raises(
        InputError, match=r"raw/review_categories/Books\.jsonl at revision c+: .* does not have it; .*All_Beauty, "
    ):
        fetch(tmp_path, domain="Books")


@pytest.mark.parametrize(
    ("domain", "words"),
    [
        ("Musical_Instrument", "did you mean Musical_Instruments"),
        ("grocery & gourmet food", r"did you mean Grocery_and_Gourmet_Food\?"),
        ("Cars", "Its domains are All_Beauty, Amazon_Fashion"),
    ],
)
def test_a_wrong_domain_asks_nobody(hub, tmp_path, domain, words):
    with pytest.raises(InputError, match=words):
        fetch(tmp_path, domain=domain)
    assert hub.heads == []


def test_a_disk_that_is_too_small_is_told_before(hub, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(InputError, match=r"0\.00 GB free, but .* need 0\.00 GB; make room"):
        fetch(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert hub.asked == []


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_one_line_says_which_files_go_where(tmp_path, monkeypatch, capfd, offline):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    assert prepare(tmp_path) == 2
    error = capfd.readouterr().err
    line = next(line for line in error.splitlines() if "cannot be reached" in line)
    assert f"put these files of the dataset {download.REPOSITORY} into {tmp_path / 'raw'} yourself: {REVIEWS}" in line
    assert "Traceback" not in error
    assert not (tmp_path / "raw").exists()
    assert not (tmp_path / "run" / "data").exists()


def test_download_of_another_source_is_refused(tmp_path, capfd):
    assert prepare(tmp_path, "--source", "recbole") == 2
    assert "download is true, but source is recbole; the hub has files for amazon2023" in capfd.readouterr().err


def test_prepare_fetches_reads_and_is_finished_without_a_network(hub, prepared, tmp_path, capfd):
    for path, name in ((REVIEWS, "Synthetic.jsonl"), (METADATA, "meta_Synthetic.jsonl")):
        hub.files[path] = (prepared / "data" / "raw" / name).read_bytes()
    flags = ("--k_core", "2", "--min_history", "3")
    assert prepare(tmp_path, *flags, "--check") == 0
    assert hub.heads == []
    assert prepare(tmp_path, *flags) == 0
    assert {revision for _, revision in hub.heads} == {download.DownloadConfig().download_revision}
    assert (tmp_path / "run" / "data" / "catalog.jsonl").exists()
    hub.heads.clear()
    assert prepare(tmp_path, *flags) == 0
    assert hub.heads == []
    shown = capfd.readouterr().err
    assert "finished already" in shown
    assert TOKEN not in shown
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

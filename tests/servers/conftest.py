"""Runs of stage 1 against servers."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from servers.processes import ROOT, FaultServer
from twice_rec.stages import stage0_prepare, stage1_rationales

KEY = "test-key-4711-never-shown"
RECIPE = ["--config", str(ROOT / "recipes" / "tiny" / "rationales.yaml")]


@dataclass
class Run:
    """One run folder with prepared data, and stage 1 in it."""

    path: Path
    url: str
    flags: tuple[str, ...]

    def words(self, *more):
        """The command line of stage 1."""
        words = [*RECIPE, "--run_dir", str(self.path), "--annotator", "openai", "--model", "annotator"]
        words += ["--exemplars", str(ROOT / "recipes/exemplars/grocery.json"), "--base_url", self.url]
        return [*words, "--api_key_env", "TWICE_TEST_KEY", *self.flags, *more]

    def stage(self, *more):
        """Run it here; returns the exit status."""
        return stage1_rationales.main(self.words(*more))

    def start(self, *more):
        """Run it as a process of its own."""
        variables = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "twice_rec.stages.stage1_rationales", *self.words(*more)]
        return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def killed_after(self, answers):
        """Start it and SIGKILL it when so many more answers are stored."""
        wanted = self.stored() + answers
        process = self.start()
        deadline = time.monotonic() + 300
        while self.stored() < wanted and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        return process.returncode, output

    def stored(self):
        """How many answers are stored."""
        path = self.path / "answers" / "rationales.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def results(self):
        """The bytes of both result files."""
        return [(self.path / "rationales" / name).read_bytes() for name in ("accepted.jsonl", "rejected.jsonl")]

    def files(self):
        """Every file of the run."""
        return [path for path in self.path.rglob("*") if path.is_file()]


@pytest.fixture(autouse=True)
def api_key(monkeypatch):
    """The key that the servers here take; no proxy stands between."""
    monkeypatch.setenv("TWICE_TEST_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return KEY


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """The synthetic domain with 2,000 users, prepared."""
    run_dir = tmp_path_factory.mktemp("prepared")
    flags = ["--synthetic_users", "2000", "--synthetic_items", "60", "--k_core", "2"]
    words = ["--config", str(ROOT / "recipes" / "tiny" / "prepare.yaml"), "--run_dir", str(run_dir), *flags]
    assert stage0_prepare.main(words) == 0
    return run_dir


@pytest.fixture
def new_run(prepared, tmp_path):
    """Makes runs of stage 1 against a URL."""

    def make(url, *flags, name="run"):
        path = tmp_path / name
        shutil.copytree(prepared / "data", path / "data")
        return Run(path, url, flags)

    return make


@pytest.fixture
def fault_server(tmp_path):
    """Starts misbehaving servers; all end with the test."""
    servers = []

    def start(**options):
        folder = tmp_path / f"server{len(servers)}"
        folder.mkdir()
        servers.append(FaultServer(folder, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()

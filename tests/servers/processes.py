"""Servers as processes of their own, for tests: the misbehaving chat API and a real vLLM on the CPU."""

import contextlib
import os
import platform
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
START_SECONDS = 400  # vLLM's imports alone take a minute where the disk is cold and the cores are shared

# There test.sh installs it, and where it is missing all the same these tests fail.
NEEDS_VLLM = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="vLLM on a CPU needs Linux on x86_64"
)


class FaultServer:
    """`fault_server.py`; `with` ends it. `options` are its command line without dashes."""

    def __init__(self, folder, **options):
        self.log = folder / "answered.log"
        self._words = [f"--{name}={value}" for name, value in {"log": self.log, **options}.items()]
        self.port = 0
        self.start()

    def start(self):
        """Start it, on the port it had before if it was killed."""
        command = [
            sys.executable,
            str(Path(__file__).with_name("fault_server.py")),
            f"--port={self.port}",
            *self._words,
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self._process.stdout.readline())

    def kill(self):
        """SIGKILL."""
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def answered(self):
        """Hashes of the requests that were answered, in order."""
        return self.log.read_text().split() if self.log.exists() else []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()


def free_port():
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_alive(pid):
    """Whether a process runs; one that ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def vllm_server(model, folder, *flags, name="served", **environment):
    """Serve a model folder with vLLM on the CPU in float32; yields the API's base URL. The log is in `folder`."""
    port, log = free_port(), Path(folder) / "vllm.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", name, "--dtype", "float32", "--enforce-eager", "--generation-config", "vllm"]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    variables = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=variables, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_up(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, f"vLLM ended:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"vLLM is not up after {START_SECONDS} s:\n{log.read_text()[-3000:]}"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_up(url):
    """Whether a URL answers."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except OSError:
        return False

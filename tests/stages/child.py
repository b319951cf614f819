"""A stage in a process of its own, which may end before any of its operations on files."""

import importlib
import os
import signal
import sys
import traceback
from pathlib import Path

import huggingface_hub
import torch

WRITING = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "shutil.rmtree"}
LAST = "operations"  # a file: how many operations a whole run takes


def be(module, words, run_dir, kill_at, environment):
    """Run a stage until it ends, or before it does that operation on files; its words go to a file beside the run."""
    status = 99
    torch.set_num_threads(1)
    os.environ.update(environment)
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # as in the tests' own process; the tokenizer's file tells of it
    try:
        output, done = os.open(Path(run_dir).parent / "output", os.O_WRONLY | os.O_TRUNC), 0
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115

        def see(name, arguments):
            nonlocal done
            writes = name in WRITING or (
                name == "open" and (arguments[1] or "w") not in ("r", "rb") and arguments[2] & 3
            )
            if writes and str(arguments[0]).startswith(str(run_dir)):
                done += 1
                if done == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(see)
        status = importlib.import_module(module).main(words)
        sys.stderr.flush()
        if kill_at is None:
            (Path(run_dir).parent / LAST).write_text(str(done))
    except BaseException:  # noqa: BLE001 - a child must not go on with pytest
        traceback.print_exc()
    finally:
        os._exit(status)

"""vLLM's API server, run by `python -m`; its child processes end with it, also if it is killed by SIGKILL.

vLLM 0.31 computes in child processes. A SIGKILL of the API server leaves them behind with the GPU's memory: no option
of vLLM changes that, and its API server does not run without them. So each child asks Linux to be killed as soon as its
parent has ended. If `multiprocessing` spawns a child, it runs the main module again, this one, with the name
`__mp_main__`; if it forks one, Python calls what is registered for that. (A child whose parent ends before all this
ends by itself: vLLM's engine waits five minutes for its server's handshake before it loads anything.)
"""

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Ask Linux to kill this process as soon as its parent has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__mp_main__":
    end_with_parent()
if __name__ == "__main__":
    os.register_at_fork(after_in_child=end_with_parent)
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")

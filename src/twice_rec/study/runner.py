"""Runs the plan of a study: as many processes at once as there are places, each behind what it waits for.

A run that fails ends nothing but what waits for it. Whoever ends the study, also by SIGKILL, ends its processes: they
lose nothing, since every stage goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from twice_rec.errors import InputError
from twice_rec.files import MANIFEST, write_json
from twice_rec.grpo.rollout.vllm_process import end_with_parent
from twice_rec.masking import masked, masked_words
from twice_rec.study.links import make_link
from twice_rec.study.places import Places, flags_of_servers, num_servers
from twice_rec.study.plan import Run, waits_for

logger = logging.getLogger("study")

WAITING, RUNNING, DONE, THERE, FAILED, SKIPPED, STOPPED = (
    "waiting", "running", "done", "was there", "failed", "skipped", "stopped",
)  # fmt: skip
GOOD = (DONE, THERE)
_PAUSE, _PATIENCE = 0.2, 30.0  # seconds between looks at the processes, and until one that is to end is killed
_TAIL = 20_000  # bytes of a log in which its last error is looked for


@dataclass
class Row:
    """A run and what has become of it."""

    run: Run
    log: Path
    state: str = WAITING
    seconds: float | None = None
    says: str = ""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)  # the stage, perhaps behind it its servers
    taken: list[str] = field(default_factory=list)  # its places
    started: float = 0.0
    logs_begin: dict[Path, int] = field(default_factory=dict)  # log -> its size before this run
    more: list[str] = field(default_factory=list)  # flags that are known only when it starts: of the domains' reports

    def last_error(self, log: Path) -> str:
        """Return the last error in a log of this run, of one with a trace the exception, or else its last line."""
        try:
            with open(log, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self.logs_begin.get(log, 0), size - _TAIL))
                lines = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
        except OSError:
            lines = []
        lines = [line.strip() for line in lines if line.strip()]
        errors = [number for number, line in enumerate(lines) if line.startswith(("error:", "critical:"))]
        with_trace = errors and lines[errors[-1] + 1 : errors[-1] + 2] == ["Traceback (most recent call last):"]
        found = lines[errors[-1]] if errors and not with_trace else (lines or ["it wrote nothing"])[-1]
        return masked(found.removeprefix("error: ")[:500])

    def as_json(self) -> dict[str, object]:
        """Return it for study.json."""
        run = self.run
        return {
            "domain": run.recipe.domain, "seed": run.seed, "stage": run.stage, "what": run.what, "state": self.state,
            "seconds": self.seconds, "says": self.says, "run_dir": str(run.run_dir), "log": str(self.log),
            "command": masked_words(run.command(*self.more)[1:]),
        }  # fmt: skip


class Runner:
    """Runs a plan.

    Args:
        runs: in an order in which each is behind those that it waits for.
        folder: gets logs/ and study.json.
    """

    def __init__(self, runs: Sequence[Run], places: Places, folder: Path):
        self._places = places
        self._free = places.names
        self._folder = folder
        self.rows = [Row(run, folder / "logs" / f"{_file_name(run)}.log") for run in runs]
        self._of = {row.run: row for row in self.rows}
        self._waits_for = {run: waits_for(run, runs) for run in runs}

    def run(self) -> list[Row]:
        """Run everything; return what has become of each run. KeyboardInterrupt ends the processes first."""
        (self._folder / "logs").mkdir(parents=True, exist_ok=True)
        with _sigterm_is_ctrl_c():
            try:
                while any(row.state in (WAITING, RUNNING) for row in self.rows):
                    self._look()
                    self._skip()
                    self._start()
                    time.sleep(_PAUSE)
            except BaseException:
                self._stop_all()
                raise
            finally:
                self._save()
        return self.rows

    def _look(self) -> None:
        """Notice processes that have ended."""
        for row in self.rows:
            if row.state != RUNNING:
                continue
            stage, *servers = row.processes
            status = stage.poll()
            if status is None and any(server.poll() is not None for server in servers):
                self._end(row, FAILED, f"its rollout server ended: {row.last_error(_server_log(row.log))}")
            elif status == 0:
                self._end(row, DONE if _is_newer(row) else THERE)
            elif status is not None:
                killed = f"ended by signal {-status}: " if status < 0 else ""
                self._end(row, FAILED, killed + row.last_error(row.log))

    def _end(self, row: Row, state: str, says: str = "") -> None:
        _stop(row.processes)
        seconds = round(time.time() - row.started, 1)
        row.seconds, row.state, row.says = None if state == THERE else seconds, state, says
        self._free, row.taken = [*self._free, *row.taken], []
        self._tell(row)

    def _skip(self) -> None:
        """Give up what waits for a run that failed; a report runs all the same."""
        for row in self.rows:
            lost = [self._of[other] for other in self._waits_for[row.run]]
            lost = [other for other in lost if other.state in (FAILED, SKIPPED)]
            if row.state == WAITING and lost and not row.run.reports_on:
                row.state, row.says = SKIPPED, f"needs {lost[0].run.name}, which {_became(lost[0])}"
                self._tell(row)

    def _start(self) -> None:
        """Start what waits for nothing any more, as far as there are places."""
        for row in self.rows:
            running = sum(other.state == RUNNING for other in self.rows)
            if row.state != WAITING or running >= self._places.processes:
                continue
            over = (*GOOD, FAILED, SKIPPED) if row.run.reports_on else GOOD
            if all(self._of[other].state in over for other in self._waits_for[row.run]):
                needed = self._places.needed(row.run)
                if needed > len(self._free):
                    return  # and nobody overtakes it, or it would wait for ever
                row.taken, self._free = self._free[:needed], self._free[needed:]
                self._begin(row)

    def _begin(self, row: Row) -> None:
        row.started, row.state = time.time(), RUNNING
        run, places = row.run, self._places
        try:
            for name, target in run.links.items():
                make_link(run.run_dir / name, target)
        except InputError as error:
            self._end(row, FAILED, str(error))
            return
        row.logs_begin = {log: log.stat().st_size for log in (row.log, _server_log(row.log)) if log.exists()}
        row.more = self._flags_of_domains(run)
        more = [*flags_of_servers(run), *row.more]
        row.processes.append(_process(run.command(*more), places.environment(row.taken), row.log))
        if num_servers(run):
            server = _process(run.server_command(*more), places.environment_of_servers(row.taken), _server_log(row.log))
            row.processes.append(server)

    def _flags_of_domains(self, run: Run) -> list[str]:
        """Return the flags of the report that sums up: which domains have a report, and which have none."""
        if not run.sums_up:
            return []
        rows = [self._of[other] for other in self._waits_for[run] if other.reports_on]
        there = [str(row.run.makes[0]) for row in rows if row.state in GOOD]
        missing = [row.run.domain for row in rows if row.state not in GOOD]
        return ["--domain_reports", json.dumps(there), "--missing_domains", json.dumps(missing)]

    def _tell(self, row: Row) -> None:
        """Log a line about a run that is over, and save the table."""
        over = sum(other.state not in (WAITING, RUNNING) for other in self.rows)
        took = f" in {row.seconds:,.0f} s" if row.seconds is not None else ""
        says = f": {row.says}" if row.says else ""
        log = logger.info if row.state in GOOD else logger.error
        log("[%d/%d] %s %s%s%s", over, len(self.rows), row.run.name, row.state, took, says)
        self._save()

    def _stop_all(self) -> None:
        """End all processes as Ctrl-C does, and wait for them."""
        running = [row for row in self.rows if row.state == RUNNING]
        for row in running:
            _ask(row.processes[:1], signal.SIGINT)
        for row in running:
            _stop(row.processes)
            row.state, row.says = STOPPED, "the study was ended; the same command goes on"

    def _save(self) -> None:
        write_json(self._folder / "study.json", {"runs": [row.as_json() for row in self.rows]})


def _became(row: Row) -> str:
    return "failed" if row.state == FAILED else "was skipped"


def _process(command: Sequence[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, so that Ctrl-C in the terminal reaches it through the study only."""
    with open(log, "ab") as out:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True, preexec_fn=_before_it_starts,
        )  # fmt: skip


def _before_it_starts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that starts the study in the background has it ignored
    end_with_parent()


def _ask(processes: Sequence[subprocess.Popen[bytes]], sign: signal.Signals) -> None:
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the processes of a run with all of theirs: the stage as Ctrl-C does, its servers by SIGTERM."""
    _ask(processes[:1], signal.SIGINT)
    _ask(processes[1:], signal.SIGTERM)
    deadline = time.monotonic() + _PATIENCE
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _ask([process], signal.SIGKILL)
            process.wait()


def _is_newer(row: Row) -> bool:
    """Whether something that a run makes was written since it started; True if it makes nothing that is known."""
    paths = [path / MANIFEST for path in row.run.makes]
    return not paths or any(path.exists() and path.stat().st_mtime >= row.started for path in paths)


def _server_log(log: Path) -> Path:
    return log.with_name(f"{log.stem}.server.log")


def _file_name(run: Run) -> str:
    return run.name.replace("seed ", "seed").replace(" ", "_").replace("/", "_")


@contextlib.contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    """Let SIGTERM end the study as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {sign: signal.getsignal(sign) for sign in (signal.SIGTERM, signal.SIGINT)}
    for sign in before:
        signal.signal(sign, interrupt)
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)

"""Ends every stage at random moments, starts it twice at once, fills its disk; runs it again and compares the results.

    python tests/endurance.py [kills] [pairs] [disks] [--stages sft grpo] [--moments 20]

A run that was disturbed and then completed must hold what an undisturbed one holds, but for times. `disks` mounts small
file systems in memory, so it needs root on Linux. It takes about a minute per stage and 10 moments, so CI does not run
it; `tests/stages/test_pipeline.py` has one moment of each stage.
"""

import argparse
import contextlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT)]

from stages.pipeline import STAGES, start  # noqa: E402
from twice_rec.markdown import markdown_table  # noqa: E402

# What differs from run to run: times, means over the steps since a resume, and the order in which PEFT writes a set.
_TIMES = re.compile(r"seconds|step_time|runtime|per_second|^about$|^stamps$|^outputs$|^command$|^rests_on$|^started$")
_MEANS = re.compile(r"^train_loss$|^entropy$|^mean_token_accuracy$|^num_tokens$")
_NO_RESULT = re.compile(r"logs|\.locks|checkpoint-|damaged-")  # checkpoints hold the order of sets, and times
_UNLIKE = ("training_args.bin", "README.md", "index.html")


def plain(value):
    """A JSON value without times."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if not _TIMES.search(k) and not _MEANS.search(k)}
    if isinstance(value, list):
        values = [plain(v) for v in value]
        return sorted(values) if all(isinstance(v, str) and v.endswith("_proj") for v in values) else values
    return value


def contents(run_dir):
    """File -> what is in it, of all results; logs and locks are none."""
    found = {}
    for path in sorted(run_dir.rglob("*")):
        name = path.relative_to(run_dir)
        if not path.is_file() or path.name in _UNLIKE or any(_NO_RESULT.match(part) for part in name.parts):
            continue
        data = path.read_bytes()
        if path.suffix == ".json":
            data = plain(json.loads(data))
        elif path.suffix == ".jsonl":
            data = [plain(json.loads(line)) for line in data.splitlines()]
        found[str(name)] = data
    return found


class Bench:
    """A run whose stages are undone and run again at will, always in the same folder."""

    def __init__(self, root):
        self.root, self.run_dir = root, root / "run" / "tiny"
        self.after, self.seconds, self.bytes = {}, {}, {}
        for stage in STAGES:
            shutil.copytree(self.run_dir, self.snapshot(stage)) if self.run_dir.exists() else None
            before, began = size(self.run_dir), time.time()
            status, said = self.run(stage)
            assert status == 0, said
            self.seconds[stage], self.bytes[stage] = time.time() - began, size(self.run_dir) - before
            self.after[stage] = contents(self.run_dir)

    def snapshot(self, stage):
        """The folder that holds the run as it was before a stage."""
        return self.root / "before" / stage

    def undo(self, stage):
        """Make the run what it was before a stage."""
        if self.run_dir.exists():
            shutil.rmtree(self.run_dir)
        if self.snapshot(stage).exists():
            shutil.copytree(self.snapshot(stage), self.run_dir)

    def start(self, stage):
        """Start a stage."""
        return start(stage, self.run_dir, self.run_dir / "base")

    def run(self, stage):
        """Run a stage to its end; its exit status and what it said."""
        process = self.start(stage)
        said, _ = process.communicate(timeout=600)
        return process.returncode, said

    def complete(self, stage):
        """Run a disturbed stage again; what is wrong with its results, or None."""
        status, said = self.run(stage)
        if status:
            return f"exit {status}: {said[-400:]}"
        now = contents(self.run_dir)
        wrong = [name for name in now.keys() | self.after[stage].keys() if now.get(name) != self.after[stage].get(name)]
        return f"differs: {', '.join(sorted(wrong)[:6])}" if wrong else None


def size(folder):
    """Bytes that a folder takes in pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def kills(bench, stage, moments, draw):
    """SIGKILL at moments from the stage's first write to behind its end."""
    faults, reached, working = [], 0, 0.0
    for number in range(moments + 1):
        bench.undo(stage)
        process, locks = bench.start(stage), bench.run_dir / ".locks"
        before = {path: path.stat().st_mtime_ns for path in locks.glob("*")}
        while process.poll() is None and {p: p.stat().st_mtime_ns for p in locks.glob("*") if p.exists()} == before:
            time.sleep(0.002)
        began = time.time()
        if number:  # the first one measures how long the work takes
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(draw.uniform(0, working))
        else:
            process.wait()
            working = time.time() - began
            continue
        reached += process.poll() is None
        process.kill()
        said = process.communicate()[0]
        faults += [f"traceback: {said[-400:]}"] if "Traceback" in said else []
        faults += filter(None, [bench.complete(stage)])
    return f"{reached} of {moments} within {working:.1f} s", faults


def pairs(bench, stage, moments, draw):
    """Two processes at once: one is refused, or finds everything done."""
    faults, refused = [], 0
    for _ in range(max(1, moments // 5)):
        bench.undo(stage)
        processes = [bench.start(stage)]
        time.sleep(draw.uniform(0, 0.5))
        processes.append(bench.start(stage))
        ends = [(process.communicate(timeout=600)[0], process.returncode) for process in processes]
        for said, status in ends:
            if status:
                refused += 1
                one_line = [line for line in said.splitlines() if "error:" in line]
                if status != 2 or len(one_line) != 1 or "by process" not in said or "Traceback" in said:
                    faults.append(f"exit {status}: {said[-400:]}")
        if all(status for _, status in ends):
            faults.append("both were refused")
        faults += filter(None, [bench.complete(stage)])
    return f"{max(1, moments // 5)}, {refused} refused", faults


def disks(bench, stage, moments, draw):
    """A disk that fills up at several places, and one that is read-only."""
    faults, full, pages = [], 0, size(bench.snapshot(stage)) if bench.snapshot(stage).exists() else 0
    shares = [draw.uniform(0, 1) for _ in range(max(2, moments // 4))]
    parent = bench.run_dir.parent
    for share in [*shares, None]:
        bench.undo(stage)
        kept = bench.root / "kept"
        bench.run_dir.rename(kept) if bench.run_dir.exists() else None
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(parent)], check=True)
        try:
            if kept.exists():
                shutil.copytree(kept, bench.run_dir)
            room = pages + int((share or 0) * bench.bytes[stage]) + 65536
            option = "remount,ro" if share is None else f"remount,size={room}"
            subprocess.run(["mount", "-o", option, str(parent)], check=True)
            status, said = bench.run(stage)
            if status:
                full += 1
                lines = [line for line in said.splitlines() if "error:" in line]
                if status != 1 or len(lines) != 1 or "cannot write" not in lines[0] or "Traceback" in said:
                    faults.append(f"exit {status}: {said[-600:]}")
            elif share is None and stage not in ("serve",):
                faults.append("a read-only disk went unnoticed")
            subprocess.run(["mount", "-o", "remount,rw,size=1g", str(parent)], check=True)
            faults += filter(None, [bench.complete(stage)])
        finally:
            subprocess.run(["umount", "-l", str(parent)], check=True)
            shutil.rmtree(kept, ignore_errors=True)
    return f"{full} of {len(shares) + 1}", faults


WAYS = {"kills": kills, "pairs": pairs, "disks": disks}


def main():
    """Disturb every stage in every way and print a table; exit status 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ways", nargs="*", default=list(WAYS), help=f"of {', '.join(WAYS)}; by default all")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, rows, lost = random.Random(options.seed), [], 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for stage in options.stages:
            row = [stage]
            for way in options.ways:
                said, faults = WAYS[way](bench, stage, options.moments, draw)
                lost += len(faults)
                row.append(f"{said}; {len(faults)} faults")
                print(stage, way, said, *faults, sep="\n  ", flush=True)
            rows.append(row)
    print(markdown_table(["stage", *options.ways], rows))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())

"""Whatever is given, a stage ends with whole results, or with one message, and then it has begun nothing.

TWICE_REC_FUZZ=20 draws twenty times as many inputs, and others each time; `--hypothesis-seed` repeats them.
"""

import contextlib
import functools
import http.server
import importlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from servers import moods
from servers.fault_server import good
from stages import child, odd_inputs
from stages.pipeline import ALL, ROOT, STAGES, words
from twice_rec import prompts
from twice_rec.answer_format import parse
from twice_rec.catalog import Outcome
from twice_rec.cf.recipe import BaselinesRecipe, SASRecRecipe
from twice_rec.data.dataset import PreparedData, candidates_file
from twice_rec.data.recipe import PrepareRecipe
from twice_rec.evaluation.recipe import AbTestRecipe, EvaluateRecipe, JudgeRecipe, ReportRecipe
from twice_rec.files import MANIFEST, hash_file, read_records
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.manifest import BEGUN
from twice_rec.rationales.recipe import RationalesRecipe
from twice_rec.records import SPLITS, CandidateLists
from twice_rec.sft.recipe import SDPORecipe, SFTRecipe
from twice_rec.sharing.recipe import ShareRecipe
from twice_rec.stages import command_line
from twice_rec.study.recipe import StudyRecipe

TIMES = int(os.environ.get("TWICE_REC_FUZZ", "0"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900 * max(1, TIMES))]

SECRETS = ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY")
SECRET = "planted-in-the-environment-31"
SMALL = {
    "prepare": ("--synthetic_users", "60", "--num_candidates", "5"),
    "base": ("--vocab_size", "300", "--steps", "2", "--hidden_size", "16", "--intermediate_size", "16"),
    "rationales": ("--max_rationales", "20"),
    "sft": ("--max_steps", "3"),
    "sasrec": ("--epochs", "1", "--hidden_size", "8"),
    "evaluate": ("--num_users", "3"),
}


def fuzz(examples):
    """So many examples: always the same ones, or with TWICE_REC_FUZZ many more."""
    return settings(
        max_examples=examples * max(1, TIMES), derandomize=not TIMES, deadline=None, database=None, print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    """Secrets that may appear nowhere; and the hub is out of reach."""
    for name in SECRETS:
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Forked children have one thread of torch or hang; sums with another number of threads differ in the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_thread):
    """A whole run; (run folder, base model)."""
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    base = run_dir / "base"
    for stage in STAGES:
        status, output = said(stage, words(stage, run_dir, base, *SMALL.get(stage, ())))
        assert status == 0, output
    return run_dir, base


@contextlib.contextmanager
def folder(parent):
    """A new folder, which is the working folder for as long as it is there."""
    with tempfile.TemporaryDirectory(dir=parent) as name, contextlib.chdir(name):
        yield Path(name)


def said(stage, given_words):
    """Run a stage in this process; returns its exit status and all that it said."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = importlib.import_module(ALL[stage][0]).main(given_words)
    return status, output.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# The rule


def holds(run_dir, status, output, statuses=(0, 2)):
    """The rule for one run of a stage."""
    event(f"exit status {status}")
    assert "Traceback" not in output
    assert SECRET not in output
    assert status in statuses, output
    assert len(re.findall(r"^error: ", output.replace("\r", "\n"), re.MULTILINE)) == (status != 0), output
    for path in [path for path in run_dir.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        assert SECRET.encode() not in content, path
        if path.relative_to(run_dir).parts[0] == "logs":
            assert status == 1 or b"Traceback" not in content
        elif path.relative_to(run_dir).parts[0] != ".locks":
            is_whole(path, content)
            assert path.name[0] != "." or (path.name == BEGUN and status == 1), f"{path} is left"
    for manifest in run_dir.rglob(MANIFEST):
        assert not (manifest.parent / BEGUN).exists()
        for name, digest in json.loads(manifest.read_bytes())["outputs"].items():
            assert hash_file(run_dir / name) == digest, name


def begun(results):
    """What is refused has begun nothing."""
    assert not results.exists()


def is_whole(path, content):
    """JSON parses to its end, and holds no NaN."""
    if path.suffix == ".json":
        json.loads(content, parse_constant=pytest.fail)
    elif path.suffix == ".jsonl":
        assert content.endswith(b"\n") or not content, path
        for line in content.splitlines():
            json.loads(line, parse_constant=pytest.fail)


def is_consistent(run_dir):
    """The files of stage 0 fit together, and every right answer is a hit."""
    data = PreparedData(run_dir / "data")
    figures = json.loads((run_dir / "data" / "statistics.json").read_text())
    config = json.loads((run_dir / "data" / MANIFEST).read_text())["config"]
    assert (figures["users"], figures["items"]) == (len(data.sequences), len(data.catalog))
    for item in data.catalog:
        assert data.catalog.outcome(parse(prompts.item_answer(item)), data.catalog.ids, item.item_id) is Outcome.HIT
    owned = {sequence.user_id: [entry.item_id for entry in sequence.interactions] for sequence in data.sequences}
    assert len(owned) == len(data.sequences)
    for sequence in data.sequences:
        times = [entry.timestamp for entry in sequence.interactions]
        assert times == sorted(times)
        assert all(entry.rating is None or 1 <= entry.rating <= 5 for entry in sequence.interactions)
    for split in SPLITS:
        drawn = (
            list(read_records(run_dir / "data" / candidates_file(split), CandidateLists))
            if figures[f"{split}_targets"]
            else []
        )
        assert len(drawn) == figures[f"{split}_targets"]
        for row in drawn:
            for ids in row.lists.values():
                assert len(set(ids)) == len(ids) == config["num_candidates"]
                assert set(ids) & set(owned[row.user_id]) == {row.target}
    assert (config["repeats"] == "keep") or all(len(set(items)) == len(items) for items in owned.values())
    for value in figures.values():
        assert not isinstance(value, float) or math.isfinite(value)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes

RECIPES = {
    "prepare": PrepareRecipe, "rationales": RationalesRecipe, "sft": SFTRecipe, "sdpo": SDPORecipe,
    "sasrec": SASRecRecipe,
    "grpo": GRPORecipe, "evaluate": EvaluateRecipe, "judge": JudgeRecipe, "ab_test": AbTestRecipe,
    "baselines": BaselinesRecipe, "report": ReportRecipe, "share": ShareRecipe, "study": StudyRecipe,
}  # fmt: skip
assert set(RECIPES) == set(command_line.STAGES) - {"serve"}, "a new stage is drawn as well"


def results_of(run_dir):
    """Path -> bytes of every file but logs and locks."""
    paths = [path.relative_to(run_dir) for path in run_dir.rglob("*") if path.is_file()]
    return {path: (run_dir / path).read_bytes() for path in paths if path.parts[0] not in ("logs", ".locks")}


@pytest.mark.parametrize("stage", RECIPES)
@fuzz(25)
@given(data=st.data())
def test_recipes(finished, tmp_path, stage, data):
    run_dir, _ = finished
    before = results_of(run_dir)
    with folder(tmp_path) as here:
        content, flags = data.draw(
            odd_inputs.recipe_files(RECIPES[stage], ROOT / "recipes" / "tiny" / f"{ALL[stage][1]}.yaml")
        )
        (here / "recipe.yaml").write_bytes(content)
        how = data.draw(st.sampled_from(["--check", "--check", "--show"]))
        status, output = said(stage, ["recipe.yaml", *flags, "--run_dir", str(run_dir), how])
        event(stage)
        holds(run_dir, status, output)
        assert results_of(run_dir) == before
        assert [path.name for path in here.iterdir()] == ["recipe.yaml"]


# ---------------------------------------------------------------------------------------------------------------------
# Data


def put(place, files):
    """Write the files of a data set; None is a folder."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for name, content in files.items():
        (place / name).mkdir() if content is None else (place / name).write_bytes(content)


@fuzz(100)
@given(
    drawn=odd_inputs.data_sets(),
    keys=st.fixed_dictionaries({}, optional=odd_inputs.PREPARE_KEYS),
    further=st.integers(0, 9),
)
def test_data_sets(finished, tmp_path, drawn, keys, further):
    source, files = drawn
    with folder(tmp_path) as here:
        run_dir = here / "run"
        put(here / "source", files)
        common = ["--source", source, "--source_dir", str(here / "source")]
        status, output = said("prepare", words("prepare", run_dir, None, *common, *odd_inputs.prepare_flags(keys)))
        event(f"{source}: {status}")
        holds(run_dir, status, output)
        if status:
            begun(run_dir / "data")
            put(
                here / "source",
                {name: odd_inputs.rendered(name, rows) for name, rows in odd_inputs.DATA[source]().items()},
            )
            status, output = said("prepare", words("prepare", run_dir, None, *common, *odd_inputs.prepare_flags({})))
            assert status == 0, output
        elif not further:  # a refused replacement leaves what was there
            put(here / "source", dict.fromkeys(files, b"?\n"))
            before = results_of(run_dir)
            status, output = said(
                "prepare", words("prepare", run_dir, None, *common, "--overwrite", "true", "--domain", "D")
            )
            holds(run_dir, status, output, (2,))
            assert results_of(run_dir) == before
        is_consistent(run_dir)
        later(run_dir, finished[1], further)


def later(run_dir, base, further):
    """Stages that read the data, some of the time."""
    flags = {
        1: ("sasrec", "--epochs", "1", "--hidden_size", "8", "--lists", "uniform", "full"),
        2: ("rationales",),
        3: ("evaluate", "--variants", "base", "--num_users", "2"),
    }.get(further)
    if flags:
        stage, *flags = flags
        status, output = said(stage, words(stage, run_dir, base, "--domain", "D", *flags))
        event(f"{stage} of odd data: {status}")
        holds(run_dir, status, output)


# ---------------------------------------------------------------------------------------------------------------------
# Models


@fuzz(24)
@given(changes=odd_inputs.model_changes(), how=st.sampled_from(["check", "sft", "evaluate"]))
def test_models(finished, tmp_path, changes, how):
    whole, base = finished
    with folder(tmp_path) as here:
        run_dir, model = here / "run", here / "model"
        for name in ("data", "rationales"):
            shutil.copytree(whole / name, run_dir / name)
        shutil.copytree(base, model, ignore=shutil.ignore_patterns(MANIFEST))
        for name, change in changes.items():
            content = change((model / name).read_bytes() if (model / name).exists() else b"")
            (model / name).unlink(missing_ok=True) if content is None else (model / name).write_bytes(content)
        stage, flags = {
            "check": ("sft", ["--check"]),
            "sft": ("sft", ["--max_steps", "1"]),
            "evaluate": ("evaluate", ["--variants", "base", "--num_users", "2"]),
        }[how]
        status, output = said(stage, words(stage, run_dir, model, *flags))
        event(f"{how}: {status}")
        holds(run_dir, status, output)
        if status:
            begun(run_dir / ("sft" if stage == "sft" else "eval/base"))
            shutil.copytree(base, model, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
            (model / "adapter_config.json").unlink(missing_ok=True)
            status, output = said(stage, words(stage, run_dir, model, *flags))
            assert status == 0, output


# ---------------------------------------------------------------------------------------------------------------------
# APIs


class Api(http.server.BaseHTTPRequestHandler):
    """Answers the first requests as it is told, and the others well."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._send(200, "", json.dumps(moods.MODELS).encode())

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        told = self.server.told.pop(0) if self.server.told else None
        if told == "close":
            self.close_connection = True
        elif told is None:
            answer = moods.message(good(asked, random.Random(1)))
            if asked.get("stream"):
                choice = answer["choices"][0]
                choice["delta"] = choice.pop("message")
                events = f"data: {json.dumps(answer)}\n\ndata: [DONE]\n\n"
                self._send(200, "Content-Type: text/event-stream", events.encode())
            else:
                self._send(200, "", json.dumps(answer).encode())
        else:
            self._send(*told)

    def _send(self, status, header, body):
        self.send_response(status)
        name, _, value = header.partition(": ")
        if name:
            self.send_header(name, value)
        if name != "Content-Length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Say nothing."""


@pytest.fixture(scope="module")
def api():
    """A server in this process; `told` is what becomes of the next requests."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
    server.told = []
    server.handle_error = lambda *arguments: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


GOOD = moods.message(json.dumps({"rationale": "tea " * 9, "verdict": "relevant", "evidence": [1], "confidence": 0.5}))
API_KEYS = {
    "stream": st.just("true"),
    "structured_outputs": st.just("false"),
    "self_check": st.sampled_from(["true", "pick"]),
    "max_unanswered": st.just("9"),
    "max_attempts": st.sampled_from(["1", "3"]),
    "max_failures_in_a_row": st.sampled_from(["1", "3"]),
    "max_reasks": st.just("0"),
    "concurrency": st.just("4"),
}


@fuzz(36)
@given(told=st.lists(odd_inputs.responses(GOOD, SECRET), max_size=8), keys=st.fixed_dictionaries({}, optional=API_KEYS))
def test_apis(finished, tmp_path, monkeypatch, api, told, keys):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    flags = [
        "--annotator",
        "openai",
        "--model",
        "annotator",
        "--exemplars",
        str(ROOT / "recipes/exemplars/grocery.json"),
    ]
    flags += [
        "--base_url",
        f"http://127.0.0.1:{api.server_port}/v1",
        "--backoff_seconds",
        "0",
        "--timeout_seconds",
        "5",
    ]
    flags += ["--max_rationales", "5", "--max_words", "100", "--concurrency", "1"]
    flags += [word for name, value in keys.items() for word in (f"--{name}", value)]
    with folder(tmp_path) as here:
        shutil.copytree(finished[0] / "data", here / "run" / "data")
        api.told = list(told)
        status, output = said("rationales", words("rationales", here / "run", None, *flags))
        holds(here / "run", status, output, (0, 1, 2))
        api.told = []
        if status:
            status, output = said("rationales", words("rationales", here / "run", None, *flags))
            holds(here / "run", status, output, (0,))
        results = here / "run" / "rationales"
        rows = [
            json.loads(line)
            for name in ("accepted", "rejected")
            for line in (results / f"{name}.jsonl").read_text().splitlines()
        ]
        assert len({row["user_id"] for row in rows}) == len(rows) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Kills

OWN = {"prepare": "data", "evaluate": "eval", "sasrec": "sasrec"}  # folder that a stage makes, if not of its name
TELLING = {
    "training_args.bin", "trainer_state.json", "train_results.json", "all_results.json", "adapter_config.json",
    "README.md", "log.jsonl", "index.html", "results.json",
}  # fmt: skip


SERVER = multiprocessing.get_context("forkserver")  # its processes have read the packages, and have no threads yet
SERVER.set_forkserver_preload(["torch", "trl", *(module for module, _, _ in STAGES.values())])


def start(stage, run_dir, base, kill_at=None):
    """Run a stage in a process of its own, which ends before it does that operation on files.

    It is no fork of this process: polars has threads here, which are not there after a fork.
    """
    (run_dir.parent / "output").touch()
    flags = words(stage, run_dir, base, *SMALL.get(stage, ()))
    given = (STAGES[stage][0], flags, str(run_dir), kill_at, {name: os.environ[name] for name in SECRETS})
    process = SERVER.Process(target=child.be, args=given)
    process.start()
    return process


def begin_again(whole, stage, parent):
    """A copy of a whole run without the results of a stage, and of those after it."""
    run_dir = parent / "run"
    first = list(STAGES).index(stage)
    later_folders = [OWN.get(name, name) for name in list(STAGES)[first:] if name not in ("base", "serve")]
    later_folders += ["eval"] if first <= list(STAGES).index("evaluate") else []
    shutil.copytree(whole, run_dir, ignore=lambda place, names: later_folders if Path(place) == whole else [])
    return run_dir


@functools.cache
def undisturbed(whole, base, stage):
    """The results of a stage in a child that nobody kills, its seconds, and how many operations on files it takes."""
    with tempfile.TemporaryDirectory() as name:
        run_dir, started = begin_again(whole, stage, Path(name)), time.monotonic()
        process = start(stage, run_dir, base)
        process.join()
        assert process.exitcode == 0, (run_dir.parent / "output").read_text()
        return comparable(run_dir), time.monotonic() - started, int((run_dir.parent / child.LAST).read_text())


def comparable(run_dir):
    """The results without what tells of times and places, and without what a trainer goes on from."""
    found = {}
    for path, content in results_of(run_dir).items():
        if path.name == MANIFEST:
            row = json.loads(content)
            found[path] = row["config"], sorted(row["inputs"]), sorted(row["outputs"])
        elif path.name not in TELLING and not re.search(r"checkpoint-\d", str(path)):
            found[path] = content
    return found


def same(found, expected):
    """A rerun's results are those of an undisturbed run."""
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []


@pytest.mark.parametrize(
    ("stage", "runs", "times"),
    [
        ("prepare", 15, 3),
        ("rationales", 6, 3),
        ("sft", 3, 1),
        ("sasrec", 8, 3),
        ("grpo", 3, 1),
        ("evaluate", 4, 2),
        ("judge", 4, 2),
        ("report", 4, 1),
    ],
)
def test_kills(finished, tmp_path, stage, runs, times):
    whole, base = finished
    expected, seconds, operations = undisturbed(whole, base, stage)

    @fuzz(runs)
    @given(kills=st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=times))
    def killed(kills):
        with folder(tmp_path) as here:
            run_dir = begin_again(whole, stage, here)
            for by_operation, moment in kills:
                process = start(stage, run_dir, base, 1 + int(moment * operations) if by_operation else None)
                if not by_operation:
                    time.sleep(moment * seconds)
                    process.kill()
                process.join()
                assert "Traceback" not in (here / "output").read_text()
            status, output = said(stage, words(stage, run_dir, base, *SMALL.get(stage, ())))
            holds(run_dir, status, output, (0,))
            same(comparable(run_dir), expected)

    killed()

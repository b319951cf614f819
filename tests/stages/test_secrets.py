"""Secrets planted wherever a user could put them, every stage into every kind of failure: nothing written holds one."""

import base64
import errno
import gzip
import io
import json
import shutil
import sys
import tempfile
import zipfile
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import pytest
from pyarrow import Table, parquet

from servers.processes import FaultServer
from stages.pipeline import ROOT, run, words
from twice_rec.errors import InputError
from twice_rec.rationales.client import ChatClient
from twice_rec.stages import command_line, stage3b_serve

pytestmark = pytest.mark.slow

BASE = ROOT / "assets" / "tiny_base"
# Words like any other: only that the environment names them makes them secret. No name here is the beginning of one.
ENVIRONMENT = {
    "OPENAI_API_KEY": "planted in openai/key+1",
    "HF_TOKEN": "planted-hub-token",
    "WANDB_API_KEY": "planted-wandb-key",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+key==",
    "VLLM_API_KEY": "planted-vllm-key",
    "TWICE_KEY": "planted-annotator-key",
    "TWICE_HEADER_KEY": "planted-header-key",
    "TWICE_QUERY_TOKEN": "planted/query token",
}
PROXIES = {"HTTPS_PROXY": "planted-proxy-one", "ALL_PROXY": "planted-proxy-two"}
# What nobody has told us of is known by its form, or by the name beside it.
TOKENS = {
    "openai": "sk-" + "proj-Planted4711never",
    "hub": "hf" + "_Planted4711NeverShownAnywhere",
    "groq": "gsk" + "_Planted4711NeverShown",
    "google": "AIza" + "SyPlanted4711nevershown",
    "nobody's": "Xk29fJq03LmZp81QwErT7",
}
NAMED = {name: f"planted-{name}-word" for name in ("login", "query", "header", "flag", "key", "yaml", "loose")}
MARKERS = [*ENVIRONMENT.values(), *PROXIES.values(), *TOKENS.values(), *NAMED.values()]
KNOWN = [*ENVIRONMENT.values(), *PROXIES.values()]
ECHO = " ; ".join([
    *KNOWN,
    *(quote(value, safe="") for value in KNOWN),
    *(base64.b64encode(value.encode()).decode() for value in KNOWN),
    *TOKENS.values(),
    f"https://user:{NAMED['login']}@hub/a?api_key={NAMED['query']}&b=1",
    f"Authorization: Bearer {NAMED['header']}-1",
    f"--hub_token {NAMED['flag']} and {{'hf_token': '{NAMED['key']}'}}",
])  # fmt: skip

# Stage -> flags with which it works on the folder of `prepared`, and what breaks in the middle of it.
STAGES = {
    "prepare": ("", "twice_rec.stages.stage0_prepare.assemble"),
    "rationales": ("", "twice_rec.rationales.curate.curate"),
    "sft": ("", "twice_rec.stages.stage2_sft.training_rows"),
    "sasrec": ("--epochs 1 --baselines popularity", "twice_rec.cf.sasrec_variant.SASRecVariant.train"),
    "serve": ("--rollout vllm_server", "twice_rec.stages.stage3b_serve.start_model"),
    "grpo": (f"--model_name_or_path {BASE} --cf_model popularity", "twice_rec.stages.stage3c_grpo.prompt_rows"),
    "evaluate": ("--variants oracle", "twice_rec.stages.stage4_evaluate.evaluate_scorer_variant"),
    "judge": ("--num_judged 2 --variants base", "twice_rec.evaluation.judges.scores_of"),
    "report": ("", "twice_rec.stages.stage5_report.results_of"),
    "study": ("", "twice_rec.stages.stage6_study.make_plan"),
    "status": ("", "twice_rec.stages.status.tree"),
}
AGAIN = {  # flags with which a finished stage works once more
    "prepare": ["--seed", "7", "--overwrite", "true"],
    "rationales": ["--seed", "7", "--overwrite", "true"],
    "evaluate": ["--score_lists", "full", "--overwrite", "true"],
}
WITH_RECIPE = [stage for stage in STAGES if stage != "status"]
FAILURES = {
    "unexpected": (RuntimeError(ECHO), 1),
    "full disk": (OSError(errno.ENOSPC, "No space left on device", f"/{TOKENS['hub']}/{ECHO}"), 1),
    "full disk in a library": (RuntimeError(f"No space left on device: {ECHO}"), 1),
    "input": (InputError(ECHO), 2),
    "interrupted": (KeyboardInterrupt(ECHO), 130),
}


def codes(marker):
    """A secret as it is, in a URL, in JSON, and in base64 wherever it begins in what was coded."""
    raw = marker.encode()
    inside = [base64.b64encode(b"x" * shift + raw)[-(-8 * shift // 6) : -4] for shift in range(3)]
    return [raw, quote(marker).encode(), quote(marker, safe="").encode(), json.dumps(marker)[1:-1].encode(), *inside]


def contents(path, data):
    """The bytes of a file, and those inside if it is packed."""
    yield data
    if data[:4] == b"PAR1":
        yield repr(parquet.read_table(io.BytesIO(data)).to_pydict()).encode()
    elif data[:2] == b"\x1f\x8b":
        yield from contents(path, gzip.decompress(data))
    elif data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            for name in packed.namelist():
                yield from contents(path, packed.read(name))


def leaks(folder, output=""):
    """Where a secret is in the output, or in a file or the name of a file below a folder: (place, secret)."""
    found = []
    places = [("output", [output.encode()])]
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        places.append((name, [name.encode(), *(contents(path, path.read_bytes()) if path.is_file() else ())]))
    for place, parts in places:
        found += [(place, m) for m in MARKERS if any(code in part for part in parts for code in codes(m))]
    return found


@pytest.fixture(autouse=True)
def planted(monkeypatch, tmp_path):
    """Secrets in the environment, and a command line that holds some; temporary files go below `tmp_path` too."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for name, value in PROXIES.items():
        monkeypatch.setenv(name, f"http://user:{value}@127.0.0.1:9")
    for name in ("HTTP_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(
        sys,
        "argv",
        ["twice-rec", "s", "r.yaml", "--hub_token", NAMED["flag"], f"--api_key={NAMED['key']}", *TOKENS.values()],
    )
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose stages 0, 1 and 4 are finished; made without secrets."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    for stage in ("prepare", "rationales", "evaluate"):
        assert run(stage, run_dir, BASE, *STAGES[stage][0].split()) == 0
    assert run("evaluate", run_dir, BASE, "--variants", "base", "--num_users", "2") == 0
    return run_dir


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy of that run."""
    return shutil.copytree(finished, tmp_path / "run")


def ends(stage, run_dir, *more):
    """Run a stage here with its flags; returns the exit status."""
    if stage == "status":
        return command_line.main(["status", str(run_dir), *more])
    return run(stage, run_dir, BASE, *STAGES[stage][0].split(), *more)


def breaks(monkeypatch, stage, error):
    """Let a stage raise an error in its middle."""

    def broken(*words, **named):
        raise error from KeyError(ECHO)

    monkeypatch.setattr(STAGES[stage][1], broken)
    monkeypatch.setattr(stage3b_serve, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: True)))


# ---------------------------------------------------------------------------------------------------------------------
# The search itself


def test_the_search_finds_what_is_there(tmp_path):
    for marker in MARKERS:
        for shift in ("", "x", "xx"):
            coded = base64.b64encode(f"{shift}{marker} and more".encode()).decode()
            assert ("output", marker) in leaks(tmp_path, f"<{coded}>")
        assert ("output", marker) in leaks(tmp_path, quote(f"a {marker}"))
    token = TOKENS["hub"]
    parquet.write_table(Table.from_pydict({"text": [token] * 9}), tmp_path / "a.parquet", compression="zstd")
    np.savez_compressed(tmp_path / "b.npz", text=np.frombuffer(token.encode() * 9, dtype=np.uint8))
    (tmp_path / "c.gz").write_bytes(gzip.compress(token.encode()))
    (tmp_path / token).mkdir()
    assert [place for place, _ in sorted(leaks(tmp_path))] == ["a.parquet", "b.npz", "c.gz", token]


@pytest.mark.parametrize("stage", STAGES)
def test_without_masks_it_finds_the_leak(run_dir, tmp_path, monkeypatch, capfd, stage):
    """So that the tests below can fail."""
    breaks(monkeypatch, stage, RuntimeError(ECHO))
    monkeypatch.setattr(command_line, "masked", lambda text: text)
    assert ends(stage, run_dir, *AGAIN.get(stage, [])) == 1
    found = leaks(tmp_path, "".join(capfd.readouterr()))
    assert {marker for place, marker in found if place == "output"} >= {*KNOWN, *TOKENS.values()}
    assert stage == "status" or f"run/logs/{stage}.log" in dict(found)


# ---------------------------------------------------------------------------------------------------------------------
# Every stage, every failure


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_fails(run_dir, tmp_path, monkeypatch, capfd, stage, failure):
    error, status = FAILURES[failure]
    breaks(monkeypatch, stage, error)
    assert ends(stage, run_dir, *AGAIN.get(stage, [])) == status
    output = "".join(capfd.readouterr())
    assert "[HF_TOKEN]" in output or failure == "interrupted"  # it was told, and hidden
    assert leaks(tmp_path, output) == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_whose_input_is_missing(tmp_path, capfd, stage):
    assert ends(stage, tmp_path / "none", "--source_dir" if stage == "prepare" else "--none", TOKENS["hub"]) == 2
    if stage not in ("prepare", "serve", "status"):
        assert ends(stage, tmp_path / "none") in (1, 2)
    assert leaks(tmp_path, "".join(capfd.readouterr())) == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_succeeds(run_dir, tmp_path, capfd, stage):
    """Or, if it trains for long, that is looked at by `--check`."""
    more = {"sft": ["--check"], "grpo": ["--check"], "study": ["--check"], "serve": ["--rollout", "transformers"]}
    assert ends(stage, run_dir, *more.get(stage, AGAIN.get(stage, []))) == 0
    if stage in WITH_RECIPE:
        assert ends(stage, run_dir, "--show") == ends(stage, run_dir, "--help") == 0
    assert leaks(tmp_path, "".join(capfd.readouterr())) == []
    if stage in ("prepare", "sasrec"):
        manifest = run_dir / {"prepare": "data"}.get(stage, stage) / "manifest.json"
        assert "--api_key=[hidden]" in json.loads(manifest.read_text())["about"]["command"]


# ---------------------------------------------------------------------------------------------------------------------
# Secrets in recipes and flags

PLACES = [
    ("--seed", TOKENS["openai"]),  # of a wrong type
    ("--seed", f"{{a: [{{token: {NAMED['key']}}}]}}"),
    ("--run_dir", f"runs/{TOKENS['hub']}"),
    ("--domain", TOKENS["nobody's"]),
    ("--wandb_project", TOKENS["google"]),
    ("--wandb_group", f"https://user:{NAMED['login']}@wandb/x"),
    ("--overwrite", TOKENS["groq"]),
    ("--api_key", NAMED["flag"]),  # of no key
    ("--hub_token", NAMED["flag"]),
    ("--openai_api_key", NAMED["flag"]),
    (f"--password={NAMED['flag']}",),
    (f"--{TOKENS['hub']}", "1"),
    (f"--nobodys={TOKENS['openai']}",),
]
OF_STAGES = {
    "prepare": [("--source_dir", f"https://user:{NAMED['login']}@host/data"), ("--reviews_file", TOKENS["hub"])],
    "rationales": [
        ("--base_url", f"https://user:{NAMED['login']}@host/v1"),
        ("--base_url", f"https://{NAMED['login']}@host/v1"),
        ("--base_url", f"https://host/v1?key={NAMED['query']}&a=1"),
        ("--base_url", NAMED["loose"]),
        ("--api_key_env", NAMED["loose"]),
        ("--extra_headers", f"{{Authorization: Bearer {NAMED['header']}}}"),
        ("--extra_headers", f"{{X-Api-Key: {NAMED['header']}}}"),
        ("--extra_headers", NAMED["header"]),
        ("--extra_body", f"{{a: {{b: [{{api_key: {NAMED['key']}}}]}}}}"),
        ("--extra_body", NAMED["key"]),
        ("--model", TOKENS["openai"]),
    ],
    "sft": [
        ("--model_name_or_path", f"https://user:{NAMED['login']}@hub/model"),
        ("--model_init_kwargs", f"{{token: {NAMED['key']}}}"),
        ("--model_init_kwargs", f'{{"token": "{NAMED["key"]}"}}'),
        ("--dataset_kwargs", f"{{a: {TOKENS['hub']}}}"),
        ("--deepspeed", f"{{a: {{password: {NAMED['key']}}}}}"),
        ("--learning_rate", TOKENS["hub"]),
        ("--push_to_hub_token", NAMED["flag"]),
    ],
    "serve": [
        ("--rollout_servers", f"user:{NAMED['login']}@host:8000"),
        ("--rollout_servers", f"[127.0.0.1:8000, {TOKENS['openai']}]"),
        ("--rollout_server_args", f"{{api_key: {NAMED['key']}}}"),
        ("--rollout_server_args", f"{{hf_token: {NAMED['key']}}}"),
        ("--rollout_server_args", f"{{api-key: [{NAMED['key']}]}}"),
        ("--rollout_server_args", f"{{max_num_seqs: {TOKENS['hub']}}}"),
    ],
    "grpo": [
        ("--generation_kwargs", f"{{a: [{TOKENS['groq']}]}}"),
        ("--variant", TOKENS["openai"]),
        ("--reward_funcs", "match", TOKENS["openai"]),
        ("--model_revision", TOKENS["hub"]),
        ("--log_completions_hub_repo", f"https://{NAMED['login']}@hub/x"),
    ],
    "evaluate": [
        ("--precomputed_scores", f"{{a: 'https://u:{NAMED['login']}@h/x.npz'}}"),
        ("--variants", TOKENS["hub"]),
    ],
    "judge": [
        ("--judges", f"{{a: {{base_url: 'https://u:{NAMED['login']}@host/v1'}}}}"),
        ("--judges", f"{{a: {{base_url: {NAMED['loose']}}}}}"),
        ("--judges", f"{{a: {{api_key_env: {NAMED['loose']}}}}}"),
        ("--judges", f"{{a: {{api_key: {NAMED['key']}}}}}"),
        ("--judges", f"{{a: {NAMED['key']}}}"),
        ("--human_labels", TOKENS["hub"]),
    ],
    "report": [("--other_runs", f"runs/{TOKENS['hub']}"), ("--comparisons", f"[[a, {TOKENS['hub']}]]")],
    "study": [
        ("--recipes_dir", f"recipes/{TOKENS['hub']}"),
        ("--parts", TOKENS["openai"]),
        ("--overrides", f"{{rationales: {{extra_headers: {{X-Api-Key: {NAMED['header']}}}}}}}"),
        ("--overrides", f"{{sft: {{hub_token: {NAMED['key']}}}}}"),
        ("--runs", f"[{{stage: sft, variant: {TOKENS['hub']}}}]"),
    ],
}


@pytest.mark.parametrize("stage", WITH_RECIPE)
def test_secrets_in_flags_and_recipes_are_refused(tmp_path, capfd, stage):
    recipe, run_dir = words(stage, tmp_path / "run", BASE)[1], tmp_path / "run"
    for number, flags in enumerate([*PLACES, *OF_STAGES.get(stage, [])]):
        for more in ([], ["--show"], ["--check"]):
            assert run(stage, run_dir, BASE, *more, *flags) == 2
        name, _, value = flags[0].removeprefix("--").partition("=")
        output = "".join(capfd.readouterr())
        assert name in output or name in TOKENS.values()
        assert leaks(tmp_path, output) == [], flags
        written = f"{name}: {value or flags[1]}"
        file = tmp_path.parent / f"{tmp_path.name}-{number}.yaml"
        file.write_text(f"base: {recipe}\nrun_dir: {run_dir}\n{written}\n")
        assert command_line.main([stage, str(file)]) == 2
        output = "".join(capfd.readouterr())
        assert leaks(tmp_path, output) == [], written
    assert not run_dir.exists()  # nothing is begun


YAML = [
    f"seed: '{NAMED['yaml']}\n",
    f"seed: {NAMED['yaml']}: 1\n",
    f"seed: *{NAMED['yaml']}\n",
    f"seed: !{NAMED['yaml']} x\n",
    f"seed: !!int {NAMED['yaml']}\n",
    f"seed: [{NAMED['yaml']}\n",
    f"? {{token: {NAMED['yaml']}}}\n: 1\n",
    f"{NAMED['yaml']}\n",
    f"base: https://user:{NAMED['yaml']}@host/recipe.yaml\n",
    f"base: [{TOKENS['hub']}]\n",
    f"{TOKENS['hub']}: 1\n{TOKENS['hub']}: 2\n",
]


@pytest.mark.parametrize("stage", WITH_RECIPE)
def test_command_lines_and_files_that_cannot_be_read(tmp_path, capfd, stage):
    for number, text in enumerate(YAML):
        file = tmp_path.parent / f"{tmp_path.name}-{number}.yaml"
        file.write_text(text)
        assert command_line.main([stage, str(file)]) == 2
    for arguments in (
        [TOKENS["hub"]],
        ["--hub_token", NAMED["flag"]],
        [f"https://u:{NAMED['login']}@h/r.yaml"],
        [str(ROOT / "recipes" / "tiny" / "report.yaml"), TOKENS["openai"]],
    ):
        assert command_line.main([stage, *arguments]) == 2
    assert command_line.main([TOKENS["hub"]]) == command_line.main(["status", TOKENS["hub"]]) == 2
    assert leaks(tmp_path, "".join(capfd.readouterr())) == []


# ---------------------------------------------------------------------------------------------------------------------
# An API that echoes

API = ["--annotator", "openai", "--model", "annotator", "--exemplars", str(ROOT / "recipes/exemplars/grocery.json")]
API += ["--api_key_env", "TWICE_KEY", "--extra_headers", "{X-Api-Key: '${TWICE_HEADER_KEY}'}", "--max_rationales", "8"]
API += [
    "--backoff_seconds",
    "0",
    "--timeout_seconds",
    "1",
    "--max_attempts",
    "2",
    "--max_failures_in_a_row",
    "3",
    "--overwrite",
    "true",
]
SERVERS = {
    "success": ({}, 0),
    "wrong key": ({"key": "another"}, 2),
    "error object": ({"mood": "error object"}, 2),
    "moved away": ({"mood": "moved away"}, 2),
    "echoes in errors": ({"transport": 1.0}, 2),
    "quota": ({"quota": 2}, 2),
}


@pytest.mark.server
@pytest.mark.parametrize("kind", SERVERS)
def test_an_api_that_fails_and_echoes(run_dir, tmp_path, tmp_path_factory, capfd, kind):
    options, status = SERVERS[kind]
    with FaultServer(tmp_path_factory.mktemp("server"), **options) as server:
        url = f"{server.url}?api-key=${{TWICE_QUERY_TOKEN}}"
        assert run("rationales", run_dir, BASE, *API, "--preflight", "false", "--base_url", url) == status
    assert leaks(tmp_path, "".join(capfd.readouterr())) == []


@pytest.mark.server
@pytest.mark.parametrize("error", [RuntimeError(ECHO), KeyboardInterrupt(ECHO), ValueError(ECHO), OSError(ECHO)])
def test_an_error_inside_of_the_client(run_dir, tmp_path, monkeypatch, capfd, error):
    async def send(*words):
        raise error

    monkeypatch.setattr(ChatClient, "_send", send)
    flags = ["--preflight", "false", "--base_url", "http://127.0.0.1:9/v1?api-key=${TWICE_QUERY_TOKEN}"]
    assert run("rationales", run_dir, BASE, *API, *flags) in (1, 2, 130)
    assert leaks(tmp_path, "".join(capfd.readouterr())) == []

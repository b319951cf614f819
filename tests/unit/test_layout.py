"""What holds of the repository as a whole: layers, quiet imports, launchers, README."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "twice_rec"
MODULES = sorted(
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
)
LEVELS = {
    "records": 0, "metrics": 0, "files": 0, "errors": 0, "weight_files": 0, "random_streams": 0,
    "item_sequences": 0, "masking": 0,
    "answer_format": 1, "catalog": 1, "prompts": 1, "progress": 1, "markdown": 1, "recipe": 1,
    "recipe_reader": 1, "locks": 1, "manifest": 1, "training_log": 1, "run": 1,
    "data": 2, "rationales": 2, "llm": 2, "cf": 2,
    "sft": 3, "grpo": 3, "evaluation": 3, "sharing": 3,
    "stages": 4, "study": 4, "__main__": 4,
}  # fmt: skip
HEAVY = {"trl", "vllm", "openai", "deepspeed"}
MAY_IMPORT_HEAVY = ("twice_rec.sft", "twice_rec.grpo", "twice_rec.rationales.client", "twice_rec.stages")
LOAD_TRL = {"twice_rec.grpo.trainer", "twice_rec.sft.trainer"}  # stages import them late


def imports_of(module):
    path = SOURCE.parent / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "twice_rec" or node.module.startswith("twice_rec."):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(module):
    names = module.split(".")
    return names[1] if len(names) > 1 and names[0] == "twice_rec" else None


def modules_imported(module):
    """The modules of this package that a module imports anywhere in its text."""
    return {name for name in imports_of(module) if name in MODULES and name != module}


@pytest.mark.parametrize("module", MODULES)
def test_levels(module):
    """A module imports from its own level or below, and a room of level 2 not from its sisters."""
    own = part_of(module)
    if own is None:
        return
    for imported in imports_of(module):
        other = part_of(imported)
        if other in LEVELS and other != own:
            fits = LEVELS[other] < LEVELS[own] or (LEVELS[other] == LEVELS[own] != 2)
            assert fits, f"{module} (level {LEVELS[own]}) imports {imported} (level {LEVELS[other]})"
        top = imported.partition(".")[0]
        if LEVELS[own] == 0:
            assert top in sys.stdlib_module_names | {"numpy", "pydantic", "twice_rec"}, f"{module} imports {imported}"
        if top in HEAVY:
            assert module.startswith(MAY_IMPORT_HEAVY), f"{module} imports {imported}"


def test_no_module_imports_in_a_circle():
    graph = {module: modules_imported(module) for module in MODULES}
    order = []  # every module behind all that it imports

    def visit(module, path):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in order:
            for imported in sorted(graph[module]):
                visit(imported, [*path, module])
            order.append(module)

    for module in MODULES:
        visit(module, [])


def test_the_package_stays_readable():
    """No file over 450 lines, no function over 60, and 29,750 lines in all."""
    total = 0
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        lines = text.count("\n")
        total += lines
        assert lines <= 450, f"{path} has {lines} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{path}:{node.lineno} {node.name} has {length} lines"
    assert total <= 29_750, total


def test_trls_private_attributes_are_touched_in_one_module():
    for path in SOURCE.rglob("*.py"):
        if path.name != "trl_private.py":
            found = re.findall(r"\btrainer\._[a-z]\w+|def _(?:get_per_token_logps|prepare_inputs)\w*", path.read_text())
            assert not found, f"{path}: {found}"


def test_importing_everything_touches_nothing():
    """No file written, no connection, no GPU, none of the heavy packages."""
    script = f"""
import importlib, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "subprocess.Popen", "os.system"):
        raise SystemExit(f"importing caused {{event}} {{arguments}}")
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes and "__pycache__" not in str(arguments[0]):
        raise SystemExit(f"importing writes {{arguments}}")
import torch, transformers, peft, datasets, scipy.sparse, tokenizers  # what other packages do is theirs
sys.addaudithook(watch)
for name in {[module for module in MODULES if module not in LOAD_TRL]!r}:
    importlib.import_module(name)
loaded = {HEAVY!r} & set(sys.modules)
assert not loaded, loaded
assert not torch.cuda.is_initialized()
"""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(SOURCE.glob("stages/stage*.py")), ids=lambda p: p.name)
def test_stages_are_thin(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 85
    assert "import re\n" not in path.read_text()


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.sh")), ids=lambda p: p.name)
def test_launchers_are_short_and_strict(path):
    text = path.read_text()
    if default := re.findall(r"launch\.sh\" \w+ (\S+) ", text):
        assert len(text.splitlines()) == 3
        assert (ROOT / default[0]).is_file()
    else:
        assert path.name in ("install.sh", "test.sh", "reproduce.sh", "base.sh", "launch.sh", "model.sh")
        assert "set -euo pipefail" in text


def test_no_size_or_model_is_special():
    source = "\n".join(path.read_text() for path in SOURCE.rglob("*.py"))
    assert not re.search(r"if .*[\"']?\btiny\b", source)
    assert ".cuda()" not in source
    assert "trust_remote_code=True" not in source


def test_readme_tree_is_true():
    readme = (ROOT / "README.md").read_text()
    tree = re.search(r"```\n(README\.md .*?)```", readme, re.DOTALL).group(1)
    listed, folders = {}, {}
    for line in tree.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        path = folders.get(indent - 2, "") + name
        if name.endswith("/"):
            folders[indent] = path
        listed[path.rstrip("/")] = line
    for path in listed:
        assert (ROOT / path).exists() or (SOURCE.parent / path).exists(), f"the README names {path}"
        assert len(listed[path].split()) > 1, f"{path} has no explanation"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {name.split("/")[0] for name in tracked} - {".gitignore"}
    assert top <= {path.split("/")[0] for path in listed}, top - set(listed)
    modules = {name for name in tracked if re.fullmatch(r"src/twice_rec/(?!__)\w+\.py", name)}
    assert modules <= {f"src/{path}" for path in listed}, modules


def test_readme_commands_name_files_that_exist():
    for document in ("README.md", "REPRODUCTION.md", "recipes/README.md"):
        text = (ROOT / document).read_text()
        for command in re.findall(r"^\s*(?:\$ )?((?:bash|python) \S+.*)$", text, re.MULTILINE):
            words = command.split()
            if words[1].endswith((".sh", ".py")):
                assert (ROOT / words[1]).is_file(), f"{document}: {command}"
            for word in words[2:]:
                if word.endswith(".yaml"):
                    assert (ROOT / word).is_file(), f"{document}: {command}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/*.py")), ids=lambda path: path.name)
def test_benchmarks_start_as_the_documents_say(path):
    if path.name in (
        "reporting.py",
        "raw_reviews.py",
        "rectools_sasrec.py",
    ):  # a library; a script for another environment
        return
    environment = {**os.environ, "PYTHONPATH": "src"}
    command = [sys.executable, str(path.relative_to(ROOT)), "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_reward_in_the_readme_is_the_code():
    shown = re.search(r"```python\n(@reward.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    code = ast.parse((SOURCE / "grpo" / "rewards.py").read_text())
    (eq2,) = [node for node in code.body if getattr(node, "name", "") == "collaborative"]
    eq2.body = eq2.body[1:]  # the README leaves the docstring out
    assert ast.unparse(ast.parse(shown)) == ast.unparse(eq2)


def test_no_large_files_and_no_secrets():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        path = ROOT / name
        assert path.stat().st_size < 12 * 2**20, name
        assert not re.search(rb"\b(?:sk-[A-Za-z0-9]{20,}|hf_[A-Za-z0-9]{20,})\b", path.read_bytes()), name

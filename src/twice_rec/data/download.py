"""Fetches a domain's files of Amazon Reviews 2023 from the Hugging Face hub, for the sources that read them.

The hub's own library asks for size and hash, reads ranges, waits if it is told to, and knows HF_ENDPOINT, HF_TOKEN and
proxies. Its `hf_hub_download` forgets what a killed process had, and compares no hash. So its `http_get` writes to a
partial file of ours here, which the next run goes on with, and a file gets its name when its hash is the hub's.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from twice_rec.errors import InputError, Unfinished
from twice_rec.files import hash_file
from twice_rec.locks import writing
from twice_rec.progress import progress
from twice_rec.recipe import Settings, key

logger = logging.getLogger(__name__)

REPOSITORY = "McAuley-Lab/Amazon-Reviews-2023"
_REVIEWS, _METADATA = "raw/review_categories/{domain}.jsonl", "raw/meta_categories/meta_{domain}.jsonl"
# Source -> its files in the repository; in `source_dir` they lie under their names alone.
HUB_FILES = {
    "amazon2023": (_REVIEWS, _METADATA),
    "amazon2023_5core": (
        *(f"benchmark/5core/last_out/{{domain}}.{split}.csv" for split in ("train", "valid", "test")), _METADATA,
    ),
}  # fmt: skip
DOMAINS = (
    "All_Beauty", "Amazon_Fashion", "Appliances", "Arts_Crafts_and_Sewing", "Automotive", "Baby_Products",
    "Beauty_and_Personal_Care", "Books", "CDs_and_Vinyl", "Cell_Phones_and_Accessories", "Clothing_Shoes_and_Jewelry",
    "Digital_Music", "Electronics", "Gift_Cards", "Grocery_and_Gourmet_Food", "Handmade_Products",
    "Health_and_Household", "Health_and_Personal_Care", "Home_and_Kitchen", "Industrial_and_Scientific", "Kindle_Store",
    "Magazine_Subscriptions", "Movies_and_TV", "Musical_Instruments", "Office_Products", "Patio_Lawn_and_Garden",
    "Pet_Supplies", "Software", "Sports_and_Outdoors", "Subscription_Boxes", "Tools_and_Home_Improvement",
    "Toys_and_Games", "Unknown", "Video_Games",
)  # fmt: skip
_KNOWN = f"domains are {', '.join(DOMAINS)}"
_STATUSES = {  # of the hub -> what it means, and what to do
    **dict.fromkeys((401, 403), "refuses it; log in by `hf auth login`, or set a valid HF_TOKEN, {by_hand}"),
    404: f"does not have it; take another download_revision or domain, not all of which have 5-core files ({_KNOWN})",
    429: "asks to wait; run this again later, with HF_TOKEN set, {by_hand}",
}
_PACKED = ("", ".gz", ".zst")  # endings under which a source finds a file as well


class DownloadConfig(Settings):
    """Whether and from where the files of Amazon Reviews 2023 are fetched."""

    download: bool = key(
        False, "fetch the files of Amazon Reviews 2023 that source_dir lacks from the hub", changes_result=False
    )
    download_revision: str = key(
        "2b6d039ed471f2ba5fd2acb718bf33b0a7e5598e",
        f"branch, tag or commit of the hub's dataset {REPOSITORY}; HF_ENDPOINT names another hub",
        changes_result=False,
    )


_PIECE = 1 << 18  # bytes that are written together; what a cut connection leaves of one is lost, of the hub's 10 MiB


class HubFile(NamedTuple):
    """What the hub says of a file; `etag` is the SHA-256 of its content, or of a file in git itself its SHA-1 there."""

    name: str  # in source_dir
    url: str
    etag: str
    size: int  # bytes

    def partial(self, folder: Path) -> Path:
        """Return where the file lies before it is complete and checked."""
        return folder / f".{self.name}.{self.etag[:12]}.part"


def missing_files(source: str, domain: str, folder: Path, given: Sequence[str | None] = (None, None)) -> list[str]:
    """Return the paths in the repository of the files that a folder lacks.

    Args:
        given: names of a reviews' and a metadata file of the user's own; what they stand for is not looked for.
    """
    own = [path for path, name in zip((_REVIEWS, _METADATA), given, strict=True) if name is not None]
    wanted = [path.replace("{domain}", domain) for path in HUB_FILES[source] if path not in own]
    return [path for path in wanted if not any((folder / f"{Path(path).name}{end}").is_file() for end in _PACKED)]


def fetch(missing: Sequence[str], domain: str, folder: Path, revision: str) -> None:
    """Fetch files of the repository into a folder, each checked by size and hash.

    Args:
        missing: their paths in the repository, see `missing_files`.

    Raises:
        InputError: before anything is fetched, if the hub has no such domain, cannot be reached, refuses, or if the
            disk is too small; and if what came is not what the hub announced.
        Unfinished: if the connection ends again and again; the next run goes on behind what has come.
    """
    if domain not in DOMAINS:
        plain = {name.lower(): name for name in DOMAINS}
        asked = re.sub(r"[^a-z0-9]+", "_", domain.lower().replace("&", "and")).strip("_")
        begun = [name for name in plain if asked and name.startswith(asked)]
        close = " or ".join(plain[name] for name in (begun or difflib.get_close_matches(asked, plain))[:2])
        meant = f"; did you mean {close}?" if close else ";"
        raise InputError(f"domain is {domain!r}, which Amazon Reviews 2023 does not have{meant} Its {_KNOWN}")
    by_hand = f"or put these files of the dataset {REPOSITORY} into {folder} yourself: {', '.join(missing)}"
    files = [_announced(path, revision, by_hand) for path in missing]
    needed = sum(file.size - _size(file.partial(folder)) for file in files)
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
    if needed > (free := shutil.disk_usage(there).free):
        raise InputError(
            f"{folder} has {free / 1e9:.2f} GB free, but {', '.join(file.name for file in files)} need "
            f"{needed / 1e9:.2f} GB; make room, or choose another --source_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        with writing(folder / file.name):
            if not (folder / file.name).exists():  # else another process has fetched it meanwhile
                _fetch_one(file, folder)


def _announced(path: str, revision: str, by_hand: str) -> HubFile:
    """Ask the hub for a file's size and hash; `by_hand` is the way out that errors name."""
    import httpx
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    hub, url = constants.ENDPOINT, hf_hub_url(REPOSITORY, path, repo_type="dataset", revision=revision)
    hub_logger = logging.getLogger("huggingface_hub")
    for handler in list(hub_logger.handlers):  # its lines come through the root's handlers, which hide secrets
        hub_logger.removeHandler(handler)
    try:
        found = get_hf_file_metadata(url)
    except HfHubHTTPError as error:
        status = error.response.status_code
        says = _STATUSES.get(status, "has trouble of its own with it; run this again later, {by_hand}")
        raise InputError(
            f"{path} at revision {revision}: {hub} {says.format(by_hand=by_hand)} (HTTP {status})"
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, ImportError, OSError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        remedy = "set HF_ENDPOINT, HF_HUB_OFFLINE or the proxy as your network needs"
        raise InputError(f"{hub} cannot be reached ({reason}); {remedy}, {by_hand}") from None
    if found.size is None or not re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", found.etag or ""):
        fault = f"{hub} tells no size and hash of {path}, so what it sends could not be checked; is HF_ENDPOINT a hub?"
        raise InputError(f"{fault} Set it to another, {by_hand}")
    logger.info("%s: %s bytes, commit %s", path, f"{found.size:,}", found.commit_hash or revision)
    return HubFile(Path(path).name, url, found.etag or "", found.size)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fetch_one(file: HubFile, folder: Path) -> None:
    """Fetch a file, or the rest of it, and give it its name if it is what the hub announced."""
    partial = file.partial(folder)
    for other in folder.glob(f".{file.name}.*.part"):  # of other revisions
        if other != partial:
            other.unlink()
    fault = _transfer(file, partial)
    if fault is None:
        logger.info("%s: checking its hash", file.name)
        found = hash_file(partial) if len(file.etag) == 64 else _git_hash(partial)
        fault = None if found == file.etag else f"has the hash {found}, the hub announced {file.etag}"
    if fault is not None:
        partial.unlink()
        remedy = "Run this again; if it stays so, a proxy or mirror alters files: set HF_ENDPOINT or the proxy"
        raise InputError(f"{file.url}: what came {fault}; it was removed. {remedy}")
    partial.replace(folder / file.name)
    logger.info("%s is complete and checked", folder / file.name)


def _transfer(file: HubFile, partial: Path) -> str | None:
    """Append what is missing to a partial file; return what is wrong with it if it cannot be the announced one."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}  # compressed content has no ranges
    constants.DOWNLOAD_CHUNK_SIZE = _PIECE
    with open(partial, "ab") as out:
        while (had := out.tell()) < file.size:
            try:
                http_get(
                    file.url, out, resume_size=had, headers=dict(headers), expected_size=file.size,
                    displayed_filename=file.name, tqdm_class=progress,  # type: ignore[arg-type]
                )  # fmt: skip
            except (httpx.HTTPError, OSError) as error:  # the hub's own errors are both
                status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
                if not isinstance(error, httpx.HTTPError) and error.errno is not None:
                    raise  # of the disk; without a number it is about the size
                if out.tell() > had:
                    continue
                if status == 416 or not isinstance(error, httpx.HTTPError):
                    return f"ends after {had:,} bytes, the hub announced {file.size:,}"
                fault = f"HTTP {status}" if status else f"the connection ends again ({type(error).__name__})"
                place = f"{out.tell():,} of {file.size:,} bytes are in {partial.parent}"
                raise Unfinished(f"{file.url}: {fault}; {place}, and the same command goes on behind them") from None
        size = out.tell()
    return None if size == file.size else f"has {size:,} bytes or more, the hub announced {file.size:,}"


def _git_hash(path: Path) -> str:
    """Return the SHA-1 by which git names a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()

"""An export on the Hub: uploaded by huggingface_hub to a repository of one's own."""
from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import RequestError, first_lines
from ..models.sources import unreachable

# its library of HTTP differs by version; errors of the network share its base
NETWORK = (*HfHubHTTPError.__bases__, OSError)


def check(name: str) -> None:
    """RequestError for a name that no repository can have, without a token, and where the Hub has no address from
    here."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise RequestError(f"--push {name}: {first_lines(error)}") from error
    if name.count("/") != 1:
        raise RequestError(f"--push {name}: should be a repository of the Hub, OWNER/NAME")
    if huggingface_hub.get_token() is None:
        raise RequestError(f"--push {name}: there is no token of the Hub here: log in by `hf auth login`, or "
                           "set HF_TOKEN")
    if (away := unreachable()) is not None:
        raise RequestError(f"--push {name}: the Hub cannot be asked ({away}): check the network, or export without "
                           "--push and upload the folder later")


def push(folder: Path, name: str, public: bool = False) -> str:
    """Uploads an export, and returns its address. A repository that is there keeps its visibility; a new one is private
    unless `public`.

    RequestError where the Hub refuses it; the folder stays."""
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by stepdistill")
    except NETWORK as error:
        raise RequestError(f"--push {name}: the Hub did not take it ({first_lines(error)}). The export is whole "
                           f"in {folder}") from error
    return str(address)

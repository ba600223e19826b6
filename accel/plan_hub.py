"""Plans shared as repositories of the Hugging Face hub: the plan file, its block sets, a card."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from accel.errors import PlanError
from accel.files import write_atomically
from accel.plan import Plan
from accel.plan_card import LIBRARY, card

HUB_FILE = "accel_plan.json"
HUB_SETS = "accel_plan.safetensors"
CARD = "README.md"


def looks_like_repository(name: str | os.PathLike[str]) -> bool:
    """Whether a name may be "owner/name" of the hub."""
    text = str(name)
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith("/")


def fetched(
    name_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The path of the plan file in a folder, or in a copy of a hub repository.

    Of a repository the plan and its block sets alone are fetched, both of one commit.
    """
    folder = Path(name_or_folder)
    if not folder.is_dir():
        if not looks_like_repository(name_or_folder):
            raise PlanError(
                f"{str(name_or_folder)!r} is neither a folder nor a hub repository (owner/name)"
            )
        from huggingface_hub import snapshot_download

        try:
            copy = snapshot_download(
                str(name_or_folder),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=[HUB_FILE, HUB_SETS],
            )
        except (OSError, ValueError) as error:
            raise PlanError(
                f"there is no plan file {str(name_or_folder)!r} here, and no {HUB_FILE} of a hub"
                f" repository of that name can be had: {error!s:.300}"
            ) from error
        folder = Path(copy)
    if not (folder / HUB_FILE).is_file():
        raise PlanError(
            f"{str(name_or_folder)!r} has no {HUB_FILE}; Plan.save_pretrained writes one"
        )
    return folder / HUB_FILE


def write_folder(plan: Plan, folder: Path, repository: str | None = None) -> Path:
    """What a repository of the plan holds. A card that is there and not of a plan stays."""
    plan.save(folder / HUB_FILE)
    path = folder / CARD
    if not path.is_file() or LIBRARY in path.read_text(encoding="utf-8"):
        write_atomically(path, card(plan, repository))
    return folder


def pushed(
    plan: Plan,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Push the plan to its repository, made if it is not there; the address of the commit.

    private: of a new repository; None is what its owner usually has.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        write_folder(plan, Path(folder), repo_id)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or f"Upload accel plan {plan.name}",
        )
    return str(commit)

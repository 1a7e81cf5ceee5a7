"""Folders of repositories of the Hugging Face hub that `framepack pull` has downloaded."""

import re
from pathlib import Path

from huggingface_hub import constants

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def pulled_folder(repo_id: str) -> Path:
    """Return where `owner/name` is pulled to: beside the hub's cache, so that HF_HOME moves it."""
    return Path(constants.HF_HOME, "framepack-jax", *repo_id.split("/"))

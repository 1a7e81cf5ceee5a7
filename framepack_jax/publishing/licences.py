"""Licences of the released models that networks are derived from."""

from typing import NamedTuple


class Licence(NamedTuple):
    """Fields of a model card: an identifier of the hub, and for "other" a name and an address."""

    identifier: str
    name: str | None = None
    address: str | None = None

    def __str__(self) -> str:
        return self.name or self.identifier


APACHE = Licence("apache-2.0")
HUNYUAN = Licence(
    "other",
    "tencent-hunyuan-community",
    "https://huggingface.co/tencent/HunyuanVideo/blob/main/LICENSE",
)
# Beginnings of names of repositories; FramePack's transformers are derived from HunyuanVideo.
KNOWN = {
    "tencent/hunyuanvideo": HUNYUAN,
    "hunyuanvideo-community/hunyuanvideo": HUNYUAN,
    "lllyasviel/framepack": HUNYUAN,
    "wan-ai/wan2.1": APACHE,
    "bestwishysh/helios": APACHE,
}
# Text and image encoders in these repositories are works of others.
ROLES = ("transformer", "vae")


def licence_of(source: str | None, role: str) -> Licence | None:
    """Return the licence of a network by the name of its source, None if it is unknown."""
    if source is None or role not in ROLES:
        return None
    name = source.lower()
    return next((licence for start, licence in KNOWN.items() if name.startswith(start)), None)

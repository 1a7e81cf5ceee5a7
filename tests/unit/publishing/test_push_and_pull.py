"""Bundles, LoRAs and exported networks to a hub and back, by the commands."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants

from framepack_jax import bundle
from framepack_jax.cli import pull, push_to_hub
from framepack_jax.conversion import lora
from framepack_jax.conversion.export import Export
from framepack_jax.models.lora import Factors
from framepack_jax.publishing import artifact
from framepack_jax.publishing import push as pushing
from tests.fixtures.hub_server import TOKEN, HubServer, Repository, serving

RANDOM = bundle.BUILTIN_BUNDLES["random"]
REPO = "people/model"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[HubServer]:
    """A hub, and a client of it with a token, an empty cache and no pauses."""
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # Its protocol has no server here; without it, files go by LFS.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        no_pause = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
        monkeypatch.setattr("huggingface_hub.utils._http.time", no_pause)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def push(path: Path | str, *flags: str) -> None:
    push_to_hub.main([str(path), "--repo", REPO, *flags])


def refused(command, *args: object) -> str:
    """The one line that a command must end with."""
    with pytest.raises(SystemExit) as ended:
        command(*args)
    message = str(ended.value.code)
    assert message.startswith("error: ") and "\n" not in message
    return message


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory) -> Path:
    """Adapters of one kernel, in two files as a training run exports them."""
    folder = tmp_path_factory.mktemp("run") / "bundle"
    _, cfg = bundle.role_config(bundle.read_manifest(RANDOM), "transformer")
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((cfg.width, 2)), rng.standard_normal((2, 4 * cfg.width))
    factors = Factors(a.astype(np.float32), b.astype(np.float32), np.ones(2))
    adapters = {"single/00/mlp_in/kernel": factors}
    about = {
        "ss_sd_model_name": "lllyasviel/FramePackI2V_HY", "ss_steps": "500",
        "framepack.schedule": "f1k1_x_g9_f1k1f2k2f16k4_td", "framepack.dataset": "0123456789abcdef",
        "framepack.rank": "2",
    }  # fmt: skip
    for naming, file in (("diffusers", "lora"), ("original", "lora_original")):
        lora.write(folder / f"{file}.safetensors", adapters, cfg, naming, about)
    return folder


def test_a_bundle_goes_out_and_comes_back(hub, tmp_path, monkeypatch, capsys) -> None:
    """Bit for bit, with a card, and its name on the hub is that of the bundle here."""
    monkeypatch.chdir(tmp_path)
    push("random")
    assert f"random: bundle at {hub.url}/{REPO}" in capsys.readouterr().out
    assert not hub.repos[REPO].private and not (RANDOM / "README.md").exists()
    sent = dict(hub.files(REPO))
    card = ModelCard(sent.pop("README.md").decode())
    assert sent == contents(RANDOM)
    assert card.data.license == "unknown" and card.data.library_name == "framepack-jax"
    assert "Set `license`" in card.text and "| sampling order | inverted |" in card.text
    assert refused(pull.main, ["people/other"]).endswith(
        f"{hub.url}/settings/tokens that may read it"
    )
    with pytest.raises(bundle.BundleError, match=f"framepack pull {REPO}"):
        bundle.read_manifest(bundle.resolve(REPO))
    pull.main([REPO])
    folder = Path(bundle.resolve(REPO))
    assert folder == tmp_path / "home" / "framepack-jax" / "people" / "model"
    assert contents(folder) == hub.files(REPO) and [*folder.parent.iterdir()] == [folder]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"framepack sample --bundle {REPO} ")
    assert "exists already; remove it" in refused(pull.main, [REPO])
    assert "exists already" not in refused(pull.main, [REPO, "--output", "x", "--revision", "none"])


def test_a_lora_folder_has_a_card_of_its_header(hub, lora_folder, tmp_path, capsys) -> None:
    push(lora_folder, "--private", "--revision", "mine")
    assert hub.repos[REPO].private and not hub.files(REPO)
    sent = dict(hub.files(REPO, "mine"))
    card = ModelCard(sent.pop("README.md").decode())
    assert sent == contents(lora_folder)
    assert card.data.base_model == "lllyasviel/FramePackI2V_HY" and "lora" in card.data.tags
    assert (card.data.license, card.data.license_name) == ("other", "tencent-hunyuan-community")
    for row in (
        "| packing schedule | `f1k1_x_g9_f1k1f2k2f16k4_td` |", "| sampling order | inverted |",
        "| training steps | 500 |", "| dataset | fingerprint `0123456789abcdef` |", "| rank | 2 |",
    ):  # fmt: skip
        assert row in card.text
    output = tmp_path / "mine"
    pull.main([REPO, "--output", str(output), "--revision", "mine"])
    assert f"--lora {output}/lora.safetensors" in capsys.readouterr().out
    assert contents(output) == hub.files(REPO, "mine")


def test_an_exported_network_and_its_own_readme(hub, tmp_path, capsys) -> None:
    folder = tmp_path / "siglip"
    Export(RANDOM, bundle.read_manifest(RANDOM), "image_encoder").folder(folder)
    (folder / "README.md").write_text("mine")
    push(folder)
    assert hub.files(REPO) == contents(folder) and hub.files(REPO)["README.md"] == b"mine"
    # That of the hub stays too.
    (folder / "README.md").unlink()
    push(folder)
    assert hub.files(REPO)["README.md"] == b"mine"
    pull.main([REPO, "--output", str(tmp_path / "back")])
    assert f"framepack convert --image-encoder {tmp_path}/back" in capsys.readouterr().out


def test_a_bundle_that_refers_to_another_goes_out_whole(tmp_path) -> None:
    found = artifact.recognise(bundle.BUILTIN_BUNDLES["tiny_inverted"])
    pushing.stage(found, tmp_path)
    manifest = bundle.read_manifest(tmp_path)
    assert {name: role.path for name, role in manifest.roles.items()} == {
        n: n for n in bundle.ROLES
    }
    assert bundle.is_as_recorded(tmp_path, manifest, "vae")
    theirs = contents(bundle.BUILTIN_BUNDLES["tiny"] / "vae")
    assert contents(tmp_path / "vae") == theirs and theirs


def test_new_weights_replace_all_files_of_the_old(hub) -> None:
    old = {"vae/state/d/old": b"1", "samples/video.mp4": b"2", "README.md": b"3"}
    hub.repos[REPO] = Repository(branches={"main": dict(old)})
    push("random")
    assert hub.files(REPO) == contents(RANDOM) | {"samples/video.mp4": b"2", "README.md": b"3"}


@pytest.mark.parametrize("token", ["hf_stranger", None])
def test_a_wrong_or_missing_token_is_named(hub, token, monkeypatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    said = refused(push, "random")
    assert f"{hub.url} refuses the token for {REPO}" in said
    assert f"set HF_TOKEN to a token of {hub.url}/settings/tokens that may write to it" in said
    assert not hub.repos and not hub.uploads


def test_an_interrupted_upload_goes_on(hub) -> None:
    """What has arrived is not sent again, and nothing is committed before."""
    hub.breaks_after = 4
    said = refused(push, "random")
    assert f"{REPO} could not be uploaded" in said and "run the same command again" in said
    assert len(hub.uploads) == 4 and not hub.commits
    assert "holds no bundle" in refused(pull.main, [REPO])
    hub.breaks_after = None
    push("random")
    assert len(hub.uploads) == len(set(hub.uploads)) > 4 and hub.commits == 1
    assert hub.files(REPO).keys() == {*contents(RANDOM), "README.md"}


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def test_a_byte_that_flips_on_the_way_is_found(hub, tmp_path) -> None:
    """And only its file is downloaded again."""
    push("random")
    output = tmp_path / "back"
    name = next(n for n, data in hub.files(REPO).items() if "vae/" in n and len(data) > 10_000)
    hub.sends[name] = flipped(hub.files(REPO)[name])
    said = refused(pull.main, [REPO, "--output", str(output)])
    assert f"{name} did not arrive as the hub records it" in said and not output.exists()
    hub.sends.clear()
    hub.downloads.clear()
    pull.main([REPO, "--output", str(output)])
    assert hub.downloads == [name] and contents(output) == hub.files(REPO)


def test_weights_that_were_changed_on_the_hub_are_found(hub, tmp_path) -> None:
    """By the hash in the manifest: the hub's own hash is that of the changed file."""
    push("random")
    document = json.loads(hub.files(REPO)["bundle.json"])
    document["roles"]["vae"]["source"]["sha256"] = "0" * 64
    hub.files(REPO)["bundle.json"] = json.dumps(document).encode()
    said = refused(pull.main, [REPO, "--output", str(tmp_path / "back")])
    assert "the parameters of vae are not those that bundle.json records" in said
    document["roles"]["vae"]["path"] = "../../elsewhere"
    hub.files(REPO)["bundle.json"] = json.dumps(document).encode()
    said = refused(pull.main, [REPO, "--output", str(tmp_path / "back")])
    assert "its vae is at ../../elsewhere, outside of the bundle" in said
    assert not (tmp_path / "back").exists()


def test_what_cannot_be_shared_is_refused_before_anything_is_sent(hub, tmp_path) -> None:
    unfinished, run, other = (tmp_path / name for name in ("unfinished", "run", "other"))
    shutil.copytree(RANDOM, unfinished)
    (unfinished / bundle.UNFINISHED).touch()
    (run / "checkpoints").mkdir(parents=True)
    other.mkdir()
    (other / "model.pt").write_bytes(b"x")
    for path, words in (
        (unfinished, "is an unfinished bundle"), (run, f"is a training run; give {run}/bundle"),
        (other, "holds nothing that can be shared; expected a bundle"),
        (other / "model.pt", "holds nothing that can be shared"),
        (tmp_path / "absent", "does not exist; expected a bundle"),
        ("framepack_i2v", "the parameters of transformer are missing"),
    ):  # fmt: skip
        assert words in refused(push, path)
    assert "--repo model: expected the name of a repository, OWNER/NAME" in refused(
        push_to_hub.main, ["random", "--repo", "model"]
    )
    assert not hub.repos
    hub.repos[REPO] = Repository()
    assert "--private: people/model is there already, and is public" in refused(
        push, "random", "--private"
    )
    assert not hub.uploads and not hub.commits


def test_other_repositories_are_not_downloaded(hub, tmp_path) -> None:
    hub.repos[REPO] = Repository(branches={"main": {"model.pt": b"x"}})
    said = refused(pull.main, [REPO])
    assert "people/model holds no bundle" in said and "it has model.pt" in said
    hub.repos[REPO] = Repository(branches={"main": {"bundle.json": b"{}", "../evil": b"x"}})
    assert "lists '../evil', a place outside of it" in refused(pull.main, [REPO])
    assert not hub.downloads and not (tmp_path / "home" / "framepack-jax" / "evil").exists()

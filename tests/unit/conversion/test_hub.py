"""Checkpoints from the hub: fetched from a server in this process that has the hub's routes."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from framepack_jax import bundle
from framepack_jax.conversion import hub, weight_files
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.conversion.sources import is_schedule_assumed
from framepack_jax.conversion.weight_files import ConversionError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "people/model"
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/[^/]+/(?P<file>.+)")
API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?P<rest>/.*)?")


class Seen(NamedTuple):
    """One request, as the server saw it."""

    method: str
    file: str | None
    range: str | None
    token: str | None


@dataclasses.dataclass
class Hub:
    """A hub's repositories: {repo: {file: bytes}}, and what goes wrong with them."""

    repos: dict[str, dict[str, bytes]]
    url: str = ""
    # Repositories that only this token opens, and whether all may list what is in them.
    gated: dict[str, str] = dataclasses.field(default_factory=dict)
    listed: bool = False
    # Files that are listed and not there, and {file: bytes after which the next answer breaks}.
    lost: set[str] = dataclasses.field(default_factory=set)
    breaks: dict[str, int] = dataclasses.field(default_factory=dict)
    failing: set[str] = dataclasses.field(default_factory=set)
    seen: list[Seen] = dataclasses.field(default_factory=list)

    def downloads(self) -> list[str]:
        return [seen.file for seen in self.seen if seen.method == "GET" and seen.file]


def handler(served: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.serve("HEAD")

        def do_GET(self) -> None:
            self.serve("GET")

        def serve(self, method: str) -> None:
            path = unquote(urlsplit(self.path).path)
            match = API.fullmatch(path) or RESOLVE.fullmatch(path)
            file = match.groupdict().get("file") if match else None
            token = self.headers.get("Authorization")
            served.seen.append(Seen(method, file, self.headers.get("Range"), token))
            repo = match["repo"] if match else ""
            if repo not in served.repos:
                return self.answer(401, b"Repository not found")
            barred = repo in served.gated and token != f"Bearer {served.gated[repo]}"
            if barred and not (served.listed and file is None):
                # Without a token, or with that of someone who has not accepted the licence.
                return self.answer(403 if token else 401, b"", {"X-Error-Code": "GatedRepo"})
            if file is None:
                return self.answer(200, json.dumps(self.listing(repo, match["rest"])).encode())
            if file in served.lost or file not in served.repos[repo]:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            if method == "GET" and file in served.failing:
                return self.answer(500, b"")
            return self.send(served.repos[repo][file], method, file)

        def listing(self, repo: str, rest: str | None) -> object:
            files = served.repos[repo]
            if rest and rest.startswith("/tree/"):
                return [
                    {"type": "file", "path": name, "size": len(data), "oid": f"{len(data):040x}"}
                    for name, data in files.items()
                ]
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            return {"id": repo, "sha": COMMIT, "siblings": siblings}

        def send(self, data: bytes, method: str, file: str) -> None:
            begin, status = 0, 200
            headers = {"ETag": f'"{file.replace("/", "-")}"', "X-Repo-Commit": COMMIT}
            if asked := self.headers.get("Range"):
                begin, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
                headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            stop = served.breaks.pop(file, None) if method == "GET" else None
            self.answer(status, data[begin:], headers, method == "HEAD", stop)

        def answer(
            self,
            status: int,
            body: bytes,
            headers: dict[str, str] | None = None,
            head: bool = False,
            stop: int | None = None,
        ) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if not head and self.command != "HEAD":
                self.wfile.write(body[:stop])
            self.close_connection = stop is not None

    return Handler


def weights(seed: int) -> bytes:
    return save({f"layer.{seed}": np.random.default_rng(seed).normal(size=(64, 64))})


def repository() -> dict[str, bytes]:
    """A network in two shards, beside much that no conversion reads."""
    shards = {f"vae/model-0000{i}-of-00002.safetensors": weights(i) for i in (1, 2)}
    index = {"weight_map": {f"layer.{i}": Path(name).name for i, name in enumerate(shards, 1)}}
    return {
        **shards,
        "vae/model.safetensors.index.json": json.dumps(index).encode(),
        "vae/config.json": b"{}",
        "vae/model.bin": b"the same in another format",
        "vae/notes/x.safetensors": weights(9),
        "README.md": b"words",
        "model_index.json": b"{}",
        "single.safetensors": weights(3),
        "tokenizer/tokenizer_config.json": b"{}",
        "tokenizer/merges.txt": b"a b",
        "scheduler/scheduler_config.json": b"{}",
        "old/model.pt": b"only in this format",
    }


WANTED = [
    "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
]  # fmt: skip


@pytest.fixture
def served(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub, and a client whose settings point to it and to an empty cache."""
    hub = Hub({REPO: repository()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    server.shutdown()
    server.server_close()


def fetch(subfolder: str | None = "vae", repo: str = REPO, **options) -> Path:
    return hub.fetch(repo, subfolder, progress=False, **options)


def assert_whole(folder: Path) -> None:
    """The network as the server has it, and readable."""
    for name in WANTED:
        assert (folder / name).read_bytes() == repository()[f"vae/{name}"], name
    assert weight_files.open_checkpoint(folder).names() == ["layer.1", "layer.2"]


def test_only_what_is_read_is_fetched_and_once(served) -> None:
    folder = fetch()
    assert_whole(folder)
    assert sorted(served.downloads()) == sorted(f"vae/{name}" for name in WANTED)
    served.seen.clear()
    assert fetch() == folder
    assert served.downloads() == []


def test_parts_are_found_by_folder_file_and_pipeline(served) -> None:
    lone = fetch("single.safetensors")
    assert lone.name == "single.safetensors" and lone.read_bytes() == weights(3)
    assert sorted(p.name for p in fetch("tokenizer").iterdir()) == [
        "merges.txt", "tokenizer_config.json",
    ]  # fmt: skip
    assert (fetch("old") / "model.pt").read_bytes() == b"only in this format"
    served.seen.clear()
    # The file at the root has been fetched; what lies in folders is not of it.
    assert fetch(None) == lone.parent
    assert served.downloads() == []
    whole = fetch(None, pipeline=True)
    assert (whole / "model_index.json").exists() and (whole / "vae" / "config.json").exists()
    assert sorted(served.downloads()) == sorted(
        ["model_index.json", "scheduler/scheduler_config.json"] + [f"vae/{name}" for name in WANTED]
    )
    assert fetch(None, pipeline=None) == whole
    shutil.rmtree(constants.HF_HUB_CACHE)
    assert (fetch(None, pipeline=None) / "vae" / "config.json").exists()
    assert sorted(p.name for p in fetch("tokenizer", pipeline=None).iterdir()) == [
        "merges.txt", "tokenizer_config.json",
    ]  # fmt: skip
    with pytest.raises(ConversionError, match=r"has no weights in unet; it has \., old, "):
        fetch("unet")


def test_pipelines_of_wan_22_are_refused_by_their_index(served, tmp_path) -> None:
    """Before any of their weights is fetched."""
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.875, "vae": ["diffusers", "X"]}
    served.repos[REPO]["model_index.json"] = json.dumps(index).encode()
    request = BundleRequest(output=str(tmp_path / "b"), pipeline=Path(REPO))
    with pytest.raises(ConversionError, match=f"{REPO} is a Wan 2.2 pipeline .*take Wan 2.1"):
        make_bundle(request)
    assert served.downloads() == ["model_index.json"]
    # A repository without an index is told by the download of all of it.
    served.repos["people/parts"] = {"vae/config.json": b"{}", "vae/model.safetensors": weights(1)}
    with pytest.raises(ConversionError, match="is no diffusers pipeline"):
        make_bundle(dataclasses.replace(request, pipeline=Path("people/parts")))


def test_gguf_files_are_not_fetched(served) -> None:
    served.repos["people/quantized"] = {"README.md": b"words", "wan-Q4_K_M.gguf": b"GGUF"}
    served.repos[REPO]["wan-Q8_0.gguf"] = b"GGUF"
    for repo, file, said in (
        ("people/quantized", None, "wan-Q4_K_M"), (REPO, "wan-Q8_0.gguf", "wan-Q8_0"),
    ):  # fmt: skip
        with pytest.raises(ConversionError, match=rf"{repo}/{said}\.gguf is a GGUF file"):
            hub.fetch(repo, file, progress=False)
    assert not served.downloads()


def test_a_broken_connection_goes_on_where_it_broke(served, monkeypatch) -> None:
    """At the last whole piece, which are of 10 MB but here."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    served.breaks["vae/model-00001-of-00002.safetensors"] = 10_000
    assert_whole(fetch())
    asked = [seen.range for seen in served.seen if seen.range]
    assert asked == ["bytes=8192-"]


def test_a_stopped_run_keeps_what_was_whole(served) -> None:
    served.failing.add("vae/model-00002-of-00002.safetensors")
    with pytest.raises(ConversionError, match=r"500.*run again, and what has been fetched is kept"):
        fetch()
    served.failing.clear()
    served.seen.clear()
    assert_whole(fetch())
    assert "vae/model-00001-of-00002.safetensors" not in served.downloads()


def test_a_shard_that_the_hub_has_lost_is_named(served) -> None:
    served.lost.add("vae/model-00002-of-00002.safetensors")
    with pytest.raises(ConversionError, match=r"lists vae/model-00002-of-00002\.safetensors"):
        fetch()


@pytest.mark.parametrize("listed", [True, False])
def test_a_gated_repository_asks_for_its_licence_and_a_token(
    listed: bool, served, monkeypatch
) -> None:
    served.gated[REPO], served.listed = "hf_secret", listed
    for token in (None, "hf_other"):
        with pytest.raises(ConversionError) as error:
            fetch(token=token)
        assert f"accept its licence at {served.url}/{REPO}, then set HF_TOKEN" in str(error.value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert_whole(fetch())
    monkeypatch.delenv("HF_TOKEN")
    shutil.rmtree(constants.HF_HUB_CACHE)
    assert_whole(fetch(token="hf_secret"))


@pytest.mark.parametrize("repo", ["people/typo", "no repository"])
def test_an_unknown_repository_is_named(repo: str, served) -> None:
    with pytest.raises(ConversionError, match=repo):
        fetch(repo=repo)


def test_without_a_network_the_cache_serves(served, monkeypatch) -> None:
    folder = fetch()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch() == folder
    with pytest.raises(ConversionError, match=r"people/other is not in the cache .*HF_HUB_OFFLINE"):
        fetch(repo="people/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch() == folder
    with pytest.raises(ConversionError, match=r"could not be fetched from http://127\.0\.0\.1:9"):
        fetch(repo="people/other")


def test_space_is_looked_at_first(served, monkeypatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=60_000))
    with pytest.raises(ConversionError, match=r"needs 0\.0 GB more in .*HF_HOME"):
        fetch()
    assert served.downloads() == []
    # What is in the cache needs no more space.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    fetch()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    assert_whole(fetch())


PROGRAM = """
import sys
from framepack_jax.conversion import hub
print(hub.fetch(sys.argv[1], "vae", progress=False))
"""


def test_the_variables_of_the_hub_hold(served, tmp_path) -> None:
    """In a program of its own, for the library reads them when it is imported."""
    served.gated[REPO] = "hf_secret"
    settings = {
        "HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_secret",
        "HF_HUB_OFFLINE": "0",
    }  # fmt: skip

    def run(**changes: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, **settings, **changes}
        command = [sys.executable, "-c", PROGRAM, REPO]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    first = run()
    assert first.returncode == 0, first.stderr
    folder = Path(first.stdout.strip())
    assert folder.is_relative_to(tmp_path / "home")
    assert_whole(folder)
    requests = len(served.seen)
    assert run(HF_HUB_OFFLINE="1").stdout == first.stdout
    assert len(served.seen) == requests


@pytest.mark.golden
def test_one_command_fetches_and_converts_a_released_model(
    served, golden, tmp_path, monkeypatch
) -> None:
    """Toys in the places of the released models; the second shares the encoders of the first."""
    pipeline = golden / "diffusers_pipeline" / "pipeline"
    folders = {"image_processor": "feature_extractor"}
    served.repos = {repo: {} for parts in hub.FRAMEPACK.values() for repo, _ in parts.values()}
    for parts in hub.FRAMEPACK.values():
        for role, (repo, subfolder) in parts.items():
            for file in (pipeline / folders.get(role, role)).iterdir():
                name = f"{subfolder}/{file.name}" if subfolder else file.name
                served.repos[repo][name] = file.read_bytes()
    first, second = tmp_path / "i2v", tmp_path / "f1"
    # All parts, and the bundle beside them, are looked at before the first is fetched.
    usage = shutil.disk_usage("/")
    f1 = served.repos[hub.FRAMEPACK["f1"]["transformer"][0]]
    weights = sum(
        len(data)
        for files in served.repos.values()
        for name, data in files.items()
        if files is not f1 and name.endswith(".safetensors")
    )
    for free in (0, weights - 1, 2 * weights - 1):
        with monkeypatch.context() as small:
            small.setattr(shutil, "disk_usage", lambda _, n=free: usage._replace(free=n))
            with pytest.raises(
                ConversionError, match=r"GB to fetch into .* a bundle of .* HF_HOME"
            ):
                make_bundle(BundleRequest(output=str(first), framepack="i2v"))
    assert not served.downloads() and not first.exists()
    made = make_bundle(BundleRequest(output=str(first), framepack="i2v"))
    assert tuple(made.roles) == bundle.ROLES and str(made.schedule) == hub.SCHEDULES["i2v"]
    assert (first / "tokenizer" / "tokenizer.json").exists()
    served.seen.clear()
    made = make_bundle(BundleRequest(output=str(second), framepack="f1", encoders_from=str(first)))
    assert str(made.schedule) == hub.SCHEDULES["f1"] and made.schedule.order == "forward"
    named = BundleRequest(
        output=str(tmp_path / "named"), transformer=Path(hub.FRAMEPACK["f1"]["transformer"][0])
    )
    assert str(make_bundle(named).schedule) == hub.SCHEDULES["f1"]
    assert not is_schedule_assumed(named, make_bundle(dataclasses.replace(named, overwrite=True)))
    assert {name: role.path for name, role in made.roles.items()} == {
        name: name if name == "transformer" else f"../i2v/{name}" for name in bundle.ROLES
    }
    assert sorted(served.downloads()) == sorted(served.repos[hub.FRAMEPACK["f1"]["transformer"][0]])
    bundle.load_params(second, made, "text_encoder_2")


@pytest.mark.golden
def test_released_helios_models_share_their_encoders(served, golden, tmp_path) -> None:
    """Toys in the places of the released models, each with its own settings."""
    helios = golden / "helios"
    whole = {
        file.relative_to(helios / "pipeline").as_posix(): file.read_bytes()
        for file in (helios / "pipeline").rglob("*.*")
    }
    served.repos = {hub.HELIOS["base"]: whole}
    for name in ("mid", "distilled"):
        changed = {
            "model_index.json": (helios / f"model_index_{name}.json").read_bytes(),
            "scheduler/scheduler_config.json": (
                helios / f"scheduler_{name}" / "scheduler_config.json"
            ).read_bytes(),
        }
        served.repos[hub.HELIOS[name]] = whole | changed
    base, shared = tmp_path / "base", str(tmp_path / "base")
    made = make_bundle(BundleRequest(output=str(base), helios="base"))
    assert set(made.roles) == {"transformer", "vae", "text_encoder"}
    assert made.roles["vae"].source["name"] == f"{hub.HELIOS['base']}/vae"
    assert str(made.schedule) == hub.SCHEDULES["f1"] and made.sampling.recipe.stages == 1
    for name, steps, zero_star in (("mid", 20, True), ("distilled", 2, False)):
        served.seen.clear()
        request = BundleRequest(output=str(tmp_path / name), helios=name, encoders_from=shared)
        made = make_bundle(request)
        recipe = made.sampling.recipe
        assert made.roles["transformer"].source["name"] == f"{hub.HELIOS[name]}/transformer"
        assert (recipe.stages, recipe.zero_star, made.sampling.steps) == (3, zero_star, steps)
        assert recipe.solver == ("renoise" if name == "distilled" else "unipc-flow")
        assert made.roles["vae"].path == "../base/vae" and made.text_tokens == 512
        assert {file.split("/")[0] for file in served.downloads()} == {
            "transformer", "scheduler", "model_index.json",
        }  # fmt: skip
        assert not is_schedule_assumed(request, made)
    # The same by the flag of a single network.
    alone = Path(hub.HELIOS["mid"]) / "transformer"
    hub.fetch(hub.HELIOS["mid"], pipeline=True, progress=False)
    request = BundleRequest(output=str(tmp_path / "alone"), transformer=alone, encoders_from=shared)
    assert make_bundle(request).sampling.recipe.stages == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lllyasviel/FramePackI2V_HY", ("lllyasviel/FramePackI2V_HY", None)),
        ("people/model/vae", ("people/model", "vae")),
        ("people/model/a/b.safetensors", ("people/model", "a/b.safetensors")),
        ("model.safetensors", None),
        ("people/model.safetensors", None),
        ("here/other", None),
        ("./people/model", None),
        ("/people/model", None),
        ("../people/model", None),
    ],
)
def test_names_of_the_hub_and_paths(text: str, expected, tmp_path, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub.split(text) == expected


def test_released_parts_are_those_of_the_command() -> None:
    """Every network and file of a bundle, by the names of the command's flags; the two models
    differ in the transformer alone."""
    flags = {field.name for field in dataclasses.fields(BundleRequest)}
    i2v, f1 = hub.FRAMEPACK["i2v"], hub.FRAMEPACK["f1"]
    assert set(bundle.ROLES) <= i2v.keys() <= flags
    assert {role for role in i2v if i2v[role] != f1[role]} == {"transformer"}
    assert hub.SCHEDULES.keys() == hub.FRAMEPACK.keys()

"""Encode clips and captions to records with the encoders of a bundle, as sampling does."""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from framepack_jax import bundle, conditioning
from framepack_jax.conditioning import Encoders, load_encoders
from framepack_jax.data.records import Clip, Record
from framepack_jax.models.network_spec import VaeSpec
from framepack_jax.models.tiling import Tiling

TILING = Tiling()


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """The encoders; `vae` (spec, config, parameters) is None if training encodes the frames.
    `chunk_frames` is the number of frames that are encoded alone, 0 for a whole clip."""

    encoders: Encoders
    vae: tuple[VaeSpec, Any, Any] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: jax.Device | None = None
    chunk_frames: int = 0

    @classmethod
    def load(
        cls, path: epath.PathLike, manifest: bundle.Manifest, pixels: bool, chunk_frames: int = 0
    ) -> "Encoder":
        """The encoders in bfloat16 on an accelerator, in float32 on a CPU, the VAE in float32.
        Raises BundleError."""
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        vae = None
        if not pixels:
            spec, cfg = bundle.vae_config(manifest)
            vae = spec, cfg, bundle.load_params(path, manifest, "vae", dtype=jnp.float32)
        encoders = load_encoders(path, manifest, dtype)
        mean, std = manifest.latent_mean, manifest.latent_std
        return cls(encoders, vae, mean, std, chunk_frames=chunk_frames)

    def on(self, device: jax.Device) -> "Encoder":
        """Return a copy on a device, which one thread may use beside those of other devices."""
        networks: dict[str, Any] = {
            name: (cfg, jax.device_put(params, device))
            for name in bundle.ENCODERS
            if (network := getattr(self.encoders, name))
            for cfg, params in [network]
        }
        # Threads cannot share a tokenizer.
        tokenizers: dict[str, Any] = {
            name: copy.deepcopy(getattr(self.encoders, name))
            for name in ("tokenizer", "tokenizer_2")
        }
        encoders = dataclasses.replace(self.encoders, **networks, **tokenizers)
        vae = self.vae and (*self.vae[:2], jax.device_put(self.vae[2], device))
        return dataclasses.replace(self, encoders=encoders, vae=vae, device=device)

    @functools.lru_cache(maxsize=64)  # noqa: B019 - one is made a run
    def prompt(self, caption: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the states (n, D) of the tokens of a prompt, and its pooled state (D,) or None."""
        with warnings.catch_warnings():
            # Captions are cut by thousands; they are counted by `caption_tokens`.
            warnings.simplefilter("ignore")
            text, valid, pooled = conditioning.encode_prompt(self.encoders, [caption])
        count = int(np.asarray(valid).sum())
        return np.asarray(text[0, :count]), None if pooled is None else np.asarray(pooled[0])

    def records(self, clips: Sequence[Clip], frames: np.ndarray) -> list[Record]:
        """Return the records of clips that differ in their captions alone and have these frames (P,
        H, W, 3) uint8."""
        with jax.default_device(self.device):
            image = conditioning.encode_image(self.encoders, frames[:1])
            states = None if image is None else np.asarray(image[0])
            latents = None if self.vae is None else self.latents(frames)
            return [self._record(clip, states, latents) for clip in clips]

    def _record(self, clip: Clip, image: np.ndarray | None, latents: np.ndarray | None) -> Record:
        tokens = conditioning.count_tokens(self.encoders, clip.caption)
        clip = dataclasses.replace(clip, caption_tokens=tokens)
        return Record(clip, *self.prompt(clip.caption), image, latents)

    def latents(self, frames: np.ndarray) -> np.ndarray:
        """Encode frames (P, H, W, 3) uint8 to latents (T, h, w, C): the first frame alone, the
        others from the whole clip, in the temporal tiles of diffusers; or all in chunks."""
        if self.chunk_frames:
            chunks = np.split(frames, range(self.chunk_frames, len(frames), self.chunk_frames))
            return np.concatenate([self._encoded(chunk) for chunk in chunks])
        return np.concatenate([self._encoded(frames[:1]), self._encoded(frames)[1:]])

    def _encoded(self, frames: np.ndarray) -> np.ndarray:
        """Encode frames (P, H, W, 3) uint8 at once to latents (T, h, w, C)."""
        assert self.vae is not None
        clip = frames[None]
        latents = conditioning.clip_latents(*self.vae, clip, self.mean, self.std, tiling=TILING)
        return np.asarray(latents[0])

"""Scores of a pretrained CLIP."""

import json

import numpy as np
import pytest

from framepack_jax import bundle, video
from framepack_jax.cli import evaluate
from framepack_jax.evaluation import clip_score
from tests.fixtures.pictures import FPS, SIDE, texture, video_of


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of toy size with random weights, as a folder; and the model."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        bundle.BUILTIN_BUNDLES["random"] / "tokenizer_2"
    )
    text = sizes | {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
                    "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"shortest_edge": 32}
    transformers.CLIPImageProcessor(size=side, crop_size=32).save_pretrained(folder)
    return folder, model


def test_a_pretrained_clip_measures_each_frame(clip) -> None:
    """Against transformers' own logits, which are cosines times a factor."""
    import torch
    import transformers

    folder, model = clip
    frames = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)
    frames[7] = frames[0]
    found = clip_score.measure(folder, iter(frames), "the red circle moves left")
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=["the red circle moves left"], images=list(frames), return_tensors="pt")
    with torch.inference_mode():
        reference = model(**inputs)
        cosines = (reference.logits_per_image[:, 0] / model.logit_scale.exp()).numpy()
    np.testing.assert_allclose(found["agreement"], cosines, atol=1e-5)
    likeness = (reference.image_embeds @ reference.image_embeds[0]).numpy()
    np.testing.assert_allclose(found["likeness"], likeness, atol=1e-5)
    assert found["likeness"][7] == pytest.approx(1) and found["likeness"][1:7].max() < 1 - 1e-3
    assert "agreement" not in clip_score.measure(folder, frames[:2], "")


def test_a_video_file_by_a_pretrained_clip(clip, tmp_path, capsys) -> None:
    video.write_mp4(tmp_path / "a.mp4", video_of(texture()[:SIDE, :SIDE], 6), FPS)
    flags = ["--video", str(tmp_path / "a.mp4"), "--clip", str(clip[0])]
    evaluate.main([*flags, "--caption", "waves", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "Likeness to the caption" in printed
    kept = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(kept["frames"]["agreement"]) == 6
    assert (tmp_path / "out" / "plots" / "likeness.png").exists()
    with pytest.raises(SystemExit, match="expected a folder with a CLIP model"):
        evaluate.main([*flags[:3], str(tmp_path)])

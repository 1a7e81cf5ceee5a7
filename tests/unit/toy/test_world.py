"""The demo world: what is drawn is what the truth says, and the caption too."""

import itertools

import numpy as np
import pytest

from framepack_jax import video
from framepack_jax.__main__ import main as framepack
from framepack_jax.toy import render, world

SIZE = 96, 128


def scenes(count: int, **options: str) -> list[world.Scene]:
    return [world.scene(7, number, *SIZE, **options) for number in range(count)]


def test_videos_are_the_same_whatever_their_number(tmp_path, capsys) -> None:
    for count, name in ((2, "a"), (3, "b")):
        framepack(["synthetic", "--output", str(tmp_path / name), "--clips", str(count),
                   "--seconds", "0.4", "--workers", "1", "--size", "buckets"])  # fmt: skip
    assert "3 videos of 0.4 s" in capsys.readouterr().out
    for number in range(2):
        files = [tmp_path / name / f"{number:05d}.mp4" for name in "ab"]
        frames = [list(video.read_frames(file)) for file in files]
        assert len(frames[0]) == 12
        assert all(np.array_equal(x, y) for x, y in zip(*frames, strict=True))
        assert files[0].with_suffix(".txt").read_text() == files[1].with_suffix(".txt").read_text()
    with pytest.raises(SystemExit, match="--size 3x5"):
        framepack(["synthetic", "--output", str(tmp_path), "--size", "3x5"])


def test_sizes_are_buckets_of_one_area() -> None:
    sizes = {(s.height, s.width) for s in (world.scene(0, i) for i in range(5))}
    assert (128, 128) in sizes and len(sizes) == 5
    assert all(h % 16 == w % 16 == 0 and abs(h * w / 128**2 - 1) < 0.1 for h, w in sizes)


def test_a_longer_video_begins_like_a_shorter_one() -> None:
    for scene in scenes(4):
        short, long = (np.stack(list(world.frames(scene, s))) for s in (0.5, 1.0))
        assert np.array_equal(short, long[:15]) and len(long) == 30
        assert not np.array_equal(long[0], long[29])


def test_what_is_held_out_is_in_no_training_scene() -> None:
    train, held = scenes(400), scenes(400, split="held-out")
    pairs = {(s.colour, s.form) for scene in train for s in scene.sprites}
    assert not pairs & world.HELD_OUT
    assert len(pairs) == len(render.COLOURS) * len(render.FORMS) - len(world.HELD_OUT)
    new = [{(s.colour, s.form) for s in scene.sprites} & world.HELD_OUT for scene in held]
    assert all(new) and set().union(*new) == world.HELD_OUT
    assert len({scene.caption for scene in train}) > 300
    with pytest.raises(ValueError, match="split 'test'"):
        world.scene(0, 0, split="test")


@pytest.mark.parametrize("size", [(128, 128), (112, 144), (144, 112), (96, 176), (176, 96)])
def test_there_is_room_for_what_is_drawn(size) -> None:
    """Nothing begins behind anything, motions can be seen before they bounce, nothing is rare."""
    made = [world.scene(3, number, *size) for number in range(150)]
    kinds = [sprite.motions[-1].kind for scene in made for sprite in scene.sprites]
    if size[1] >= size[0]:
        assert kinds.count("orbit") > 30 and kinds.count("behind") > 20
        made += [world.hiding(3, number, 1.0, *size) for number in range(30)]
    else:
        assert not {"orbit", "behind"} & set(kinds)
        with pytest.raises(ValueError, match="leave no room"):
            world.hiding(3, 0, 1.0, *size)
    for scene in made:
        assert world.truth(scene, 1 / 30).visible.min() > 0.95
        for sprite in scene.sprites:
            if sprite.motions[0].kind in world.DIRECTIONS:
                way = np.subtract(world.position(scene, sprite, 1.0), sprite.start)
                np.testing.assert_allclose(np.abs(way).max(), world.SPEED, rtol=1e-6)


def test_all_words_and_motions_occur_in_both_splits() -> None:
    kinds, words = [], []
    for split in world.SPLITS:
        made = scenes(400, split=split)
        kinds.append({m.kind for s in made for sprite in s.sprites for m in sprite.motions})
        words.append({w for s in made for w in s.caption.replace(",", "").replace(";", "").split()})
        assert {len(s.sprites) for s in made} == {1, 2, 3}
    assert kinds[0] == kinds[1] == {*world.DIRECTIONS, "stay", "orbit", "behind"}
    assert words[0] == words[1] and len(words[0]) < 60


def test_sprites_are_drawn_where_the_truth_has_them() -> None:
    seen = 0
    for scene in scenes(25):
        truth = world.truth(scene, 2.0)
        rows, columns = np.arange(SIZE[0]) + 0.5, np.arange(SIZE[1]) + 0.5
        for number, i in itertools.product((0, 30, 59), range(len(scene.sprites))):
            if truth.visible[number, i] < 0.999:
                continue
            mask = world.masks(scene, number)[i]
            x = (mask.sum(0) * columns).sum() / mask.sum()
            y = (mask.sum(1) * rows).sum() / mask.sum()
            np.testing.assert_allclose((x, y), truth.centres[number, i], atol=0.2)
            seen += 1
    assert seen > 30


def test_sprites_keep_their_colour_and_nothing_else_has_it() -> None:
    """Found by colour, each is where it covers a pixel wholly, and nowhere else."""
    palette = np.asarray(list(render.COLOURS.values()), np.float32)
    for scene in scenes(8):
        for number, frame in enumerate(world.frames(scene, 2.0)):
            if number % 20:
                continue
            masks = world.masks(scene, number)
            for mask, sprite in zip(masks, scene.sprites, strict=True):
                assert (frame[mask == 1] == render.COLOURS[sprite.colour]).all()
            free = frame[masks.sum(0) == 0].astype(np.float32)
            distance = np.linalg.norm(free[:, None] - palette[None], axis=-1)
            assert distance.min() > 60


def test_nobody_leaves_the_picture() -> None:
    for scene in scenes(30):
        for sprite in scene.sprites:
            places = [world.position(scene, sprite, t) for t in np.arange(0, 20, 0.23)]
            x, y = np.transpose(places)
            assert (sprite.radius - 1e-4 < x).all() and (
                x < scene.aspect - sprite.radius + 1e-4
            ).all()
            assert (sprite.radius - 1e-4 < y).all() and (y < 1 - sprite.radius + 1e-4).all()


def test_sprites_do_what_the_caption_says() -> None:
    counted = dict.fromkeys([*world.DIRECTIONS, "stay", "orbit"], 0)
    for scene, sprite in ((s, sprite) for s in scenes(80) for sprite in s.sprites):
        kind = world.motion_at(sprite, 0.0)
        start, later = (np.asarray(world.position(scene, sprite, t)) for t in (0.0, 0.9))
        if kind in world.DIRECTIONS:
            assert f"{sprite.name} moves {kind}" in scene.caption
            expected = np.asarray(world.DIRECTIONS[kind]) * 0.9 * world.SPEED
            np.testing.assert_allclose(later - start, expected, atol=1e-6)
        elif kind == "stay":
            assert f"{sprite.name} stays" in scene.caption and (later == start).all()
        elif kind == "orbit":
            around = scene.sprites[sprite.motions[0].around]
            assert f"{sprite.name} orbits the {around.name}" in scene.caption
            middle = np.asarray(around.start)
            radii = [np.linalg.norm(p - middle) for p in (start, later)]
            np.testing.assert_allclose(radii[0], radii[1], rtol=1e-5)
            way = 2 * radii[0] * np.sin(0.9 * world.SPEED / radii[0] / 2)
            np.testing.assert_allclose(np.linalg.norm(later - start), way, rtol=1e-5)
        counted[kind] = counted.get(kind, 0) + 1
    assert min(counted.values()) > 3


def test_two_prompts_from_one_picture() -> None:
    for number in range(20):
        first, second = world.counterfactual(0, number, 64, 64)
        assert first.caption != second.caption
        actor = world.different(first, second)
        assert (world.truth(first, 1 / 30).visible > 0.95).all()  # but for pixels
        films = [np.stack(list(world.frames(s, 1.0))) for s in (first, second)]
        assert np.array_equal(films[0][0], films[1][0])
        ways = [np.subtract(world.position(s, s.sprites[actor], 0.8), s.sprites[actor].start)
                for s in (first, second)]  # fmt: skip
        cosine = np.dot(*ways) / np.prod([np.linalg.norm(way) for way in ways])
        assert cosine < 0.1


@pytest.mark.parametrize("hidden", world.HIDDEN)
def test_behind_the_wall_a_sprite_is_out_of_sight_as_long_as_stated(hidden) -> None:
    for number in range(8):
        scene = world.hiding(0, number, hidden, 128, 128)
        who = world.hider(scene)
        assert f"goes behind the wall for {world.HIDDEN[hidden]}" in scene.caption
        visible = world.truth(scene, hidden + 4).visible[:, who]
        runs = [(seen, len(list(group))) for seen, group in itertools.groupby(visible > 0.003)]
        assert [seen for seen, _ in runs[:3]] == [True, False, True]
        assert abs(runs[1][1] - 30 * hidden) <= 1.5
        assert visible[0] > 0.99 and visible[sum(n for _, n in runs[:2]) + 25] > 0.9

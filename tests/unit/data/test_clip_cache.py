"""Names in the clip cache."""

from framepack_jax.data import clip_cache


def test_store_names_are_readable_and_differ() -> None:
    names = [
        clip_cache.video_id(source) for source in ("a/b c.mp4", "b c.mp4", "a/b-c.mp4", "ä.mp4")
    ]
    assert len(set(names)) == 4 and names[0].startswith("b_c-")
    # Of a million sources, two share 64 bits once in 37 million times.
    assert {len(name.rpartition("-")[2]) for name in names} == {16}

"""Summary of a prepared dataset."""

from framepack_jax.data.build import Packed


def test_a_summary_names_clips_rejections_and_devices() -> None:
    packed = Packed(
        5, 90.0, {(64, 96): 2, (96, 64): 3}, {"still": 1, "short": 2}, cut_captions=4,
        left_out={".txt": 2}, encoded=(3, 2), text_tokens=77,
    )  # fmt: skip
    lines = str(packed).splitlines()
    assert lines[0].split() == ["encoded", "5", "clips", "on", "2", "devices:", "3,", "2"]
    assert lines[1].split() == ["accepted", "5", "clips,", "1.5", "minutes"]
    assert [line.split() for line in lines[2:4]] == [["64", "x", "96", "2"], ["96", "x", "64", "3"]]
    assert [line.split() for line in lines[4:7]] == [
        ["rejected", "3"],
        ["still", "1"],
        ["short", "2"],
    ]
    assert lines[7].startswith("captions cut: 4, after 77 tokens") and ".txt" in lines[8]
    assert len(lines) == 9


def test_one_device_is_not_named() -> None:
    assert str(Packed(1, 6.0, {}, {}, encoded=(1,))).split() == (
        ["accepted", "1", "clips,", "0.1", "minutes", "rejected", "0"]
    )

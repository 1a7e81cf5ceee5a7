"""Folders and manifests of videos, as people have them: every encoding, name, column and link."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from framepack_jax.data import captions, listing, manifests
from framepack_jax.data.listing import Listing, list_videos
from framepack_jax.data.records import DatasetError
from framepack_jax.data.rejected import Rejected

TEXT = "a café at night, 夜"
BOM = "\ufeff"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of five (empty) videos, a.mp4 to e.mp4, without captions."""
    for name in "abcde":
        (tmp_path / f"{name}.mp4").touch()
    return tmp_path


def found(listed: Listing) -> dict[str, tuple[str, ...]]:
    return {video.source: video.captions for video in listed}


def reasons(listed: Listing) -> dict[object, str]:
    """By row, or by name where there are no rows."""
    return {problem.row or problem.source: problem.reason for problem in listed.problems()}


def listed(folder: Path, name: str, text: str | bytes) -> Listing:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return list_videos(folder / name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_captions_are_read_in_any_encoding_with_a_mark(encoding: str) -> None:
    assert captions.decode((BOM + TEXT).encode(encoding), "a.txt") == TEXT
    assert captions.decode(BOM.encode(encoding), "a.txt") == ""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be"])
def test_captions_without_a_mark_are_read_if_they_can_only_be_that(encoding: str) -> None:
    assert captions.decode(TEXT.encode(encoding), "a.txt") == TEXT


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("she’s late".encode("cp1252"), "a.txt is not UTF-8: byte 0x92 at offset 3"),
        ("红色的车".encode("gbk"), "byte 0xba at offset 0"),
        ("红色的车".encode("utf-16-be"), "byte 0x"),
        (b"\xef\xbb\xbfcaf\xe9", "byte 0xe9 at offset 6"),
        ((BOM + "night").encode("utf-16-le") + b"\0", "not UTF-16-LE: byte 0x00 at offset 12"),
        (b"she\0waves", "has a NUL, byte 0x00 at offset 3"),
        (b"she waves" + b"\0" * 8, "has a NUL, byte 0x00 at offset 9"),
        ((BOM + "夜\0").encode("utf-16-be"), "has a NUL, byte 0x00 at offset 4"),
        (b"\1\0\2\0\3\0", "has a NUL"),
    ],
)
def test_other_bytes_are_named_with_their_offset(data: bytes, message: str) -> None:
    with pytest.raises(Rejected, match=message) as error:
        captions.decode(data, "a.txt")
    assert error.value.reason == "bad_caption"


def test_a_bad_caption_file_rejects_its_video_alone(folder) -> None:
    (folder / "a.txt").write_bytes(b"\xff\xfe" + " waves\n".encode("utf-16-le"))
    (folder / "b.TXT").write_text("bows")
    (folder / "c.txt").write_bytes(b"caf\xe9")
    (folder / "d.txt").write_text(BOM + " \n\t")
    (folder / "e.txt").write_text("x" * (captions.MAX_BYTES + 1))
    found_here = list_videos(folder)
    assert found(found_here) == {"a.mp4": ("waves",), "b.mp4": ("bows",)}
    assert reasons(found_here) == {
        "c.mp4": "bad_caption", "d.mp4": "no_caption", "e.mp4": "bad_caption",
    }  # fmt: skip
    assert found(list_videos(folder, empty_captions=True))["d.mp4"] == ("",)


def test_all_kinds_of_video_files_are_taken_and_the_others_counted(tmp_path, folder) -> None:
    kinds = ["gif", "3gp", "wmv", "flv", "mts", "m2ts", "vob", "mkv", "webm", "avi", "mov", "mpg"]
    kinds += ["mpeg", "ts", "m4v", "ogv", "MTS", "Mp4"]
    for number, kind in enumerate(kinds):
        (folder / f"{number}.{kind}").touch()
    for name in ("x.jpg", "y.JPG", "z.tar.gz", "README", ".hidden", "b.txt", "c.caption"):
        (folder / name).touch()
    every = list_videos(folder, empty_captions=True)
    assert len(every) == len(kinds) + 5
    assert listing.say_left_out(every.left_out) == "1 .gz, 2 .jpg, 2 without suffix"
    empty = tmp_path / "pictures"
    empty.mkdir()
    (empty / "x.jpg").touch()
    with pytest.raises(DatasetError, match=r"has no videos; expected .*; left out: 1 \.jpg"):
        list_videos(empty)


def test_links_are_followed_and_nothing_is_taken_twice(tmp_path) -> None:
    for name in ("videos/deep/a.mp4", "other/b.mp4", "other/more/c.mp4", "alone.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    videos = tmp_path / "videos"
    links = {
        "again.mp4": videos / "deep" / "a.mp4",  # a file that is there
        "deep/up": videos,  # a loop
        "everything": tmp_path,  # a loop around the folder
        "other": tmp_path / "other",
        "same": tmp_path / "other" / "more",  # a folder twice
        "x.mp4": tmp_path / "alone.mp4",
        "y.mp4": tmp_path / "alone.mp4",
        "lost.mp4": tmp_path / "nowhere",
    }
    for name, target in links.items():
        (videos / name).symlink_to(target)
    here = list_videos(videos, empty_captions=True)
    real = {os.path.realpath(video.path) for video in here}
    names = ("videos/deep/a.mp4", "other/b.mp4", "other/more/c.mp4", "alone.mp4")
    assert real == {str(tmp_path / name) for name in names} and len(here) == 4
    assert "deep/a.mp4" in found(here)
    assert reasons(here) == {"lost.mp4": "missing"}


def test_names_that_are_no_text_are_rejected_alone(folder) -> None:
    (folder / os.fsdecode(b"caf\xe9.mp4")).touch()
    os.mkfifo(folder / "pipe.mp4")
    long = "n" * 251 + ".mp4"
    (folder / long).touch()  # whose caption file would have too long a name
    here = list_videos(folder, empty_captions=True)
    assert len(here) == 6 and long in found(here)
    (folder / long).unlink()
    assert reasons(here) == {"caf\\xe9.mp4": "bad_name", "pipe.mp4": "unreadable"}
    names = ["b\0.mp4", "b\ud83d.mp4", "n" * 300 + ".mp4", "http://x.y/b.mp4", "", ".", "gone.mp4"]
    rows = [{"video": name, "caption": "x"} for name in ["a.mp4", *names]]
    here = listed(folder, "list.jsonl", "\n".join(map(json.dumps, rows)))
    assert found(here) == {"a.mp4": ("x",)}
    assert reasons(here) == {
        2: "bad_name", 3: "bad_name", 4: "bad_name", 5: "missing", 6: "bad_row", 7: "unreadable",
        8: "missing",
    }  # fmt: skip
    lines = [json.dumps(problem.as_dict()) for problem in here.problems()]
    assert any("b\\\\ud83d.mp4" in line for line in lines)


def test_a_bad_row_is_rejected_alone(folder) -> None:
    good = '{"video": "a.mp4", "caption": "waves"}'
    bad = ['{"video":', "7", '"a.mp4"', "[" * 100_000, '{"film": "a.mp4"}', '{"video": 3}']
    bad += ['{"video": "b.mp4", "caption": {"en": "x"}}', '{"video": "b.mp4", "start": "soon"}']
    bad += ['{"video": "b.mp4", "start": 3, "end": 2}', '{"video": "b.mp4", "start": 1e999}']
    text = "\n".join([good, *bad]).encode() + b'\n\n{"video": "b.mp4", "caption": "caf\xe9"}\n'
    surrogate = b'{"video": "c.mp4", "caption": ["fine", "lone \\ud83d"]}\n'
    last = b'{"video": "d.mp4", "caption": "bows"}'
    here = listed(folder, "list.jsonl", text + surrogate + last)
    assert found(here) == {"a.mp4": ("waves",), "d.mp4": ("bows",)}
    expected = dict.fromkeys(range(2, len(bad) + 2), "bad_row")
    assert reasons(here) == expected | {len(bad) + 3: "bad_row", len(bad) + 4: "bad_caption"}
    details = {problem.row: problem.detail for problem in here.problems()}
    assert details[6].startswith("it names no video; its columns are film; expected video, ")
    assert "byte 0xe9 at offset 34 is not UTF-8" in details[len(bad) + 3]


@pytest.mark.parametrize(
    "columns",
    [("video", "caption"), ("video_path", "caption"), ("file_name", "text"), ("path", "text"),
     ("file_path", "text"), ("video_file", "prompt"), ("path", "cap"), (" Video ", "Caption")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_columns_of_other_trainers(folder, kind: str, columns: tuple[str, str]) -> None:
    values = [("a.mp4", 'she says "hi", and\nwaves'), ("b.mp4", "bows; twice")]
    if kind in ("csv", "tsv"):
        mark = {"csv": ",", "tsv": "\t"}[kind]
        rows = [(*columns, "score"), *((*row, "5.1") for row in values)]
        quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in rows]
        text = "\r\n".join(map(mark.join, quoted))
    else:
        rows = [dict(zip(columns, row, strict=True)) | {"score": 5.1} for row in values]
        text = json.dumps(rows, indent=1) if kind == "json" else "\n".join(map(json.dumps, rows))
    here = listed(folder, f"list.{kind}", BOM + text)
    assert found(here) == {name: (caption,) for name, caption in values}


def test_a_table_without_a_column_of_videos_names_those_it_has(folder) -> None:
    with pytest.raises(DatasetError, match=r"only film, caption; expected video, video_path, .* "):
        listed(folder, "list.csv", "film,caption\na.mp4,x\n")
    with pytest.raises(DatasetError, match="only nothing"):
        listed(folder, "list.csv", "")
    with pytest.raises(DatasetError, match=r"expected a folder, or a file of \.jsonl, .*\.csv"):
        listed(folder, "list.xml", "<video/>")


def test_rows_of_a_table_are_rejected_alone(folder) -> None:
    text = b"video;caption\na.mp4;waves\nb.mp4;one;two\nc.mp4;caf\xe9\nd.mp4\ne.mp4;\n"
    (folder / "e.txt").write_text("jumps")
    here = listed(folder, "list.csv", text)
    assert found(here) == {"a.mp4": ("waves",), "e.mp4": ("jumps",)}
    assert reasons(here) == {3: "bad_row", 4: "bad_caption", 5: "no_caption"}
    assert "has 3 fields, the first line 2" in {p.row: p.detail for p in here.problems()}[3]
    text = 'video,caption\na.mp4,"says ""hi"""\n\nb.mp4,"open\nc.mp4,"x"\nd.mp4,y\ne.mp4,"open\n'
    here = listed(folder, "list.csv", text)
    assert found(here) == {"a.mp4": ('says "hi"',), "c.mp4": ("x",), "d.mp4": ("y",)}
    assert reasons(here) == {4: "bad_row", 7: "bad_row"}, "numbers of lines"
    assert all("is a quote left open?" in problem.detail for problem in here.problems())


def test_json_that_is_an_array_an_object_of_captions_or_lines(folder, monkeypatch) -> None:
    """Also where an item lies across the border of what is read at a time."""
    monkeypatch.setattr(manifests, "CHUNK", 7)
    rows = [{"video": "a.mp4", "caption": "waves"}, 5, {"video": "b.mp4", "caption": TEXT}]
    for text in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False)):
        here = listed(folder, "list.json", f" \n{text}\n")
        assert found(here) == {"a.mp4": ("waves",), "b.mp4": (TEXT,)} and reasons(here) == {
            2: "bad_row"
        }
    here = listed(folder, "list.json", "\n".join(map(json.dumps, rows)))
    assert len(here) == 2
    by_name = {"a.mp4": ["waves", "bows"], "b.mp4": "jumps", "c.mp4": {"caption": "sits"}}
    for text in (json.dumps(by_name, indent=1), json.dumps(by_name)):
        here = listed(folder, "captions.json", text)
        assert found(here) == {"a.mp4": ("bows", "waves"), "b.mp4": ("jumps",), "c.mp4": ("sits",)}
    here = listed(folder, "wrapped.json", json.dumps({"data": rows[::2]}))
    assert found(here) == {"a.mp4": ("waves",), "b.mp4": (TEXT,)}
    for text in ('[{"video": "a.mp4"}, {"video"', '[{"video": "a.mp4"}'):
        with pytest.raises(DatasetError, match="is not valid JSON after row 1"):
            listed(folder, "list.json", text)


def test_manifests_in_utf_16(folder) -> None:
    text = f'{BOM}{{"video": "a.mp4", "caption": "{TEXT}"}}\n'
    assert found(listed(folder, "list.jsonl", text.encode("utf-16-le"))) == {"a.mp4": (TEXT,)}
    table = f"{BOM}video,caption\na.mp4,{TEXT.replace(',', '')}\n"
    assert len(listed(folder, "list.csv", table.encode("utf-16-be"))) == 1
    with pytest.raises(DatasetError, match=r"list\.csv is not utf-16.* text"):
        listed(folder, "list.csv", table.encode("utf-16-le") + b"x")


def test_several_captions_and_spans_of_a_video(folder) -> None:
    rows = [
        {"video": "a.mp4", "caption": ["waves", "bows", " ", "waves"]},
        {"video": "a.mp4", "caption": "jumps"},
        {"video": "a.mp4", "caption": "bows"},
        {"video": "b.mp4", "start": 1, "end": 2.5, "caption": "one"},
        {"video": "b.mp4", "start_time": "0:01:00.5", "end_time": "00:02:00", "caption": "two"},
        {"video": "b.mp4", "caption": "all"},
    ]
    here = listed(folder, "list.jsonl", "\n".join(map(json.dumps, rows)))
    spans = {(v.source, v.start, v.end): v.captions for v in here}
    assert spans == {
        ("a.mp4", 0, float("inf")): ("bows", "jumps", "waves"), ("b.mp4", 1, 2.5): ("one",),
        ("b.mp4", 60.5, 120): ("two",), ("b.mp4", 0, float("inf")): ("all",),
    }  # fmt: skip
    assert reasons(here) == {3: "repeated"}
    again = [rows[1], {"video": "a.mp4", "caption": ["jumps", "sits"]}]
    here = listed(folder, "again.jsonl", "\n".join(map(json.dumps, again)))
    assert found(here) == {"a.mp4": ("jumps", "sits")} and not reasons(here)
    empty = {"video": None, "file_name": "a.mp4", "caption": "", "text": "waves"}
    assert found(listed(folder, "empty.jsonl", json.dumps(empty))) == {"a.mp4": ("waves",)}
    here = listed(folder, "list.jsonl", "\n".join(map(json.dumps, rows)))
    assert len({video.id for video in here}) == 4


@pytest.mark.parametrize("kind", ["folder", "jsonl", "json", "csv"])
def test_memory_does_not_grow_with_the_number_of_videos(tmp_path, kind: str) -> None:
    """1000 more videos with captions of 1000 characters take less than 200 bytes each."""
    caption = "x" * 1000
    peaks = []
    for count in (300, 1300, 1301):
        folder = tmp_path / str(count)
        folder.mkdir()
        names = [f"{number}.mp4" for number in range(count)]
        for name in names:
            (folder / name).touch()
        rows = [{"video": name, "caption": f"{name} {caption}"} for name in names]
        if kind == "jsonl":
            (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
        if kind == "json":
            (folder / "list.json").write_text(json.dumps(rows))
        if kind == "csv":
            lines = [f"{row['video']},{row['caption']}" for row in rows]
            (folder / "list.csv").write_text("\n".join(["video,caption", *lines]))
        del names, rows
        tracemalloc.start()
        here = list_videos(folder if kind == "folder" else folder / f"list.{kind}", True)
        assert sum(1 for _ in here) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Of two equal ones the lower: once in a while Python makes its own tables larger.
    assert min(peaks[1:]) - peaks[0] < 1000 * 200

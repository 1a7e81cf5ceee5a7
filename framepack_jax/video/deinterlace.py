"""Deinterlace decoded frames."""

import contextlib
from collections.abc import Iterable, Iterator

import av
from av.filter import Graph
from av.video.stream import VideoStream


def deinterlaced(frames: Iterable[av.VideoFrame], stream: VideoStream) -> Iterator[av.VideoFrame]:
    """Deinterlace interlaced frames; return others unchanged."""
    graph: Graph | None = None
    kind: tuple[int, int, str] | None = None
    for frame in frames:
        here = frame.width, frame.height, frame.format.name
        if graph is not None and here != kind:
            yield from _pulled(graph, last=True)
            graph = None
        if graph is None and frame.interlaced_frame:
            graph, kind = _deinterlacer(frame, stream), here
        if graph is None:
            yield frame
        else:
            graph.push(frame)
            yield from _pulled(graph)
    if graph is not None:
        yield from _pulled(graph, last=True)


def _deinterlacer(frame: av.VideoFrame, stream: VideoStream) -> Graph:
    """Return the deinterlacer of libavfilter for frames like this one."""
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=stream.time_base
    )
    bwdif = graph.add("bwdif", "mode=send_frame:deint=interlaced")
    graph.link_nodes(source, bwdif, graph.add("buffersink")).configure()
    return graph


def _pulled(graph: Graph, last: bool = False) -> Iterator[av.VideoFrame]:
    """Yield the frames that a graph has finished; with `last`, also its buffered frames."""
    if last:
        graph.push(None)
    with contextlib.suppress(av.BlockingIOError, av.EOFError):
        while True:
            yield graph.vpull()

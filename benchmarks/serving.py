"""Load a server with videos, kill it in between, and check that nothing is lost or made twice.

    python benchmarks/serving.py [--bundle random] [--videos 200] [--kills 3] [--json FILE]

Starts `framepack serve` in a folder of its own, sends all requests from several clients at once,
polls until all videos are completed, and reads each. Between, the server is killed by SIGKILL and
started again. Prints requests a second, latencies, and the memory of the server after the first and
after the last video. The exit code is 1 if a video is missing, differs from its request, or if a
section was sampled twice.
"""

import concurrent.futures
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import tyro

MEGABYTE = 1e6
POLL = 0.2
CLIENTS = 8
PAGE = 100


@dataclasses.dataclass(frozen=True)
class ServingBenchmark:
    """Measure a server under many requests."""

    bundle: str = "random"
    """The bundle."""
    flags: tuple[str, ...] = ("schedule=f1k1_x_f16k4f2k2f1k1_g2",)
    """More flags of framepack serve, without their dashes."""
    size: str = "64x64"
    """Size of each video."""
    seconds: str = "0.5"
    """Length of each video."""
    steps: int = 2
    """Denoising steps a section."""
    videos: int = 200
    """Number of videos."""
    kills: int = 3
    """Number of times that the server is killed."""
    json: Path | None = None
    """Keep the figures here."""


class Server:
    """`framepack serve` in a process of its own, which can be killed and started again."""

    def __init__(self, cfg: ServingBenchmark, folder: Path) -> None:
        flags = [part for flag in cfg.flags for part in f"--{flag}".split("=", 1)]
        self.command = [
            sys.executable, "-m", "framepack_jax", "serve", "--bundle", cfg.bundle, "--output",
            str(folder), "--port", "0", "--max-queue", str(cfg.videos), *flags,
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = next((line for line in self.process.stdout if " at http://" in line), None)
        if line is None:
            raise SystemExit(f"error: the server ended with {self.process.wait()}")
        address = line.split(" at ")[1].split(";")[0]
        self.client = httpx.Client(base_url=address, timeout=60)

    def kill(self) -> None:
        """Kill the server as a power cut does."""
        self.process.kill()
        self.process.wait()

    def memory(self) -> float:
        """Return the resident memory in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and return the figures."""
    cfg = tyro.cli(ServingBenchmark, prog="benchmarks/serving.py", args=args)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(cfg, Path(folder))
        try:
            figures = measure(cfg, server, Path(folder))
        finally:
            server.kill()
    if cfg.json is not None:
        cfg.json.write_text(json.dumps(figures, indent=1))
    for name, value in figures.items():
        print(f"{name:32} {value}")
    return figures


def measure(cfg: ServingBenchmark, server: Server, folder: Path) -> dict[str, Any]:
    """Send the requests, wait for the videos, and return the figures."""
    began = time.monotonic()

    def send(seed: int) -> tuple[str, float]:
        start = time.monotonic()
        body = {
            "prompt": f"video {seed}", "size": cfg.size, "seconds": cfg.seconds,
            "steps": cfg.steps, "seed": seed,
        }  # fmt: skip
        answer = server.client.post("/videos", json=body)
        answer.raise_for_status()
        return answer.json()["id"], time.monotonic() - start

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        sent = list(pool.map(send, range(cfg.videos)))
    names = [name for name, _ in sent]
    seconds = sorted(latency for _, latency in sent)
    accepted = time.monotonic() - began
    polls, memory, kept = wait(cfg, server, folder)
    ended = time.monotonic() - began
    reads = [check(server, folder, name, seed) for seed, name in enumerate(names)]
    check_kept(kept)
    return {
        "videos": cfg.videos,
        "kills": cfg.kills,
        "sections kept over kills": len(kept),
        "requests a second": round(cfg.videos / accepted, 1),
        "latency of a request, median": f"{1000 * statistics.median(seconds):.0f} ms",
        "latency of a request, 99 %": f"{1000 * seconds[int(0.99 * len(seconds))]:.0f} ms",
        "latency of a list, median": f"{1000 * statistics.median(polls):.0f} ms",
        "latency of a download, median": f"{1000 * statistics.median(reads):.0f} ms",
        "videos a minute, with restarts": round(60 * cfg.videos / ended, 1),
        "memory after the first video": f"{memory[0] / MEGABYTE:.0f} MB",
        "memory after the last video": f"{memory[-1] / MEGABYTE:.0f} MB",
    }


def wait(
    cfg: ServingBenchmark, server: Server, folder: Path
) -> tuple[list[float], list[float], dict[Path, int]]:
    """Wait until all videos are completed, and kill the server in between.

    Returns the seconds of each look at the list, the memory in bytes of the last server after its
    first and its last video, and the times of the sections that were there when a server died.
    """
    draw = random.Random(0)
    at = sorted(draw.sample(range(1, cfg.videos), cfg.kills))
    polls: list[float] = []
    memory: list[float] = []
    kept: dict[Path, int] = {}
    done = first = 0
    while done < cfg.videos:
        time.sleep(POLL)
        start = time.monotonic()
        server.client.get("/videos", params={"limit": PAGE}).raise_for_status()
        polls.append(time.monotonic() - start)
        done = completed(folder)
        if at and done >= at[0]:
            at.pop(0)
            time.sleep(draw.uniform(0, 1))
            server.kill()
            kept |= {
                path: path.stat().st_mtime_ns for path in folder.glob("video_*/latents/section_*")
            }
            server.start()
            first, memory = completed(folder), []
        if done > first and len(memory) < 1:
            memory.append(server.memory())
    return polls, [*memory, server.memory()], kept


def completed(folder: Path) -> int:
    """Count the complete videos of a folder."""
    records = folder.glob("video_*/run.json")
    return sum(json.loads(record.read_text())["status"] == "finished" for record in records)


def check(server: Server, folder: Path, name: str, seed: int) -> float:
    """Download a video, which must be complete and that of its request; return the seconds."""
    start = time.monotonic()
    content = server.client.get(f"/videos/{name}/content")
    seconds = time.monotonic() - start
    if content.status_code != 200 or b"moov" not in content.content:
        raise SystemExit(f"error: video {name} has no content: {content.text[:200]}")
    flags = json.loads((folder / name / "run.json").read_text())["flags"]
    if (flags["prompt"], flags["seed"]) != (f"video {seed}", seed):
        raise SystemExit(f"error: video {name} was made from {flags['prompt']!r}, not video {seed}")
    return seconds


def check_kept(kept: dict[Path, int]) -> None:
    """End with an error if a section that was there when the server died was sampled again."""
    if again := [path for path, time in kept.items() if path.stat().st_mtime_ns != time]:
        raise SystemExit(f"error: {len(again)} sections were sampled twice, one is {again[0]}")


if __name__ == "__main__":
    main()

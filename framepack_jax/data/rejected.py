"""The error that rejects one video and lets the others continue."""

# Suffixes of video files, as they are found in folders.
SUFFIXES = (
    ".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts",
    ".gif", ".wmv", ".flv", ".3gp", ".3g2", ".ogv", ".vob", ".m2v", ".mxf", ".asf", ".qt", ".f4v",
)  # fmt: skip


class Rejected(ValueError):
    """A video that gives no clips: `reason`, a short key, and the details as its text."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail

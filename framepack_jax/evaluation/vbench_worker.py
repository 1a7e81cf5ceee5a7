"""Score videos with VBench. `vbench_score` runs a copy of this file as a script, in an environment
that has VBench, with Python 3.8 or newer, and may lack framepack-jax.

    python vbench_worker.py REQUEST.json

The request is a JSON object: `folder` of mp4 files, `prompts` by file name, `dimensions`, and
`output`, a folder for VBench's own files. `output`/answer.json holds `scores`, by dimension and
file name, or `missing`, the message if a package is not installed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NAME = "scores"


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    try:
        import torch
        from vbench import VBench
    except ImportError as error:
        return {"missing": str(error)}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The second argument names VBench's own prompts, which custom videos do not use.
    VBench(device, "", request["output"]).evaluate(
        videos_path=request["folder"],
        name=NAME,
        prompt_list=request["prompts"],
        dimension_list=request["dimensions"],
        mode="custom_input",
    )
    results = json.loads((Path(request["output"]) / f"{NAME}_eval_results.json").read_text())
    # VBench gives [mean over videos, [{"video_path": ..., "video_results": ...}, ...]].
    return {
        "scores": {
            dimension: {Path(each["video_path"]).name: each["video_results"] for each in found[1]}
            for dimension, found in results.items()
        }
    }


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    (Path(given["output"]) / "answer.json").write_text(json.dumps(main(given)))

"""Metrics for drift and forgetting, per video and over videos.

metrics       per frame: sharpness, noise, colours, smoothness, dynamic degree
optical_flow  dense flow between frames
drift         first 15 % against last 15 %; means with standard errors
clip_score    similarity to the first frame and the caption by a pretrained CLIP
vbench_score  scores by VBench, in the user's environment; vbench_worker runs there
tables, plots Markdown, JSON and PNG of the results
elo           pages for blind votes between videos, ratings from the votes
video_file    the report of one video file

The suites that know the truth of their videos are in `framepack_jax.toy`.
"""

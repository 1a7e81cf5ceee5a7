"""The ruler for drift and forgetting: what is measured of a video, and what of many is made of it.

metrics.py   figures of every frame: clarity, colours, motion; `flow.py` is the optical flow
objects.py   coloured shapes whose truth is known: where they are, whether they are themselves
motions.py   what a shape does, in the words of captions
drift.py     first 15 % against last 15 %; means with standard errors
cases.py     held-out scenes of the demo world, and what is asked of each
rows.py      where videos come from: the references, and models under test
report.py, plots.py   tables, JSON and pictures
"""

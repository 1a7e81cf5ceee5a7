"""The ruler for drift and forgetting: what is measured of a video, and what of many is made of it.

metrics.py   figures of every frame: clarity, colours, motion; `flow.py` is the optical flow
objects.py   coloured shapes whose truth is known: where they are, whether they are themselves
motions.py   what a shape does, in the words of captions
drift.py     first 15 % against last 15 %; means with standard errors
cases.py     held-out scenes of the demo world, and what is asked of each
rows.py      where videos come from: the references, and models under test
parts.py     which cases and rows make a table, and of which figures
results.py   what has been made so far, on the disk
summary.py   all results written out, by `report.py` (tables, JSON) and `plots.py`
footage.py   a video file alone, whose truth is not known
"""

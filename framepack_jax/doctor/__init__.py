"""Checks of `framepack doctor`, one file for each part of a machine.

finding    what a check found, and the remedy
packages   Python, packages, and plug-ins of JAX that go together
machine    devices and their drivers, memory, folders
media      encoders and decoders of video
bundles    whether a bundle is whole
programs   attention kernels against a reference, and a small video from end to end
"""

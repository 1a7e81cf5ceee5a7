"""Measure a bundle on the devices of this machine: denoising step, section, decoding, training."""

"""PyTorch checkpoints -> parameters of the networks here.

    readers      files and folders as one table of named tensors, read one at a time
    transforms   how a torch tensor and a leaf here hold the same numbers; rows that say so
    engine       rows matched against a model and a checkpoint: all that is wrong, then leaves
    transformer, vae, encoders   the tables, one for each naming
    tables       which table fits a checkpoint
    assets       tokenizer and image processor files

The only place that may import torch, and only inside functions.
"""

"""PyTorch checkpoints -> parameters of the networks here, and back.

    hub          repositories of the Hugging Face hub as folders here
    file_formats one file: safetensors, PyTorch's archives
    float8       8-bit weights and their scales as bfloat16
    weight_files files and folders as one table of named tensors, read one at a time
    transforms   how a torch tensor and a leaf here hold the same numbers; rows that say so
    engine       rows matched against a model and a checkpoint: all that is wrong, then leaves
    transformer, vae, encoders   the tables, one for each naming
    tables       which table fits a checkpoint
    tokenizers   tokenizer and image processor files
    inspect      what a file is, in words
    verify       whether a bundle holds what a checkpoint holds
    export       the way back: the same rows, inverted
    lora, lora_fusion   adapters in and out; how a pair of factors goes through a row

The only place that may import torch, and only inside functions.
"""

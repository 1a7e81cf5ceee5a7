"""PyTorch checkpoints to parameters of the networks here, and back.

    request, sources    options of a bundle; the source of each of its parts
    make_bundle         check all inputs, write a bundle (output_folder, assembly, summary)
    hub                 download repositories of the Hugging Face hub
    file_formats        one file: safetensors, PyTorch's archives
    float8              8-bit weights and their scales as bfloat16
    weight_files        files and folders as one table of named tensors, read one at a time
    transforms          how a torch tensor and a leaf here hold the same numbers; rows that say so
    engine              match rows with a model and a checkpoint: all problems, then leaves
    arrays, memory      cast, quantize and reorder arrays; memory of the process
    transformer, vae, wan_vae, encoders   the tables, one for each naming
    latent_statistics   mean and spread of a VAE's latents
    tables              choose the table of a checkpoint
    tokenizers          tokenizer and image-processor files
    inspect             describe a file
    verify              compare a bundle with a checkpoint
    export              write checkpoints: the same rows, inverted (export_configs, export_files)
    lora                read and write adapters (lora_names, lora_targets, lora_fusion,
                        lora_peft)

Only this package and one metric of evaluation import torch, inside functions.
"""

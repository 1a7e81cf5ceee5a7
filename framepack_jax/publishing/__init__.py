"""Upload bundles, LoRAs and exported networks to the Hugging Face hub, and download them.

artifact    recognise what a path holds
facts       what its files record: base, schedule, training, networks
licences    licences of the released models
card        the model card, README.md
push        upload
pull        download, verify, and move into place
hub_errors  one line for an error of the hub's client
"""

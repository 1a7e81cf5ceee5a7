"""Read the configuration in the records of earlier versions of this program.

Names are changed to those of today. Settings that did not exist get the values that keep a run as
it was: a resumed run is the same to the last bit, or is refused by the name of the setting.
"""

from typing import Any

Config = dict[str, Any]
# Version of the record. Records of version 1 have no "format".
FORMAT = 4
RENAMED = {
    1: {
        "accumulate": "grad_accum_steps",
        "max_bad_steps": "max_nonfinite_steps",
        "times": "noise_schedule",
    },
    2: {"max_nonfinite_steps": "max_skipped_steps"},
    3: {},
}


def upgraded(config: Config, version: int) -> Config:
    """Return a configuration of a record of format `version` as one of format FORMAT."""
    for older in range(version, FORMAT):
        config = {RENAMED[older].get(name, name): value for name, value in config.items()}
    return _from_3(config) if version < 4 else config


def _from_3(config: Config) -> Config:
    """Return a configuration of format 3 as one of format 4: moving averages had no warm-up, the
    noise level of each sample was drawn alone, mu was called shift, and noise on the history had
    one level a sample and a setting of its own."""
    config = config | {"ema_warmup": False}
    if "noise_schedule" not in config:
        return config
    schedule = dict(config["noise_schedule"])
    schedule |= {"mu": schedule.pop("shift", None), "stratified": False}
    history = dict(config.get("history", {}))
    if level := config.pop("history_noise", 0.0):
        history |= {"corrupt": level, "clean": 0.0, "corrupt_mode": "sample"}
    return config | {"noise_schedule": schedule, "history": history}

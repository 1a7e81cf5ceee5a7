"""Cleaning of prompts."""

import html


def clean_prompt(text: str) -> str:
    """Mend wrongly decoded characters, HTML entities and white space, as training captions were.

    Source: `prompt_clean` of diffusers' Wan and Helios pipelines, itself that of the release.
    Without ftfy the token ids of some prompts would be others, so there is no way around it.
    """
    import ftfy  # here, as only bundles with such prompts need it

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())

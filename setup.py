"""Install configs/ as framepack_jax/configs; pyproject.toml has all other settings."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["framepack_jax*"]), "framepack_jax.configs"],
    package_dir={"framepack_jax.configs": "configs"},
)

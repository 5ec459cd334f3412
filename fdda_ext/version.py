"""The version, which the build reads without importing torch."""

__all__ = ["__version__"]

__version__ = "0.2.0"

"""The version, which the build reads without importing torch."""

__all__ = ["__version__"]

__version__ = "0.1.0"

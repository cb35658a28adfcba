"""The one place of the version number; imports nothing, so that building the package needs no torch."""

__version__ = "0.1.0"

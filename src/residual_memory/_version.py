"""The version of the library, kept in one place."""

__version__ = "0.1.0"

"""The version, in a module that imports nothing: the command line and the build read it without torch."""

__version__ = "0.1.0"

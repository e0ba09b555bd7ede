"""excise: remove chosen training data from language models, and show how far that succeeded."""

__version__ = "0.1.0"

"""nanochat: from raw text to a chat model, in one readable package."""

__version__ = "0.1.0"

"""nanochat: from raw text to a chat model, in one readable package."""

"""Server wing: an OpenAI-compatible server and the chat page."""

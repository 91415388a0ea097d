"""An OpenAI-compatible server and the chat page."""

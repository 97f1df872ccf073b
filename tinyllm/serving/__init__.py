"""OpenAI-compatible HTTP and a chat page over the batching engine."""

"""A tiny language model, from raw text to a chatting, INT8-quantised, exported model."""

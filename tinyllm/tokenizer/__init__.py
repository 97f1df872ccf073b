"""Byte-level BPE: a readable one, a fast one, vocabulary pruning and the chat template."""

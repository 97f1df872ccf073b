"""The six tokens that are no text; their ids are the first ones in every vocabulary."""

END_OF_TEXT = "<|endoftext|>"
"""Ends every document."""
SYSTEM = "<|system|>"
"""Opens a system message."""
USER = "<|user|>"
"""Opens a user's message."""
ASSISTANT = "<|assistant|>"
"""Opens an answer."""
END_OF_TURN = "<|end|>"
"""Ends every message of a conversation."""
PAD = "<|pad|>"
"""Fills up a batch; never a target."""

SPECIAL_TOKENS = (END_OF_TEXT, SYSTEM, USER, ASSISTANT, END_OF_TURN, PAD)
"""In the order of their ids, from 0."""

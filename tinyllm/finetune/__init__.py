"""Chat examples with loss masks, and LoRA."""

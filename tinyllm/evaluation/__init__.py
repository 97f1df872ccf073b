"""Bits per byte, agreement between runtimes, and speed."""

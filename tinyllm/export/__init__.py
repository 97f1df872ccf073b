"""A trained model in the formats that other runtimes read."""

"""Token shards in Arrow files and the batches read from them."""

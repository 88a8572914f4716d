"""From folders, tables, shards and generators to batches of images."""

"""Images in tar and parquet shards: their index, and streams of them."""

"""The server: a summation service for the buckets of its shard."""

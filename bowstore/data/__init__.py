"""From files on disk to batches of pixels: sources, shards, index, plan, reader, DALI graphs."""

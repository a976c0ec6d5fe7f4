"""From media and ready-made features to feature shards."""

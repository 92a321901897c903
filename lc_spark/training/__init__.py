"""Training of the locally connected models: torch, fed by shards, launched over Spark executors."""

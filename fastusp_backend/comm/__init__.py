"""Who talks to whom (mesh), how bytes move (exchange) and which tokens a rank holds (shards)."""

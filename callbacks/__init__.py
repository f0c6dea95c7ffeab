"""What a run shows, records or watches for, one callback per file."""

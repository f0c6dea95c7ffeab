"""What a run shows, records or guards, one callback a file."""

"""Other ways to execute the same network."""

"""Looking into a network: its stages, its graph, and what it looks at."""

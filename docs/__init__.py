"""The pages about the networks, what writes them, and the course."""

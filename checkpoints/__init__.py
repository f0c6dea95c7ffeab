"""Checkpoint files: reading them without trusting them, and writing them so that a crash loses nothing."""

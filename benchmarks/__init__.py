"""One command for each claim of speed in the README; see README.md here."""

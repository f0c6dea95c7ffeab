"""The tables and pictures of the READMEs, written from the records."""

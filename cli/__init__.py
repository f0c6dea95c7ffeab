"""The command line, read and checked without importing torch: flags, recipes, messages."""

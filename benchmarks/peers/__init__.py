"""The loops that this project is measured against."""

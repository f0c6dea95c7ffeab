"""The data set's files: finding, fetching and verifying them."""

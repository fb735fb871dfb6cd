"""Pages to look at: the words of a store as images."""

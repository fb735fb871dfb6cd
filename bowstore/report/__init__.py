"""Pages that show the words of a store as images."""

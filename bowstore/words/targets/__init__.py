"""What training reads of the words: bags of an image, from memory, from the device or from a disk."""

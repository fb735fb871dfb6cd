"""From a frozen teacher to a store of visual words, and from the store to targets."""

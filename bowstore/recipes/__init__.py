"""Recipes: named stages (images, shards, train, encode, eval) that take others as inputs; what is done is skipped."""

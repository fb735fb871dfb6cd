"""How words are made: teacher, sample, vocabulary, and one pass over all images, by all ranks of a job."""

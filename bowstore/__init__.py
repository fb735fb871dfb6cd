"""bowstore: learn image representations by predicting bags of visual words, without a teacher in the loop."""

__version__ = "0.1.0"

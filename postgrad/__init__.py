"""Continue a language model's training without it forgetting what it knows, and prove both with numbers."""

__version__ = "0.1.0"

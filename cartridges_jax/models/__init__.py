"""This package holds the language model and what turns a name into one; it knows nothing of training or serving."""

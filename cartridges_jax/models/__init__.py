"""The decoder, and everything that turns a name into one: knows nothing of training or serving."""

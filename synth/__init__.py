"""Self-study: asks inference servers for conversations about a text, and writes them as a dataset. No JAX here."""

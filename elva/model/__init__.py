"""The model: what it reads, how it writes and embeds, and what its embeddings may meet."""

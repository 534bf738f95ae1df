"""Models in Hugging Face's folders: what is wrong with one, reading it, and its weights in another dtype."""

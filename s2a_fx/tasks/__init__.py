"""Task files: what was trained, apart from its base, and how a model is known again."""

"""A look into a corpus: its figures, and a page of random clips."""

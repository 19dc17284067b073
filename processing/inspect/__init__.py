"""Inspect a corpus: compute its statistics, and write a page of random clips."""

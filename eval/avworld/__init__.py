"""Evaluation that only AVWorld supports: claims of the paper, metrics of sources, recordings."""

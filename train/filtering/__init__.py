"""Pre-filter of appendix C: captions and distances of clips, scores on disk, and the report."""

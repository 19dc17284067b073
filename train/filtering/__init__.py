"""The pre-filter of appendix C: captions and distances of clips, their scores on disk, and its report."""

"""From the rows of a corpus to batches: rows, opened clips, augmentation, collators."""

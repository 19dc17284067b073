"""What only AVWorld can measure: claims of the paper, metrics of sources, recordings."""

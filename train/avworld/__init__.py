"""What only AVWorld needs: its captioner and audio tower from scratch, and the captioner's cache."""

"""Stages that only AVWorld needs: its captioner and audio tower from scratch, and the cache of the captioner."""

"""DALI: an image captioner that learns to hear from the audio and images of videos.

The code is in the subpackages `modeling`, `processing`, `train` and `eval`. Importing `dali_llava` imports neither the
subpackages nor torch.
"""

__version__ = "0.1.0"

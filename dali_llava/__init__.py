"""DALI and LAVCap: teach an image captioner to hear, without captions of sounds.

The subpackages `modeling`, `processing`, `train` and `eval` hold the code; importing `dali_llava` itself loads none of
them, nor torch.
"""

__version__ = "0.1.0"

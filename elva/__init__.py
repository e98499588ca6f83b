"""ELVA: grain-aware multimodal retrieval (Liu et al., ELVA, arXiv:2606.20280)."""

__version__ = "0.2.0"

"""ELVA: grain-aware multimodal retrieval (Liu et al., ELVA, arXiv:2606.20280)."""

__version__ = "0.2.0"

CITATION = """
@misc{liu2026elva,
      title={ELVA},
      author={Liu and others},
      year={2026},
      eprint={2606.20280},
      archivePrefix={arXiv},
      url={https://arxiv.org/abs/2606.20280},
}
"""
"""Of the paper, as BibTeX."""

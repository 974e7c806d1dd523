"""A certificate of transfer: does the rate tuned at one size hold at the others, and what does it cost."""

from lightning_mue.analysis.certificate.certificate import Certificate, certify
from lightning_mue.analysis.certificate.measures import Limits

__all__ = ["Certificate", "Limits", "certify"]

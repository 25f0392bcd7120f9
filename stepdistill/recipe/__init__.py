"""What a user writes. A recipe is read, checked as far as that needs no network, and written down again."""
from .schema import Recipe

__all__ = ["Recipe"]

"""The models this project trains: timm's and those that timm lacks, by one factory."""

from .registry import ALIASES, create_model

__all__ = ["ALIASES", "create_model"]

"""The models this project trains: timm's and those that timm lacks, by one factory; their weights in and out."""

from . import convnext_isotropic, cswin, metaformer, pvt  # noqa: F401 (they register their models in timm)
from .heads import freeze_body
from .layer_decay import param_groups
from .mae import create_mae
from .registry import ALIASES, create_model
from .weights import load_weights

__all__ = ["ALIASES", "create_mae", "create_model", "freeze_body", "load_weights", "param_groups"]

"""The families. Importing this package registers them all."""

from dbtrain.models import vit as vit
from dbtrain.models.family import Batch, Draw, Family, TrainableModule, family_of

__all__ = ["Batch", "Draw", "Family", "TrainableModule", "family_of"]

"""The families. Importing this package registers those that are built in."""

from dbtrain.models import causal_lm as causal_lm
from dbtrain.models import dit as dit
from dbtrain.models import masked_lm as masked_lm
from dbtrain.models import recurrent_lm as recurrent_lm
from dbtrain.models import vit as vit
from dbtrain.models.family import Batch, Draw, Family, Piece, Task, TrainableModule, family_of

__all__ = ["Batch", "Draw", "Family", "Piece", "Task", "TrainableModule", "family_of"]

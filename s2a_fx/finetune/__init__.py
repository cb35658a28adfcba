"""Fine-tuning on a data set: `s2a-fx finetune`, and the pieces that it is made of.

result = finetune(FinetuneOptions(model="vit_base_patch16_224", data=Path("flowers"), recipe="s2a", pretrained=True))
print(result.best.accuracy, result.measured_bytes)
"""

from s2a_fx.finetune.checkpoint import Epoch
from s2a_fx.finetune.evaluate import Accuracy, evaluate
from s2a_fx.finetune.interrupts import Stopped
from s2a_fx.finetune.options import FinetuneOptions
from s2a_fx.finetune.run import FinetuneResult, finetune
from s2a_fx.finetune.steps import Precision, training_steps

__all__ = [
    "Accuracy",
    "Epoch",
    "FinetuneOptions",
    "FinetuneResult",
    "Precision",
    "Stopped",
    "evaluate",
    "finetune",
    "training_steps",
]

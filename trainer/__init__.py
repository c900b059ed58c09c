"""A trainer for small language models, whose parts are the systems of the seed notes and whose steps are measured."""

from importlib.util import find_spec

if find_spec("torch") is not None:  # without it, `validate-estimates --published` is what there is
    from trainer.files.checkpoint import load_checkpoint, save_checkpoint
    from trainer.files.data import Dataset, get_batch
    from trainer.model.generate import generate
    from trainer.model.loss import cross_entropy
    from trainer.optim.clip import gradient_clipping
    from trainer.optim.optimizers import SGD, AdamW
    from trainer.optim.schedule import lr_cosine_schedule
    from trainer.referee.measure import Measurement, Step, build_step, measure
    from trainer.referee.recorder.forms import ClosedForms, closed_forms
    from trainer.referee.recorder.recording import Recording, record

__all__ = [
    "SGD",
    "AdamW",
    "ClosedForms",
    "Dataset",
    "Measurement",
    "Recording",
    "Step",
    "build_step",
    "closed_forms",
    "cross_entropy",
    "generate",
    "get_batch",
    "gradient_clipping",
    "load_checkpoint",
    "lr_cosine_schedule",
    "measure",
    "record",
    "save_checkpoint",
]

"""What is said of a complete training: test accuracy of its last model, and of the best one on validation data."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from common.config import Split
from worker.checkpoint import best_checkpoint, checkpoint_name, copy_best, load_checkpoint
from worker.data import Samples
from worker.evaluation import Evaluation, evaluate
from worker.replica import has_average, load_model
from worker.selection import Best, Conclusion, Selection
from worker.workplace import Workplace, model_for


def conclude(workplace: Workplace, round_: int, checkpoints: Path) -> Conclusion:
    """Judges the last model, and the best one, on all test data that this worker has.

    The last model is one more candidate for the best, if this worker has all validation data (`split=shared`): after
    the last round, workers exchange nothing any more.

    Args:
        workplace: with the state after training.
        round_: after how many rounds.
        checkpoints: folder of the best model's checkpoint, and of the last one's.

    Raises:
        CheckpointError: that of the best model is damaged.
        StorageError: the last model is the best, and cannot be kept as such.
    """
    spec, dataset, replica = workplace.spec, workplace.dataset, workplace.replica
    selection, validation = replica.selection, None
    with replica.judged() as model:
        test = _judged(workplace, model, dataset.test)
        if dataset.validation and spec.evaluation.every_epochs and spec.data.split is Split.SHARED:
            validation = _judged(workplace, model, dataset.validation)
            selection = selection.after(round_, validation)
    best = _best(workplace, selection, round_, test, checkpoints)
    return Conclusion(round=round_, test=test, best=best, validation=validation)


def _best(workplace: Workplace, selection: Selection, round_: int, last: Evaluation, checkpoints: Path) -> Best | None:
    if selection.best is None or selection.round is None:
        return None
    test: Evaluation | None = None
    if selection.round == round_:
        test = last
        if (saved := checkpoints / checkpoint_name(round_)).exists():
            copy_best(saved, checkpoints)
    elif path := best_checkpoint(checkpoints, selection.round):
        tensors = load_checkpoint(path).tensors
        model = model_for(workplace.spec, workplace.dataset)
        load_model(model, tensors, averaged=has_average(tensors))
        test = _judged(workplace, model.to(workplace.device), workplace.dataset.test)
    return Best(round=selection.round, validation=selection.best, test=test)


def _judged(workplace: Workplace, model: nn.Module, samples: Samples) -> Evaluation:
    spec = workplace.spec
    return evaluate(
        model,
        samples,
        spec.evaluation_attack,
        batch=spec.evaluation.batch,
        seed=spec.seed,
        device=workplace.device,
    )

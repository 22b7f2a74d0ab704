"""The figures that the paper's tables print, for the side of ours: Zhang et al., UAI 2022, tables 1 to 4.

Accuracies are in per cent as printed, certified accuracies as fractions; times are seconds per epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from common.config import ModelName


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One row; None where the table has no such figure.

    Attributes:
        method: as `deploy.report.collect.method_of` names it.
        setting: what else sets the row apart: bits, batch size, network.
        clean, robust, autoattack: TA, RA and AA, per cent.
        communication_s, epoch_s: C and T.
        sent_mb: data per iteration.
        model: the network, where rows of a method differ in it.
    """

    method: str
    setting: str
    clean: float
    robust: float
    autoattack: float | None = None
    communication_s: float | None = None
    epoch_s: float | None = None
    sent_mb: float | None = None
    model: ModelName | None = None


def _table_1(method: str, setting: str, *figures: float | None) -> PaperRow:
    clean, robust, autoattack, communication_s, epoch_s = figures
    assert clean is not None
    assert robust is not None
    return PaperRow(
        method=method,
        setting=setting,
        clean=clean,
        robust=robust,
        autoattack=autoattack,
        communication_s=communication_s,
        epoch_s=epoch_s,
    )


def _table_3(model: ModelName, method: str, setting: str, *figures: float | None) -> PaperRow:
    return replace(_table_1(method, setting, *figures), model=model)


def _table_4(
    method: str, setting: str, clean: float, robust: float, communication_s: float, sent_mb: float
) -> PaperRow:
    return PaperRow(
        method=method, setting=setting, clean=clean, robust=robust, communication_s=communication_s, sent_mb=sent_mb
    )


TABLE_1 = (
    _table_1("AT", "1 x 512", 62.70, 40.38, 37.46, None, 6022),
    _table_1("DAT-PGD w/o LALR", "6 x 512", 57.09, 34.02, 30.98, 865, 1932),
    _table_1("DAT-PGD", "6 x 512", 63.75, 38.45, 36.04, 898, 1960),
    _table_1("Fast AT", "1 x 512", 58.99, 40.78, 37.18, None, 1544),
    _table_1("DAT-FGSM w/o LALR", "6 x 512", 55.04, 35.03, 32.16, 863, 1080),
    _table_1("DAT-FGSM", "6 x 512", 58.02, 40.27, 36.02, 859, 1109),
)
"""ImageNet, ResNet-50."""

RADII = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
TABLE_2 = {
    (0.12, 2): (0.832, 0.804, 0.762, 0.728, 0.654, 0.545, 0.0),
    (0.12, 20): (0.838, 0.812, 0.784, 0.748, 0.661, 0.550, 0.0),
    (0.25, 2): (0.752, 0.730, 0.708, 0.678, 0.625, 0.562, 0.498),
    (0.25, 20): (0.764, 0.748, 0.716, 0.688, 0.632, 0.566, 0.514),
}
"""CIFAR-10, ResNet-18: certified accuracy at `RADII` by (noise_std, N)."""

_RESNET, _WIDE = ModelName.PREACT_RESNET18, ModelName.WIDE_RESNET28_10
TABLE_3 = (
    _table_3(_RESNET, "Semi-supervised DAT-PGD", "ResNet-18, 12 x 2048", 87.00, 47.34, 45.23, 86, 451),
    _table_3(_RESNET, "Semi-supervised DAT-FGSM", "ResNet-18, 12 x 2048", 88.00, 45.84, 43.19, 86, 124),
    _table_3(_WIDE, "Semi-supervised DAT-PGD", "WRN-28-10, 12 x 128", 89.37, 62.06, 58.35, 302, 1020),
    _table_3(_WIDE, "Semi-supervised DAT-FGSM", "WRN-28-10, 12 x 128", 89.52, 61.24, 57.65, 302, 674),
)
"""CIFAR-10 and 500K unlabeled images."""

TABLE_4 = (
    _table_4("DAT-PGD", "32 bits", 63.75, 38.45, 898, 2924),
    _table_4("DAT-PGD", "16 bits", 61.77, 38.40, 850, 1462),
    _table_4("DAT-PGD", "8 bits", 56.53, 37.90, 592, 731),
    _table_4("DAT-PGD", "8 bits 2-sided", 53.09, 34.59, 1091, 244),
    _table_4("DAT-PGD", "32 bits, HPC", 63.43, 38.55, 15, 1074),
    _table_4("DAT-FGSM", "32 bits", 58.02, 40.27, 859, 2924),
    _table_4("DAT-FGSM", "16 bits", 54.71, 39.29, 849, 1462),
    _table_4("DAT-FGSM", "8 bits", 50.11, 36.38, 594, 731),
    _table_4("DAT-FGSM", "8 bits 2-sided", 48.27, 33.20, 1013, 244),
    _table_4("DAT-FGSM", "32 bits, HPC", 57.60, 41.70, 15, 310),
)
"""ImageNet, ResNet-50, 6 x 512."""

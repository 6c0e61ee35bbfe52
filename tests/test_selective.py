"""extras/selective.py: numbers by hand, and three models whose scores are known: one that is always
sure, one that is always silent, one that knows."""

import numpy as np
import pytest

from extras.selective import (
    aurc,
    bootstrap,
    calibration_error,
    coverage_at,
    false_alarms,
    reliability,
    risk_curve,
    share_answered,
    shown,
    threshold_at,
)

IOU = np.array([0.9, 0.1, 0.6, 0.0, 0.4])  # of five questions, mean 0.4
N = len(IOU)
SURE = np.full(N, 0.9)
SILENT = np.full(N, -1.0)
KNOWS = IOU.copy()


def test_a_risk_curve_by_hand():
    confidence = np.array([0.9, 0.2, 0.8, 0.1, 0.7])
    coverage, risk = risk_curve(confidence, IOU)
    assert coverage == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    # losses from the surest on: 0.1, 0.4, 0.6, 0.9, 1.0
    assert risk == pytest.approx([0.1, 0.25, 1.1 / 3, 0.5, 0.6])
    assert aurc(confidence, IOU) == pytest.approx((0.1 + 0.25 + 1.1 / 3 + 0.5 + 0.6) / 5)


def test_questions_of_a_tie_count_with_their_mean():
    confidence = np.array([0.5, 0.5, 0.1])
    iou = np.array([1.0, 0.0, 1.0])
    _, risk = risk_curve(confidence, iou)
    assert risk == pytest.approx([0.5, 0.5, 1 / 3])
    _, other = risk_curve(confidence, iou[[1, 0, 2]])
    assert other == pytest.approx(risk)  # the order of the data does not matter


def test_a_model_that_is_always_sure_has_the_mean_risk_everywhere():
    assert risk_curve(SURE, IOU)[1] == pytest.approx([0.6] * N)
    assert aurc(SURE, IOU) == pytest.approx(0.6)
    assert coverage_at(SURE, IOU, least=0.5) == 0  # a tie cannot be cut
    assert coverage_at(SURE, IOU, least=0.4) == 1
    assert calibration_error(SURE, IOU >= 0.5) == pytest.approx(0.9 - 2 / 5)


def test_a_model_that_is_always_silent_answers_nothing():
    nothing = np.zeros(N)
    assert aurc(SILENT, nothing) == 1
    assert coverage_at(SILENT, nothing, least=0.0) == 0
    assert np.isnan(calibration_error(SILENT, nothing > 0))
    assert np.isnan(threshold_at(SILENT, 0.5))
    assert share_answered(SILENT, -1.0) == 0


def test_a_model_that_knows_has_the_smallest_area_of_all_orders():
    rng = np.random.default_rng(0)
    best = aurc(KNOWS, IOU)
    assert best == pytest.approx((0.1 + 0.5 / 2 + 1.1 / 3 + 2.0 / 4 + 3.0 / 5) / 5)
    for _ in range(50):
        assert best <= aurc(rng.permutation(IOU), IOU) + 1e-12
    assert aurc(-KNOWS, IOU) > aurc(SURE, IOU) > best


def test_coverage_goes_as_far_as_the_mean_iou_allows():
    # means from the surest on: 0.9, 0.75, 0.6333, 0.5, 0.4
    assert coverage_at(KNOWS, IOU, least=0.5) == pytest.approx(0.8)
    assert coverage_at(KNOWS, IOU, least=0.7) == pytest.approx(0.4)
    assert coverage_at(KNOWS, IOU, least=0.95) == 0


def test_the_calibration_error_by_hand():
    probability = np.array([0.15, 0.15, 0.95, 0.95, 1.0])
    hit = np.array([False, True, True, True, False])
    assert reliability(probability, hit) == [
        (pytest.approx(0.15), 0.5, 2),
        (pytest.approx(2.9 / 3), pytest.approx(2 / 3), 3),
    ]
    assert calibration_error(probability, hit) == pytest.approx((2 * 0.35 + 3 * 0.3) / 5)
    assert calibration_error(hit.astype(float), hit) == 0


def test_a_threshold_answers_the_share_that_was_asked_for():
    confidence = np.array([0.1, 0.4, 0.3, 0.2])
    assert threshold_at(confidence, 0.5) == 0.3
    assert threshold_at(confidence, 1.0) == 0.1
    assert share_answered(confidence, 0.3) == 0.5
    assert np.isnan(share_answered(confidence[:0], 0.3))
    with_a_silent_one = np.append(confidence[:3], -1.0)
    assert threshold_at(with_a_silent_one, 0.75) == 0.1
    assert np.isnan(threshold_at(with_a_silent_one, 1.0))


def test_false_alarms_at_equal_coverage():
    absent = np.array([False] * 4 + [True] * 4)
    sure = np.full(8, 0.9)
    silent = np.full(8, -1.0)
    knows = np.array([0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.65, 0.05])
    assert false_alarms(sure, absent, 0.5) == 1
    assert np.isnan(false_alarms(silent, absent, 0.5))
    assert false_alarms(knows, absent, 0.5) == 0
    assert false_alarms(knows, absent, 1.0) == 0.25  # 0.65 is above 0.6
    taught = knows.copy()
    taught[4:] = -1.0  # silent on its own where nothing is
    assert false_alarms(taught, absent, 1.0) == 0


def test_an_interval_is_over_images_and_says_nothing_of_few():
    iou = np.linspace(0, 1, 40)
    whole = bootstrap(aurc, (iou, iou), list(range(40)))
    assert whole.mean == pytest.approx(aurc(iou, iou))
    assert whole.low < whole.mean < whole.high
    assert (whole.n, whole.images) == (40, 40)
    of_few_images = bootstrap(aurc, (iou, iou), [i // 10 for i in range(40)])
    assert of_few_images.high - of_few_images.low > whole.high - whole.low
    assert shown(of_few_images) == f"{whole.mean:.3f} [–]"
    assert shown(whole) == f"{whole.mean:.3f} [{whole.low:.3f}, {whole.high:.3f}]"
    assert 0 <= of_few_images.low <= of_few_images.high <= 1


def test_a_statistic_that_is_not_defined_has_no_interval():
    assert bootstrap(calibration_error, (SILENT, IOU > 0.5), range(N)) is None
    assert shown(None) == "–"

"""The curves that train.py --tensorboard writes, read with TensorBoard's own reader."""

import pytest

from metrics import parse_log

pytest.importorskip("tensorboard", reason="make test-export")


def test_the_curves_are_those_of_the_log(workspace):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = workspace.path / "curves"
    result = workspace.train("--tensorboard", folder)
    steps, validations = parse_log(workspace.path / result["log"])
    curves = EventAccumulator(str(folder)).Reload()
    for name, key, lines in (("loss", "loss", steps), ("learning_rate", "lr", steps),
                             ("gradient_norm", "norm", steps), ("tokens_per_second", "tokens/s", steps),
                             ("validation_loss", "val_loss", validations)):
        points = curves.Scalars(name)
        assert [point.step for point in points] == [line["step"] for line in lines]
        assert [point.value for point in points] == pytest.approx([line[key] for line in lines], rel=0.01)

"""Lines of a model's code, told apart from torch's by whole folders."""

import sys
from pathlib import Path

import torch
import torchvision

from s2a_fx.graph import model_code


def test_files_beside_torch_are_not_torch_s():
    assert model_code.is_torch_file(torch.nn.functional.__file__)
    assert not model_code.is_torch_file(torchvision.__file__)
    assert not model_code.is_torch_file(str(Path(torch.__file__).parents[1] / "torchmetrics" / "metric.py"))


def test_the_line_outside_of_torch_and_other_packages_is_found():
    frame = sys._getframe()
    assert model_code.line_of_frame(frame) == f"line {frame.f_lineno} of {__file__}"
    assert model_code.line_of_frame(frame, __name__.partition(".")[0]) != f"line {frame.f_lineno} of {__file__}"

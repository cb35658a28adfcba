"""README's example of fine-tuning runs as it stands there: from the command line to a prediction."""

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from colours import COLOURS, write_colours
from PIL import Image
from safetensors.torch import save_file

from s2a_fx.cli import main

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.slow
def test_readme_goes_from_images_to_a_prediction(tmp_path, monkeypatch, capsys):
    command = re.search(r"^s2a-fx (finetune .*)$", README, re.MULTILINE)
    prediction = re.search(r"```python\n([^`]*read_adapter[^`]*finalize[^`]*)```", README[command.end() :])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    write_colours(Path("digits"))
    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), "digits/lite0.safetensors")
    shown = re.search(r'Image\.open\("(.*?)"\)', prediction[1])
    assert main([*shlex.split(command[1]), "--device", "cpu", "--workers", "0"]) == 0
    capsys.readouterr()
    Path(shown[1]).parent.mkdir(parents=True)
    Image.new("RGB", (40, 40), COLOURS["red"]).save(shown[1])
    exec(prediction[1], {})
    assert capsys.readouterr().out.strip() in COLOURS

"""What a newcomer types, and what a typing mistake gets."""

import json

import pytest

from s2a_fx.cli import main

MODEL = ["vit_tiny_patch16_224", "--batch-size", "2"]


def test_report_prints_both_recipes_and_writes_json(capsys, tmp_path):
    file = tmp_path / "report.json"
    assert main(["report", *MODEL, "--recipe", "s2a-paper", "--num-classes", "100", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "vit_tiny_patch16_224: batch 2, 224 x 224 px, float32, adamw, cpu" in out
    assert "x12  blocks.*.mlp.act" in out
    data = json.loads(file.read_text())
    assert data["image_size"] == [224, 224]
    assert set(data["recipes"]) == {"full", "s2a-paper"}
    figures = data["recipes"]["s2a-paper"]
    assert figures["saved_bytes"] == sum(row["bytes"] for row in figures["nodes"])
    assert {"node", "op", "module", "operand", "shape", "dtype", "bytes", "holders"} <= set(figures["nodes"][0])
    assert figures["peak_bytes"] > figures["saved_bytes"] + figures["weight_bytes"]


def test_unfolded_report_names_every_layer(capsys):
    assert main(["report", *MODEL, "--recipe", "bias", "--unfold"]) == 0
    assert "blocks.11.mlp.act" in capsys.readouterr().out


def test_compare_prints_a_row_a_recipe(capsys):
    assert main(["compare", *MODEL, "--recipes", "full,linear,bias"]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert rows[-3:] == ["full", "linear", "bias"]


def test_passes_lists_options(capsys):
    assert main(["passes"]) == 0
    out = capsys.readouterr().out
    assert "InsertLowRankPrompt" in out and "rank=30" in out and "s2a-paper" in out


def test_html_page_shows_the_timeline(tmp_path):
    file = tmp_path / "report.html"
    assert main(["report", *MODEL, "--recipe", "bias", "--html", str(file)]) == 0
    assert "<svg" in file.read_text()


def test_fit_finds_a_batch_that_fits_and_whose_successor_does_not(capsys):
    import s2a_fx
    from s2a_fx.zoo import timm_model

    assert main(["report", *MODEL, "--recipe", "bias", "--fit", "300MB"]) == 0
    batch = int(capsys.readouterr().out.splitlines()[-1].split(": ")[1])
    for images, fits in ((batch, True), (batch + 1, False)):
        model, x = timm_model(MODEL[0], batch_size=images)
        peak = s2a_fx.compare(model, x, ["bias"]).reports[0].peak_bytes
        assert (peak <= 300 * 10**6) is fits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "vit_base_patch61_224"], "did you mean vit_base_patch16_224"),
        (["report", *MODEL, "--recipe", "s2b"], "unknown recipe 's2b'"),
        (["report", *MODEL, "--device", "tpu"], "wanted one of cpu, cuda"),
        (["report", *MODEL, "--optimizer", "lion"], "wanted one of adamw"),
        (["report", *MODEL, "--image-size", "8"], "8 x 8"),
        (["compare", *MODEL, "--recipes", ","], "wanted at least one"),
        (["report", *MODEL, "--num-classes", "0"], "no classification head"),
        (["report", *MODEL, "--json", "/no/such/folder/f.json"], "there is no folder"),
    ],
)
def test_mistakes_get_one_line_and_status_2(capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_batch_sizes_that_are_no_positive_integers_are_refused(capsys, value):
    with pytest.raises(SystemExit) as stop:
        main(["report", "vit_tiny_patch16_224", "--batch-size", value])
    assert stop.value.code == 2

"""What a newcomer types, and what a typing mistake gets."""

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import s2a_fx.cli
from s2a_fx.cli import main

MODEL = ["test_vit", "--batch-size", "2"]


def test_report_prints_both_recipes_and_writes_json(capsys, tmp_path):
    file = tmp_path / "report.json"
    arguments = ["vit_tiny_patch16_224", "--batch-size", "2", "--num-classes", "100", "--json", str(file)]
    assert main(["report", *arguments, "--recipe", "s2a-paper"]) == 0
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
    assert "blocks.5.mlp.act" in capsys.readouterr().out


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


@pytest.mark.slow
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
        (["report", "vit_tiny_patch16_224", "--image-size", "8"], "8 x 8"),
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


@pytest.fixture
def no_work(monkeypatch):
    """Fail if a command begins to simulate."""

    def work(*arguments, **settings):
        raise AssertionError("work was begun")

    for name in ("compare", "method_cells", "paper_cells", "timm_model"):
        monkeypatch.setattr(s2a_fx.cli, name, work)


@pytest.mark.parametrize(
    "command",
    [["report", *MODEL, "--json"], ["report", *MODEL, "--html"], ["compare", *MODEL, "--json"], ["table1", "--json"]],
    ids=" ".join,
)
@pytest.mark.parametrize(
    ("name", "message"), [("folder", "it is a folder"), ("loop", "symbolic links"), ("none/f", "there is no folder")]
)
def test_files_that_cannot_be_written_are_refused_before_any_work(command, name, message, no_work, capsys, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    assert main([*command, str(tmp_path / name)]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / name}: cannot be written: " in told and message in told


@pytest.mark.parametrize("command", ["report", "compare"])
@pytest.mark.parametrize("other", ["out", "folder/../out", "link", "hard"])
def test_one_file_for_json_and_html_is_refused_before_any_work(command, other, no_work, capsys, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("out")
    if other == "hard":
        (tmp_path / "out").touch()
        (tmp_path / "hard").hardlink_to(tmp_path / "out")
    assert main([command, *MODEL, "--json", str(tmp_path / "out"), "--html", str(tmp_path / other)]) == 2
    assert "name the same file; give each a file of its own" in capsys.readouterr().err


def test_a_report_goes_into_a_pipe_and_through_a_link(capsys, tmp_path):
    pipe, page, link = (tmp_path / name for name in ("pipe", "page", "link"))
    os.mkfifo(pipe)
    link.symlink_to(page)
    found = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()), daemon=True)
    reader.start()
    assert main(["report", *MODEL, "--recipe", "bias", "--json", str(pipe), "--html", str(link)]) == 0
    assert pipe.is_fifo() and link.is_symlink() and "<svg" in page.read_text()
    reader.join(10)
    assert set(json.loads(found[0])["recipes"]) == {"full", "bias"}


def test_a_report_goes_into_a_device(capsys, tmp_path):
    device = tmp_path / "null"  # a node of the test's own
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.close(os.open(device, os.O_WRONLY))
    except OSError as error:
        pytest.skip(f"device nodes cannot be made here: {error}")
    assert main(["report", *MODEL, "--recipe", "bias", "--json", str(device), "--html", str(device)]) == 0
    assert device.is_char_device()


@pytest.mark.slow
def test_figures_on_the_standard_output_stand_beside_the_text(tmp_path):
    """Redirected to a file, which a new one in its place would cut off from the text."""
    link = tmp_path / "stdout"  # and not /dev/stdout, which a fault would replace
    link.symlink_to("/proc/self/fd/1")
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("there is no /proc/self/fd here")
    command = [sys.executable, "-m", "s2a_fx.cli", "report", *MODEL, "--recipe", "bias", "--json", str(link)]
    with (tmp_path / "out").open("w") as out:
        subprocess.run(command, stdout=out, check=True)
    figures, end = json.JSONDecoder().raw_decode((tmp_path / "out").read_text())
    assert set(figures["recipes"]) == {"full", "bias"}
    assert (tmp_path / "out").read_text()[end:].startswith("test_vit: batch 2")


@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_batch_sizes_that_are_no_positive_integers_are_refused(capsys, value):
    with pytest.raises(SystemExit) as stop:
        main(["report", "vit_tiny_patch16_224", "--batch-size", value])
    assert stop.value.code == 2

"""What stands at a path stays what it is: a device, a pipe, a link; a plain file is replaced whole."""

import os
import socket
import stat
import threading

import pytest

from s2a_fx.cli import main
from s2a_fx.whole_file import write_file

REPORT = ["report", "vit_tiny_patch16_224", "--image-size", "32", "--batch-size", "2", "--recipe", "bias"]


def test_a_plain_file_is_replaced_whole_and_keeps_its_mode(tmp_path):
    file = tmp_path / "file"
    file.write_text("old and longer")
    file.chmod(0o600)
    write_file(file, b"new")
    assert file.read_bytes() == b"new" and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("target", ["there", "new"])
def test_a_link_is_followed_and_stays(target, tmp_path):
    (tmp_path / "there").write_text("old")
    link = tmp_path / "link"
    link.symlink_to(target)
    write_file(link, b"new")
    assert link.is_symlink() and (tmp_path / target).read_bytes() == b"new"


def test_a_pipe_is_written_to(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_file(pipe, b"new")
    reader.join()
    assert got == [b"new"] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_device_stays_a_device(tmp_path):
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        device.write_bytes(b"")
    except PermissionError:
        pytest.skip("needs the right to make a device")
    assert main([*REPORT, "--json", str(device)]) == 0
    assert stat.S_ISCHR(device.stat().st_mode)


@pytest.mark.parametrize("kind", ["folder", "socket", "circle"])
def test_what_cannot_be_written_is_told_before_the_work_begins(kind, tmp_path, capsys):
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif kind == "socket":
        bound = socket.socket(socket.AF_UNIX)
        bound.bind(str(path))
    else:
        path.symlink_to(path)
    assert main([*REPORT, "--json", str(path)]) != 0
    out = capsys.readouterr()
    assert not out.out and str(path) in out.err


def test_two_outputs_of_one_file_are_refused(tmp_path, capsys):
    file, link, twin = tmp_path / "file", tmp_path / "link", tmp_path / "twin"
    file.write_text("old")
    link.symlink_to(file)
    os.link(file, twin)
    for other in (file, link, twin, tmp_path / "." / "file"):
        assert main([*REPORT, "--json", str(file), "--html", str(other)]) != 0
        assert "name two files" in capsys.readouterr().err
    assert file.read_text() == "old"

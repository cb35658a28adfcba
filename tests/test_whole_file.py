"""Plain files are written whole; links are followed; pipes and devices are written into and stay what they are."""

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from s2a_fx.whole_file import destination, written_whole


def _write(path, data=b"new"):
    with written_whole(path) as file:
        file.write(data)


def _names(folder):
    return sorted(p.name for p in folder.iterdir())


def _device(path, minor):
    """A device node of the test's own: 3 is that of /dev/null, 7 that of /dev/full."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, minor))
        os.close(os.open(path, os.O_WRONLY))
    except OSError as error:
        pytest.skip(f"device nodes cannot be made here: {error}")
    return path


def _reader(pipe):
    """Read all that is written into the pipe."""
    found = []
    thread = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    thread.start()
    return found, thread


def test_a_plain_file_is_replaced_whole_and_keeps_its_mode(tmp_path):
    file = tmp_path / "file"
    _write(file, b"old")
    file.chmod(0o600)
    with file.open("rb") as before:
        _write(file)
        assert (before.read(), file.read_bytes()) == (b"old", b"new")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_after_an_error_the_older_file_stays_and_no_part(tmp_path):
    file = tmp_path / "file"
    _write(file, b"old")
    with pytest.raises(ZeroDivisionError), written_whole(file) as part:
        part.write(b"new")
        raise ZeroDivisionError
    assert file.read_bytes() == b"old" and _names(tmp_path) == ["file"]


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "there").mkdir()
    target, second, first = tmp_path / "there" / "file", tmp_path / "second", tmp_path / "first"
    second.symlink_to("there/file")
    first.symlink_to(second)
    for content in (b"made", b"replaced"):  # a link to nothing makes its file
        _write(first, content)
        assert first.is_symlink() and second.is_symlink() and target.read_bytes() == content
    assert _names(tmp_path / "there") == ["file"]


def test_a_part_of_a_killed_run_is_not_written_through(tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    (tmp_path / "part").symlink_to(precious)
    with written_whole(tmp_path / "file", lambda target: target.with_name("part")) as file:
        file.write(b"new")
    assert precious.read_bytes() == b"precious" and (tmp_path / "file").read_bytes() == b"new"
    assert _names(tmp_path) == ["file", "precious"]


@pytest.mark.parametrize("linked", [False, True])
def test_a_device_is_written_to(linked, tmp_path):
    device = _device(tmp_path / "null", 3)
    if linked:
        (tmp_path / "link").symlink_to(device)
    _write(tmp_path / ("link" if linked else "null"))
    assert device.is_char_device() and _names(tmp_path) == (["link", "null"] if linked else ["null"])


def test_a_full_device_is_an_error_and_stays(tmp_path):
    device = _device(tmp_path / "full", 7)
    with pytest.raises(OSError, match="No space left"):
        _write(device)
    assert device.is_char_device() and _names(tmp_path) == ["full"]


@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_is_written_to(linked, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    found, thread = _reader(pipe)
    _write(tmp_path / "link" if linked else pipe)
    thread.join(10)
    assert found == [b"new"] and pipe.is_fifo() and _names(tmp_path) == ["link", "pipe"]


@pytest.mark.parametrize("folder", ["/dev/fd", "/proc/self/fd"])
@pytest.mark.parametrize("linked", [False, True])
def test_an_open_file_of_this_process_is_written_to(folder, linked, tmp_path):
    if not Path(folder).is_dir():
        pytest.skip(f"there is no {folder} here")
    with (tmp_path / "out").open("wb", buffering=0) as out:
        path = tmp_path / "link"
        path.symlink_to(f"{folder}/{out.fileno()}")
        out.write(b"before ")
        _write(path if linked else path.readlink())
        out.write(b" after")
    assert (tmp_path / "out").read_bytes() == b"before new after"
    assert _names(tmp_path) == ["link", "out"]


def test_an_open_socket_is_written_to_and_a_socket_s_name_refused(tmp_path, monkeypatch):
    one, other = socket.socketpair()
    with one, other:
        _write(Path(f"/dev/fd/{one.fileno()}"))
        assert other.recv(10) == b"new"
    monkeypatch.chdir(tmp_path)  # a socket's name has a hundred letters at most
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        with pytest.raises(OSError, match="it is a socket"):
            _write(tmp_path / "socket")
    assert (tmp_path / "socket").is_socket()


def test_what_cannot_be_written_is_refused_with_the_reason(tmp_path):
    (tmp_path / "loop").symlink_to("pool")
    (tmp_path / "pool").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("no/folder/file")
    (tmp_path / "in").touch()
    before = _names(tmp_path)
    with (tmp_path / "in").open("rb") as reading:
        for path, reason in (
            (tmp_path, "it is a folder"),
            (tmp_path / "loop", "symbolic links"),
            (tmp_path / "nowhere", "there is no folder .*/no/folder"),
            (tmp_path / "in" / "file", "Not a directory"),
            (Path(f"/dev/fd/{reading.fileno()}"), "open for reading only"),
            (Path("/dev/fd/999"), "Bad file descriptor"),
        ):
            for function in (destination, _write):
                with pytest.raises(OSError, match=reason):
                    function(path)
    assert _names(tmp_path) == before


def test_two_paths_to_one_file_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, pipe, null = tmp_path / "file", tmp_path / "pipe", tmp_path / "null"
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(pipe)

    def is_same(one, other):
        return destination(tmp_path / one).is_same_file(destination(other))

    for _ in ("missing", "there"):
        for other in (file, file.relative_to(tmp_path), tmp_path / "folder" / ".." / "file", tmp_path / "link"):
            assert is_same("file", other)
        assert not is_same("file", tmp_path / "other")
        file.touch()
    (tmp_path / "hard").hardlink_to(file)
    assert is_same("file", tmp_path / "hard")
    assert is_same("pipe", pipe)
    _device(null, 3)
    assert not is_same("null", null)

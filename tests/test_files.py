"""Files that are replaced together: all of them, or none."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from longctx_layers.files import NotRestoredError, replace_all, write_all, write_folder
from longctx_layers.testing import small_model

NAMES = ("a", "b", "c")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def through_replace_all(folder: Path) -> None:
    moves = {folder.parent / f"new-{name}": folder / name for name in NAMES}
    for path in moves:
        path.write_text("new")
    replace_all(moves)


def through_write_folder(folder: Path) -> None:
    with write_folder(folder) as partial:
        for name in NAMES:
            (partial / name).write_text("new")


def through_write_all(folder: Path) -> None:
    write_all(folder, dict.fromkeys(NAMES, "new"))


WRITERS = [through_replace_all, through_write_folder, through_write_all]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "other").write_text("untouched")
    for name in NAMES[:2]:  # the third is new
        (folder / name).write_text("old")
    return folder


def fail_move(at: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this one fails; the moves that put files back do not."""
    real, calls = os.replace, 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(os, "replace", call)


def refuse_links(*_: Any, **__: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("write", WRITERS)
def test_all_are_replaced(write: Any, linked: bool, folder: Path, monkeypatch: Any) -> None:
    if not linked:
        monkeypatch.setattr(os, "link", refuse_links)
    write(folder)
    assert contents(folder) == {"other": "untouched", "a": "new", "b": "new", "c": "new"}


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("error", [OSError(errno.EROFS, "Read-only"), KeyboardInterrupt()])
@pytest.mark.parametrize("write", WRITERS)
def test_a_move_that_fails_changes_nothing(
    write: Any, error: BaseException, at: int, linked: bool, folder: Path, monkeypatch: Any
) -> None:
    before = contents(folder)
    if not linked:
        monkeypatch.setattr(os, "link", refuse_links)
    fail_move(at, error, monkeypatch)
    with pytest.raises(type(error)):
        write(folder)
    assert contents(folder) == before


def through_write_folder_with_folders(folder: Path) -> None:
    with write_folder(folder) as partial:
        for name in ("there", "new/deep"):
            (partial / name).mkdir(parents=True)
            (partial / name / "a").write_text("new")
        (partial / "c").write_text("new")


@pytest.mark.parametrize("at", [None, 2, 3])
def test_files_in_folders_are_moved_with_the_others(
    at: int | None, folder: Path, monkeypatch: Any
) -> None:
    (folder / "there").mkdir()
    (folder / "there/a").write_text("old")

    def everything() -> dict[str, str]:
        paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
        return {name: "" if path.is_dir() else path.read_text() for name, path in paths.items()}

    expected = everything()
    if at is not None:
        fail_move(at, OSError(errno.EIO, "Input/output error"), monkeypatch)
        with pytest.raises(OSError, match="as it was before"):
            through_write_folder_with_folders(folder)
    else:
        through_write_folder_with_folders(folder)
        expected |= {"c": "new", "there/a": "new", "new": "", "new/deep": "", "new/deep/a": "new"}
    assert everything() == expected


def test_a_saved_model_is_whole_after_a_move_that_fails(tmp_path: Path, monkeypatch: Any) -> None:
    small_model("window").save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fail_move(2, OSError(errno.EIO, "Input/output error"), monkeypatch)
    with pytest.raises(OSError, match="Input/output"):
        small_model("dpassm").save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_links_stay_links(folder: Path, monkeypatch: Any) -> None:
    (folder / "a").unlink()
    (folder / "a").symlink_to("other")
    fail_move(3, OSError(errno.EIO, "Input/output error"), monkeypatch)
    with pytest.raises(OSError, match="as it was before"):
        through_write_folder(folder)
    assert (folder / "a").is_symlink()
    assert contents(folder) == {"other": "untouched", "a": "untouched", "b": "old"}


def test_what_cannot_be_put_back_is_kept(folder: Path, monkeypatch: Any) -> None:
    real = os.replace

    def broken(source: Any, target: Any) -> None:
        if Path(target).name == "b" or str(source).endswith(".old"):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(NotRestoredError, match=r"folder/a \(kept as .*\.old\)") as caught:
        through_replace_all(folder)
    copy = Path(str(caught.value).split("kept as ")[1].rstrip(")"))
    assert copy.read_text() == "old"


def test_a_new_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("flush"), fsync(descriptor)))
    monkeypatch.setattr(os, "rename", lambda *paths: (events.append("rename"), rename(*paths)))
    with write_folder(tmp_path / "new") as partial:
        (partial / "a").write_text("a")
        (partial / "b").write_text("b")
    assert events == ["flush", "flush", "flush", "rename"]  # two files and the folder

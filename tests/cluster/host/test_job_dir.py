"""This user's folder for caches, which outlives jobs and is used only where nobody else can write to it."""

import tempfile
from pathlib import Path

import pytest

from cluster.host import job_dir
from train.errors import UserError


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A temporary directory of the test's own in place of the host's."""
    monkeypatch.setattr(job_dir, "temp_root", lambda: tmp_path)
    return tmp_path


def test_cache_folder_is_private_and_outlives_jobs(root):
    folder = job_dir.cache_folder()
    assert folder is not None
    assert [path.stat().st_mode & 0o777 for path in root.iterdir()] == [0o700]
    job_dir.remove_unused_folders()
    assert job_dir.cache_folder() == folder == str(next(root.iterdir()))


def test_cache_folder_that_others_may_write_to_is_not_used(root):
    folder = job_dir.cache_folder()
    assert folder is not None
    (root / folder).chmod(0o777)
    assert job_dir.cache_folder() is None


def test_link_in_place_of_the_cache_folder_is_not_followed(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    elsewhere.chmod(0o700)
    name = job_dir.cache_folder()
    assert name is not None
    (root / name).rmdir()
    (root / name).symlink_to(elsewhere)
    assert job_dir.cache_folder() is None


@pytest.mark.parametrize(
    "name",
    ["темп", "a'b", "a$b", "a b", "longer-than-a-socket-allows", "missing"],
)
def test_temporary_directory_that_ray_cannot_use_is_replaced(name, monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as parent:
        folder = Path(parent) / name
        if name != "missing":
            folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setenv("TMPDIR", str(folder))
        assert job_dir.temp_root.__wrapped__() == Path("/tmp")


def test_short_temporary_directory_with_room_is_used(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        assert job_dir.temp_root.__wrapped__() == Path(folder)


def test_host_without_room_for_temporary_files_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(job_dir, "LEAST_FREE", 1 << 60)
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    with pytest.raises(UserError, match=r"none of /tmp, /var/tmp can be written and has .* MiB free.*set TMPDIR"):
        job_dir.temp_root.__wrapped__()

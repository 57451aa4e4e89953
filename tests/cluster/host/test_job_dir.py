"""This user's folder for caches, which outlives jobs and is used only where nobody else can write to it."""

import pytest

from cluster.host import job_dir


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

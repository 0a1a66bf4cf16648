"""One file of the models directory at a time: what the gate of opening and reading it does at its edges."""

import os
import stat
import sys
from pathlib import Path

import pytest

from app.ai.artifact_files import open_model_dir, read_manifest_file, read_model_dir
from app.errors import ArtifactError
from tests.model_files import V1, V2, publish


def reason_for(directory, name):
    with open_model_dir(directory) as descriptor, pytest.raises(ArtifactError) as caught:
        read_manifest_file(descriptor, name)
    return caught.value.reason


@pytest.mark.parametrize("name", ["../manifest", "/etc/passwd", "folder/manifest", "", ".", ".."])
def test_a_name_that_leads_anywhere_else_is_not_opened(tmp_path, name):
    assert reason_for(tmp_path, name) == "unsafe_name"


def test_what_cannot_be_opened_or_read_is_said_to_be_so(tmp_path):
    os.mknod(tmp_path / "socket", stat.S_IFSOCK | 0o644)
    assert reason_for(tmp_path, "socket") == "not_readable"
    # A regular file, and of this user, whose first byte cannot be read.
    assert reason_for(Path("/proc/self"), "mem") == "not_readable"


def test_a_file_that_goes_while_the_directory_is_read_is_left_out(tmp_path):
    artifact = publish(tmp_path, V1)
    publish(tmp_path, V2)

    def remove(frame, event, called):
        if event == "c_call" and called is os.stat and frame.f_code is read_model_dir.__code__:
            artifact.unlink(missing_ok=True)

    with open_model_dir(tmp_path) as descriptor:
        sys.setprofile(remove)
        try:
            found = read_model_dir(descriptor, "*")
        finally:
            sys.setprofile(None)
    told = {(model.version, model.artifact_name is None) for model in found}
    assert (V2, False) in told
    assert told <= {(V1, True), (V2, False)}
    assert not artifact.exists()

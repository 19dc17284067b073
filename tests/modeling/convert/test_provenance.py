"""The name and the licence of a source, and where the licence was read."""

import pytest

from dali_llava.modeling.convert.provenance import UNKNOWN, describe_source


KNOWN = "known for llava; not stated beside the weights"


@pytest.mark.parametrize(
    ("files", "license", "where"),
    [
        ({"README.md": "---\nlicense: llama2\n---\ntext"}, "llama2", "README.md"),
        ({"README.md": "---\nlicense: other\nlicense_name: research\n---\n"}, "research", "README.md"),
        ({"README.md": "# no metadata", "LICENSE": "MIT License\n"}, "mit", "LICENSE"),
        ({"README.md": "---\n[: broken\n---\n"}, "usual", KNOWN),
        ({"LICENSE.txt": "  Apache License\n  Version 2.0\n"}, "apache-2.0", "LICENSE.txt"),
        ({"LICENSE": "LLAMA 2 COMMUNITY LICENSE AGREEMENT\n"}, "llama2", "LICENSE"),
        ({"LICENSE": "all rights reserved"}, "usual", KNOWN),
        ({}, "usual", KNOWN),
    ],
)
def test_the_licence(files, license, where, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert describe_source(tmp_path, "llava", "usual") == {
        "kind": "llava",
        "name": tmp_path.name,
        "license": license,
        "license_from": where,
    }


def test_a_snapshot_of_the_hub_has_its_id_and_revision(tmp_path):
    folder = tmp_path / "models--llava-hf--llava-1.5-7b-hf" / "snapshots" / "abc123"
    folder.mkdir(parents=True)
    (folder / "weights.pth").touch()
    for path in (folder, folder / "weights.pth"):
        source = describe_source(path, "llava", "llama2")
        assert (source["name"], source["revision"]) == ("llava-hf/llava-1.5-7b-hf", "abc123")


def test_a_file_has_its_own_name_only(tmp_path):
    (tmp_path / "LICENSE").write_text("MIT License")  # of whatever lies beside it
    (tmp_path / "tower.pth").touch()
    source = describe_source(tmp_path / "tower.pth", "cav-mae", "bsd-2-clause")
    assert (source["name"], source["license"]) == ("tower.pth", "bsd-2-clause")
    assert source["license_from"] == "known for cav-mae; not stated beside the weights"


def test_an_unknown_licence_is_not_known_for_the_kind(tmp_path):
    source = describe_source(tmp_path, "dali", UNKNOWN)
    assert (source["license"], source["license_from"]) == ("unknown", "not stated beside the weights")

"""Folders by hub id: what is asked of the hub's client, and one line where there is no hub."""

from pathlib import Path

import huggingface_hub
import pytest

from moe_peft.interop.hub import check_repo_id, local_folder, push


class Hub:
    """A hub in memory, in place of the client's calls."""

    def __init__(self, monkeypatch, error=None):
        self.calls, self.error = [], error
        hub = self

        class Api:
            def create_repo(self, repo_id, *, private, exist_ok):
                hub.calls.append(("create", repo_id, private, exist_ok))
                if hub.error is not None:
                    raise hub.error
                return huggingface_hub.RepoUrl(
                    f"https://hub.example/me/{repo_id.split('/')[-1]}", endpoint="https://hub.example"
                )

            def upload_folder(self, *, repo_id, folder_path, commit_message):
                hub.calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)


def test_a_folder_is_itself_also_where_it_looks_like_an_id(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_folder("owner/name") == Path("owner/name")
    assert local_folder("~/owner") == tmp_path / "owner"


@pytest.mark.parametrize(("name", "revision"), [("owner/name", None), ("owner/na.me@refs/pr/1", "refs/pr/1")])
def test_an_id_is_downloaded_without_anything_pickled(tmp_path, monkeypatch, name, revision):
    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_folder(name) == tmp_path
    patterns = {"allow_patterns": ["*.json", "*.safetensors"]}
    assert asked == {"repo_id": name.split("@")[0], "revision": revision, **patterns}


def test_without_a_hub_there_is_one_line():
    with pytest.raises(
        ValueError, match=r"^'owner/name' is no folder here, and no hub gave it \(.+\); name a folder"
    ) as found:
        local_folder("owner/name")  # the tests run with HF_HUB_OFFLINE
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["gone", "/gone/with", "a/b/c", "a b/c", ""])
def test_what_can_be_no_id_is_not_asked_for(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    if name:
        with pytest.raises(ValueError, match=f"^'{name}' is no folder; name one that tools/export.py or PEFT wrote"):
            local_folder(name)


def test_a_file_is_no_folder(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^'a/b' is no folder; "):
        local_folder("a/b")


@pytest.mark.parametrize("public", [False, True])
def test_a_push_makes_a_private_repository_unless_told_otherwise(tmp_path, monkeypatch, public):
    (tmp_path / "README.md").write_text("x")
    hub = Hub(monkeypatch)
    assert push(tmp_path, "name", public) == "https://hub.example/me/name"
    assert hub.calls == [("create", "name", not public, True), ("upload", "me/name", ["README.md"])]


def test_a_failed_push_says_how_to_go_on(tmp_path, monkeypatch):
    hub = Hub(monkeypatch, ConnectionError("Cannot reach it: offline mode.\nTo disable, unset it."))
    with pytest.raises(ValueError, match=r"could not be uploaded \(Cannot reach it: offline mode\); log in") as found:
        push(tmp_path, "me/name")
    assert str(found.value).endswith(f"go on with `hf upload me/name {tmp_path}`") and len(hub.calls) == 1


@pytest.mark.parametrize("repo_id", ["a/b/c", "a--b", "a b", "-a", "x" * 200])
def test_what_no_hub_would_take_is_refused(repo_id):
    with pytest.raises(ValueError, match="^push: .*; give owner/name$") as found:
        check_repo_id(repo_id)
    assert "\n" not in str(found.value)
    check_repo_id("owner/name")

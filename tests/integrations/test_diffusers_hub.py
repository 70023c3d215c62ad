"""Names of the Hub on the command line. There is no network: the cache of the Hub lies in a folder of the test."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.file_download import repo_folder_name

from lazy_compile.cli.models import choose_scheduler, load_model
from lazy_compile.errors import ArtifactError, ConfigError
from support.diffusers_pipelines import dit

REVISION = "0" * 40


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    dit().pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    for module in (huggingface_hub.constants, huggingface_hub._snapshot_download.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    return tmp_path


def cached(hub: Path, name: str, files: Path) -> None:
    """The files as ``hub`` would have them after a download."""
    folder = hub / repo_folder_name(repo_id=name, repo_type="model")
    shutil.copytree(files, folder / "snapshots" / REVISION)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)


@pytest.mark.parametrize("spec", ["owner/tiny-dit", "owner/tiny-dit#transformer"])
def test_a_pipeline_in_the_cache(hub: Path, saved: Path, spec: str) -> None:
    cached(hub, "owner/tiny-dit", saved)
    named = load_model(spec)
    assert type(named.model).__name__ == "DiTTransformer2DModel"
    assert all(map(torch.equal, named.model.state_dict().values(), dit().model.state_dict().values()))
    assert type(choose_scheduler(named, None)).__name__ == "DDIMScheduler"


def test_a_repository_of_one_model(hub: Path, saved: Path) -> None:
    cached(hub, "owner/model", saved / "transformer")
    assert type(load_model("owner/model").model).__name__ == "DiTTransformer2DModel"


def test_only_the_denoiser_is_asked_for(hub: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_model("owner/name")
    assert {pattern.split("/")[0] for pattern in asked if "/" in pattern} == {"transformer"}


def test_what_cannot_be_had_is_one_line(hub: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"cannot get owner/nowhere from the Hub: .*expected the owner/name"
    ) as error:
        load_model("owner/nowhere")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["a/b/c", "owner/", "/name", "factories"])
def test_what_is_no_name_of_the_hub(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="nor owner/name of the Hub"):
        load_model(spec)

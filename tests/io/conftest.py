"""Starts the stand-ins, to which the real clients of this process then lead."""

import pytest
from huggingface_hub import constants

from tests.io.stand_ins import TOKEN, Hub, Store


@pytest.fixture
def store(monkeypatch):
    """Starts a stand-in to which ``gs://`` paths of this process, and of processes that it starts, lead."""
    # It is read when gcsfs is imported, which would ask a second service, over gRPC.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    gcsfs = pytest.importorskip("gcsfs", reason="gs:// needs gcsfs")
    import fsspec
    from etils.epath import backend

    def forget_clients() -> None:
        """Drops the clients, which would otherwise be kept with the address of an earlier stand-in."""
        backend._FileSystemSpecBackend._get_filesystem.cache_clear()
        gcsfs.GCSFileSystem.clear_instance_cache()
        fsspec.config.set_conf_env(fsspec.config.conf)

    with Store().running() as server:
        for variable in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            monkeypatch.setenv(variable, server.url)
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "stand-in")
        monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
        forget_clients()
        yield server
        forget_clients()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Starts a stand-in to which the client of this process talks by Git LFS, with an empty cache."""
    with Hub(tmp_path / "xet").running() as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        pattern = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        values = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": pattern, "HF_HUB_DISABLE_XET": True}
        values |= {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": True}
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        yield server
